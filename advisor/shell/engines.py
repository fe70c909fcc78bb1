"""`vllm serve` child processes: started together, watched, asked for evidence, ended in the safe order."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advisor.core.errors import Unfit
from advisor.core.records import RawEngine, ServerCounters
from advisor.shell.patience import DEATH_TOLD_S, ENGINE_END_S, HEALTH_S, METRICS_S, RPC_GRACE_S
from advisor.shell.processes import Child, Known, end, start_pinned, tree, wait_gone
from advisor.shell.warm import Warm, WarmGone

SERVED_NAME = "advised"
_DEALT_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ENGINE_CORE = re.compile(r"\(EngineCore pid=(\d+)\)")
_ENGINE_CORE_TITLE = "VLLM::EngineCor"  # the kernel keeps 15 characters of a process name
_OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "less than desired GPU memory utilization",
    "No available memory for the cache blocks",
    "larger than the available KV cache memory",
)
_RESOLVED = {
    # vLLM's own default is not logged; but steps are compiled for ranges of tokens, the last of which ends there.
    "max_num_batched_tokens": re.compile(
        r"(?:max_num_batched_tokens=|'compile_ranges_endpoints': \[(?:\d+, )*)(\d+)\b"
    ),
    "max_num_seqs": re.compile(r"'max_num_seqs': (\d+)"),
    "max_model_len": re.compile(r"max_seq_len=(\d+)"),
    "enable_prefix_caching": re.compile(r"\benable_prefix_caching=(True|False)"),
    "max_cudagraph_capture_size": re.compile(r"'max_cudagraph_capture_size': (\d+)"),
    "dtype": re.compile(r"\bdtype=torch\.(\w+)"),
    "attention_backend": re.compile(r"Using (\w+) attention backend"),
    "compile_s": re.compile(r"torch\.compile took ([\d.]+) s"),
    "graph_capture_s": re.compile(r"Graph capturing finished in ([\d.]+) secs"),
    "model_gib": re.compile(r"Model loading took ([\d.]+) GiB"),
    "version": re.compile(r"LLM engine \(v([\w.+]+)\)"),
}
_ASYNC = re.compile(r"Asynchronous scheduling is (enabled|disabled)")
_METRIC = re.compile(r"^(vllm:\w+)(?:\{(.*)\})? ([\d.eE+-]+|NaN|[+-]?Inf)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
# "(EngineCore pid=620) ERROR 11-21 01:06:10 [core.py:1] RuntimeError: what happened", with or without the middle.
_EXCEPTION = re.compile(
    r"^(?:\((?P<who>\w+) pid=\d+\) )?(?:\w+ [\d-]+ [\d:]+ \[[\w.]+:\d+\] )?(?P<what>[\w.]*(?:Error|Exception)\b.*)$",
    re.MULTILINE,
)
_NOISE = re.compile(r"HTTP/1\.1\" 200|Route: /|it/s\]|█")
_TAIL_LINES, _CAUSE_LINES, _TAIL_WIDTH = 30, 5, 240


class EngineFailed(Exception):
    """An engine that did not start, died or hung. `ended` is the trial's ending, `engine` its index."""

    def __init__(self, ended: str, engine: int, detail: str) -> None:
        super().__init__(detail)
        self.ended, self.engine, self.detail = ended, engine, detail


@dataclass
class Launch:
    """What one engine is started with."""

    argv: Sequence[str]  # without --port, which is chosen at the start
    environment: Mapping[str, str]
    cores: Sequence[int]
    log: Path


@dataclass
class _Engine:
    index: int
    port: int
    launch: Launch
    process: Child
    forked: bool
    ready_s: float | None = None
    core: Known | None = None
    died_s: float | None = None
    counters: list[ServerCounters] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    cache: dict[str, str] = field(default_factory=dict)
    log_from: int = 0  # where the log of this window begins
    known: dict[int, Known] = field(default_factory=dict)  # every process of its tree that was ever seen

    def log_text(self) -> str:
        try:
            return self.launch.log.read_text(errors="replace")
        except OSError:
            return ""

    def look(self) -> None:
        """Remember the processes of this engine's tree, and which of them is the engine core."""
        for one in tree(self.process.pid):
            self.known.setdefault(one.pid, one)
            if self.core is None and _is_core(one):
                self.core = one

    def is_core(self, one: Known) -> bool:
        return one.pid == self.core.pid if self.core is not None else _is_core(one)

    def requests(self) -> float:
        """Requests that are running or waiting by vLLM's own count; 0 where it does not tell."""
        # The count is brought up to date at the end of a step. When all requests were cut off there is none to come.
        nudge = {"model": SERVED_NAME, "prompt": "1", "max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        try:
            self.request("POST", "/v1/completions", nudge, timeout_s=METRICS_S)
            status, body = self.request("GET", "/metrics", timeout_s=METRICS_S)
        except (OSError, http.client.HTTPException):
            return 0.0
        values = _metrics(body.decode(errors="replace"))[0] if status == 200 else {}
        return values.get("vllm:num_requests_running", 0.0) + values.get("vllm:num_requests_waiting", 0.0)

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = METRICS_S
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def _is_core(one: Known) -> bool:
    try:
        words = [one.process.name(), *one.process.cmdline()]
    except Exception:  # psutil raises several kinds for a process that is just ending
        return False
    return any(word.startswith(_ENGINE_CORE_TITLE) for word in words)


class Engines:
    """The engines of one start. Times are relative to `origin_s`, a value of `time.monotonic()`.

    With `warm` they are forked from a process that has vLLM imported, else started.
    """

    def __init__(
        self, launches: Sequence[Launch], origin_s: float, scrub: Mapping[str, str], warm: Warm | None = None
    ) -> None:
        self._warm = warm
        self._launches = launches
        self._origin_s = origin_s
        self._scrub = scrub
        self._engines: list[_Engine] = []

    # -- start

    def start(self) -> None:
        """Start all of them at once; they compile and capture side by side."""
        for index, (launch, port) in enumerate(zip(self._launches, port_blocks(len(self._launches)), strict=True)):
            argv = [*launch.argv, "--host", "127.0.0.1", "--port", str(port)]
            environment = {**launch.environment, "VLLM_PORT": str(port + 1)}
            process, forked = self._begin(argv, environment, launch)
            self._engines.append(_Engine(index, port, launch, process, forked=forked))

    def _begin(self, argv: list[str], environment: dict[str, str], launch: Launch) -> tuple[Child, bool]:
        """The engine's first process, and whether it was forked."""
        if self._warm is not None:
            try:
                return self._warm.spawn(argv, launch.cores, environment, launch.log), True
            except WarmGone:
                environment = {name: environment[name] for name in environment if name not in self._warm.environment}
        return start_pinned(argv, launch.cores, environment, launch.log), False

    def wait_ready(self, timeout_s: float, on_wait: Callable[[int], None]) -> None:
        """Wait until every engine answers its health check. Raises EngineFailed (crash, oom, timeout)."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.check()
            waiting = [engine for engine in self._engines if engine.ready_s is None]
            for engine in waiting:
                engine.look()
                if _healthy(engine):
                    engine.look()
                    engine.ready_s = self._now()
                    if engine.core is None:
                        # It does not bear its title.
                        engine.core = engine.known.get(_logged_core(engine.log_text()) or 0)
            waiting = [engine for engine in self._engines if engine.ready_s is None]
            on_wait(len(self._engines) - len(waiting))
            if not waiting:
                return
            if time.monotonic() > deadline:
                names = ", ".join(str(engine.index) for engine in waiting)
                raise EngineFailed(
                    "timeout", waiting[0].index, f"engine {names} did not answer within {timeout_s:.0f} s of its start"
                )
            time.sleep(0.2)

    def wait_idle(self, timeout_s: float) -> None:
        """Wait until no engine has a request left, those of an earlier window included. Raises EngineFailed."""
        deadline = time.monotonic() + timeout_s
        for engine in self._engines:
            while left := engine.requests():
                self.check()
                if time.monotonic() > deadline:
                    late = f"engine {engine.index} still had {left:.0f} requests after {timeout_s:.0f} s without load"
                    raise EngineFailed("timeout", engine.index, late)
                time.sleep(0.1)

    def check(self) -> None:
        """Raise EngineFailed when an API server or an engine core has died."""
        for engine in self._engines:
            code = engine.process.poll()
            core_died = engine.core is not None and not engine.core.alive
            if code is None and not core_died:
                continue
            if engine.died_s is None:
                engine.died_s = self._now()
            if code is None:
                # Give the API server a moment to notice and say why.
                try:
                    code = engine.process.wait(DEATH_TOLD_S)
                except subprocess.TimeoutExpired:
                    code = None
            text = engine.log_text()
            if any(sign in text for sign in _OUT_OF_MEMORY):
                raise EngineFailed("oom", engine.index, f"engine {engine.index} ran out of GPU memory")
            what = "API server" if not core_died else "engine core"
            how = f"exit code {code}" if code is not None and code >= 0 else _signal_name(code)
            raise EngineFailed(
                "crash", engine.index, f"engine {engine.index} died: {what} ended ({how}); {self._last_error(text)}"
            )

    def _last_error(self, text: str) -> str:
        """The engine core's last exception, which is the cause; else the API server's, which only reports one."""
        errors = [(match["who"], match["what"]) for match in _EXCEPTION.finditer(text)]
        cores = [what for who, what in errors if who == "EngineCore"]
        told = cores or [what for _, what in errors]
        return f"its last error is {self._clean(told[-1])}" if told else "there is no error in its log"

    # -- evidence

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{engine.port}" for engine in self._engines]

    @property
    def core_pids(self) -> list[int | None]:
        return [engine.core.pid if engine.core else None for engine in self._engines]

    def front_pids(self) -> list[list[int]]:
        """Per engine every process but the engine core: API servers, their supervisor, a Rust front end."""
        for engine in self._engines:
            engine.look()
        return [
            [one.pid for one in engine.known.values() if one.alive and not engine.is_core(one)]
            for engine in self._engines
        ]

    def split_cores(self) -> None:
        """Give each engine core the first of its engine's cores alone, and the engine's other processes the rest."""
        for engine, fronts in zip(self._engines, self.front_pids(), strict=True):
            first, *rest = engine.launch.cores
            for pid in fronts:
                _pin(pid, rest or [first])
            if engine.core is not None:
                _pin(engine.core.pid, [first])

    def pin(self, cores: Sequence[Sequence[int]]) -> None:
        """Move every thread of each engine to its cores; one that is given none stays where it is."""
        fronts = self.front_pids()
        for engine, mine, front in zip(self._engines, cores, fronts, strict=True):
            for pid in [*front, *([engine.core.pid] if engine.core is not None else [])] if mine else ():
                _pin(pid, mine)

    def seen_pids(self) -> set[int]:
        """The processes of these engines as they were last looked at, their first ones included."""
        return {engine.process.pid for engine in self._engines} | {pid for one in self._engines for pid in one.known}

    def own_pids(self) -> set[int]:
        """Every process of these engines that was ever seen."""
        for engine in self._engines:
            engine.look()
        return {pid for engine in self._engines for pid in engine.known}

    def count(self) -> None:
        """Read vllm's counters of every engine once. A server that does not answer leaves no row."""
        for engine in self._engines:
            try:
                status, body = engine.request("GET", "/metrics", timeout_s=METRICS_S)
            except (OSError, http.client.HTTPException):
                continue
            if status == 200:
                values, steps, engine.cache = _metrics(body.decode(errors="replace"))
                engine.counters.append(_counters(values, steps, self._now()))

    def ask_logprobs(self, prompts: Sequence[str], *, generated: bool, timeout_s: float) -> None:
        """Log-probabilities of fixed prompts' tokens (or, where the cache is filled by a stand-in, of generated ones),
        of all engines at once.

        They show whether an engine computes what another one computes. Raises EngineFailed on no answer.
        """

        def ask(engine: _Engine) -> list[list[float]]:
            return [self._logprobs(engine, prompt, generated, timeout_s) for prompt in prompts]

        with ThreadPoolExecutor(len(self._engines)) as pool:
            asked = [(engine, pool.submit(ask, engine)) for engine in self._engines]
        for engine, answer in asked:
            engine.logprobs = answer.result()

    def _logprobs(self, engine: _Engine, prompt: str, generated: bool, timeout_s: float) -> list[float]:
        body: dict[str, Any] = {"model": SERVED_NAME, "prompt": prompt, "temperature": 0.0, "ignore_eos": True}
        body |= {"max_tokens": 32, "logprobs": 1} if generated else {"max_tokens": 1, "prompt_logprobs": 1}
        try:
            status, answer = engine.request("POST", "/v1/completions", body, timeout_s)
            if status != 200:
                raise ValueError(f"HTTP {status}: {answer[:200].decode(errors='replace')}")
            choice = json.loads(answer)["choices"][0]
            if generated:
                return [float(value) for value in choice["logprobs"]["token_logprobs"]]
            return _prompt_logprobs(choice["prompt_logprobs"])
        except TimeoutError:
            detail = f"engine {engine.index} did not answer a fixed prompt within {timeout_s:.0f} s"
            raise EngineFailed("timeout", engine.index, detail) from None
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            self.check()
            detail = f"engine {engine.index} gave no log-probabilities for a fixed prompt: {error!r}"
            raise EngineFailed("crash", engine.index, self._clean(detail)) from None

    def call(
        self, method: str, arguments: Mapping[str, Any], timeout_s: float, engines: int | None = None
    ) -> list[dict[str, Any]]:
        """What the worker extension of each engine, or of the first few, answers to a call of `method`, all called at
        once.

        Raises EngineFailed for an engine that does not answer, or answers with an error.
        """
        body = {"method": method, "kwargs": dict(arguments), "timeout": timeout_s}

        def ask(engine: _Engine) -> dict[str, Any]:
            status, answer = engine.request("POST", "/collective_rpc", body, timeout_s + RPC_GRACE_S)
            if status != 200:
                raise ValueError(f"HTTP {status}: {answer[:200].decode(errors='replace')}")
            found = json.loads(answer)["results"][0]
            if not isinstance(found, dict):
                raise ValueError(f"{found!r:.200} is no answer")
            return found

        called = self._engines[:engines]
        pool = ThreadPoolExecutor(len(called))
        asked = [(engine, pool.submit(ask, engine)) for engine in called]
        try:
            wait([answer for _, answer in asked])
        finally:
            # Who asks us to stop need not wait for steps that nobody wants any more: ending the engines ends the calls.
            pool.shutdown(wait=False)
        found = []
        for engine, answer in asked:
            try:
                found.append(answer.result())
            except TimeoutError:
                detail = f"engine {engine.index} did not finish {method} within {timeout_s:.0f} s"
                raise EngineFailed("timeout", engine.index, detail) from None
            except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
                self.check()
                raise EngineFailed("crash", engine.index, self._clean(f"{method}: {error!r}")) from None
        return found

    def close_window(self) -> list[RawEngine]:
        """What is known of every engine, for the record; counters and log lines from now on are the next window's."""
        found = [self._raw(engine) for engine in self._engines]
        for engine in self._engines:
            engine.counters = []
            engine.log_from = len(engine.log_text())
        return found

    def exit_codes(self) -> dict[int, int | None]:
        """How each engine's first process ended; None for one that still runs."""
        return {engine.index: engine.process.poll() for engine in self._engines}

    def _raw(self, engine: _Engine) -> RawEngine:
        text = engine.log_text()
        core_pid = engine.core.pid if engine.core else _logged_core(text)
        resolved = {name: match.group(1) for name, rule in _RESOLVED.items() if (match := rule.search(text))}
        if match := _ASYNC.search(text):
            resolved["async_scheduling"] = str(match.group(1) == "enabled")
        return RawEngine(
            engine=engine.index,
            port=engine.port,
            api_server_pid=engine.process.pid,
            engine_core_pid=core_pid,
            ready_s=engine.ready_s,
            kv_cache_tokens=_integer(engine.cache.get("kv_cache_size_tokens")) or _logged_kv_tokens(text),
            num_gpu_blocks=_integer(engine.cache.get("num_gpu_blocks")),
            block_size=_integer(engine.cache.get("block_size")),
            resolved=resolved,
            counters_start=engine.counters[0] if engine.counters else None,
            counters_end=engine.counters[-1] if len(engine.counters) > 1 else None,
            prompt_logprobs=engine.logprobs,
            exit_code=engine.process.poll(),
            forked=engine.forked,
            died_s=engine.died_s,
            log_tail=self._tail(text[engine.log_from :]),
        )

    def _tail(self, text: str) -> list[str]:
        """The log's last lines, and before them the engine core's exceptions, which may lie far above."""
        lines = [line for line in text.splitlines() if line.strip() and not _NOISE.search(line)]
        above = [line for line in lines[:-_TAIL_LINES] if line.startswith("(EngineCore") and _EXCEPTION.match(line)]
        return [self._clean(line) for line in [*above[-_CAUSE_LINES:], *lines[-_TAIL_LINES:]]]

    def _clean(self, line: str) -> str:
        """One log line without this machine's paths, cut to a readable width."""
        for path, name in self._scrub.items():
            line = line.replace(path, name)
        return line.strip()[:_TAIL_WIDTH]

    # -- end

    def stop(self, timeout_s: float) -> tuple[list[str], list[int]]:
        """End the engines: ask, wait, then end the process trees. Returns the steps and the PIDs that are left.

        SIGTERM goes to the API servers, which end their engine cores; a busy MPS client is never killed first.
        """
        for engine in self._engines:
            engine.look()
        steps = []
        everything = [one for engine in self._engines for one in engine.known.values()]
        processes = [engine.process for engine in self._engines]
        asked = [engine.process.pid for engine in self._engines if engine.process.poll() is None]
        for engine in self._engines:
            if engine.process.poll() is None:
                engine.process.send_signal(signal.SIGTERM)
        if asked:
            steps.append(f"SIGTERM to API servers {', '.join(map(str, asked))}")
        left = wait_gone(everything, timeout_s, processes)
        if left:
            steps += end(left, ENGINE_END_S, processes)
            left = wait_gone(left, 0.0, processes)
        if not left:
            steps.append("all engine processes gone")
        return steps, [one.pid for one in left]

    def _now(self) -> float:
        return time.monotonic() - self._origin_s


PORTS_PER_ENGINE = 8  # the API server's, and those that vLLM counts up from VLLM_PORT


def port_blocks(count: int) -> list[int]:
    """The first ports of `count` free blocks that follow each other, one block per engine.

    They lie below the range from which the kernel deals ports: between the look and the engine's own bind, tens of
    seconds later, no connection and no other `bind` to port 0 can take one. Raises Unfit when none are free.
    """
    first_dealt = int(_DEALT_PORTS.read_text().split()[0])
    wanted = count * PORTS_PER_ENGINE
    for _ in range(100):
        # Anywhere, because another advisor may start engines for another GPU at the same moment.
        base = random.randrange(min(10_000, first_dealt - wanted - 1), first_dealt - wanted)
        if all(map(_is_free, range(base, base + wanted))):
            return list(range(base, base + wanted, PORTS_PER_ENGINE))
    raise Unfit(f"no {wanted} free TCP ports in a row below {first_dealt}; end what holds them")


def _pin(pid: int, cores: Sequence[int]) -> None:
    for thread in _threads(pid):
        # A thread that has just ended needs no core.
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)


def _threads(pid: int) -> list[int]:
    try:
        return [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:
        return []


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _healthy(engine: _Engine) -> bool:
    try:
        return engine.request("GET", "/health", timeout_s=HEALTH_S)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _signal_name(code: int | None) -> str:
    if code is None:
        return "while its API server lives"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _metrics(text: str) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Sums of vLLM's metrics over their labels, its engine steps by tokens, the labels of its cache configuration."""
    values: dict[str, float] = {}
    steps: dict[str, float] = {}
    cache: dict[str, str] = {}
    for name, labels, value in _METRIC.findall(text):
        if name == "vllm:cache_config_info":
            cache = dict(_LABEL.findall(labels))
        elif name == "vllm:iteration_tokens_total_bucket":
            bound = _bound(dict(_LABEL.findall(labels)).get("le", "+Inf"))
            steps[bound] = steps.get(bound, 0.0) + float(value)
        else:
            values[name] = values.get(name, 0.0) + float(value)
    return values, steps, cache


def _bound(text: str) -> str:
    """A bucket's upper bound as it is recorded: "512.0" is "512", "+Inf" is "inf"."""
    bound = float(text)
    return str(int(bound)) if bound.is_integer() else str(bound)


def _counters(values: Mapping[str, float], steps: dict[str, float], at_s: float) -> ServerCounters:
    def of(name: str) -> float:
        return values.get(f"vllm:{name}", 0.0)

    return ServerCounters(
        at_s=at_s,
        generation_tokens=of("generation_tokens_total"),
        prompt_tokens=of("prompt_tokens_total"),
        prefix_cache_hits=of("prefix_cache_hits_total"),
        preemptions=of("num_preemptions_total"),
        engine_steps=of("iteration_tokens_total_count"),
        running=of("num_requests_running"),
        waiting=of("num_requests_waiting"),
        steps_by_tokens=steps,
    )


def _prompt_logprobs(rows: Sequence[Any]) -> list[float]:
    """The log-probability of every prompt token but the first, from `prompt_logprobs: 1`.

    A row holds the token itself and, where that is another one, the likeliest: the smaller figure is the token's. The
    Rust front end of 0.26 gives bare figures, the Python one an object for each.
    """
    return [min(float(one["logprob"] if isinstance(one, dict) else one) for one in row.values()) for row in rows[1:]]


def _logged_core(log: str) -> int | None:
    """The engine core's PID by its own log lines."""
    match = _ENGINE_CORE.search(log)
    return int(match[1]) if match else None


def _logged_kv_tokens(log: str) -> int | None:
    """The KV cache's size by the engine core's log: the Rust front end has no metric for it."""
    match = re.search(r"GPU KV cache size: ([\d,]+) tokens", log)
    return int(match[1].replace(",", "")) if match else None


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
