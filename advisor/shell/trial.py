"""One load trial on this machine: daemon, engines, load, window, evidence, and nothing left behind."""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from advisor.core.errors import Unfit
from advisor.core.loads import by_engine
from advisor.core.records import (
    SCHEMA_VERSION,
    CoreSpeed,
    CpuUse,
    Ended,
    EngineSettings,
    GpuSamples,
    Manifest,
    MpsEvidence,
    Protocol,
    RawEngine,
    RawLoad,
    RawTrial,
    Stage,
    Stranger,
    Teardown,
    TrialSpec,
    Workload,
)
from advisor.core.settings import serve_arguments, serve_environment
from advisor.core.workload import output_tokens, turnover_tokens
from advisor.shell import contention, mps
from advisor.shell.core_probe import core_speeds
from advisor.shell.engines import SERVED_NAME, EngineFailed, Engines, Launch
from advisor.shell.gpu import Nvml, Sampler
from advisor.shell.host import steal_s
from advisor.shell.load import Load, LoadFailed, deal
from advisor.shell.processes import child_environment

# The fixed prompts whose log-probabilities show that two engines compute the same: long enough for the
# attention kernel to work, few enough to cost nothing.
FIXED_PROMPTS, FIXED_PROMPT_TOKENS, FIXED_PROMPT_SEED = 4, 96, 20250
# GPU memory that may stay in use after a trial: driver bookkeeping, not ours.
MEMORY_SLACK_BYTES = 300 << 20

# The driver alone keeps about 0.6 GiB of an H200; more than this belongs to somebody.
UNSEEN_BYTES = 2 << 30
# How long a failed load waits for an engine's death to become visible.
BLAME_S = 2.0

Say = Callable[[str], None]


@dataclass
class Place:
    """Where trials run and what they are made of; the same for all trials of a profile."""

    manifest: Manifest
    model_folder: Path
    tokenizer: Path
    words: Sequence[str]
    vllm_command: Sequence[str]
    scratch: Path
    control: Path | None
    scrub: Mapping[str, str]


class Clock:
    """Seconds since the trial began, and the stages it went through."""

    def __init__(self) -> None:
        self.origin_s = time.monotonic()
        self.stages: list[Stage] = []
        self._open: tuple[str, float] | None = None

    def now(self) -> float:
        return time.monotonic() - self.origin_s

    def stage(self, name: str) -> None:
        self.close()
        self._open = (name, self.now())

    def close(self) -> None:
        if self._open is not None:
            self.stages.append(Stage(name=self._open[0], start_s=self._open[1], end_s=self.now()))
            self._open = None


class Interrupted:
    """Whether somebody asked to stop while that could not be done."""

    asked = False


@contextmanager
def uninterrupted(say: Say) -> Iterator[Interrupted]:
    """Finish cleaning up even when Ctrl-C is pressed or a SIGTERM arrives; the caller looks whether one did."""
    interrupted = Interrupted()

    def answer(number: int, frame: FrameType | None) -> None:
        interrupted.asked = True
        say("still cleaning up the GPU; please wait")

    before = {number: signal.signal(number, answer) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def whole() -> Iterator[None]:
    """Do not stop in the middle of starting processes: one that nobody has noted yet would be left behind."""
    with uninterrupted(lambda text: None) as interrupted:
        yield
    if interrupted.asked:
        raise KeyboardInterrupt


@dataclass
class _Evidence:
    """What has been gathered so far; a trial that fails half-way keeps what it has."""

    ended: Ended = "completed"
    detail: str = ""
    window: tuple[float, float] | None = None
    engines: list[RawEngine] = field(default_factory=list)
    loads: list[RawLoad] = field(default_factory=list)
    cpu: list[CpuUse] = field(default_factory=list)
    steal_s: float | None = None
    strangers: list[Stranger] = field(default_factory=list)
    core_speeds: list[CoreSpeed] = field(default_factory=list)
    gpu: GpuSamples | None = None
    mps: MpsEvidence | None = None
    foreign: list[int] = field(default_factory=list)
    teardown: Teardown | None = None


class LoadTrial:
    """Runs one spec once. `run` returns the raw record; it raises only for a machine that is unfit, or Ctrl-C."""

    def __init__(self, place: Place, nvml: Nvml, spec: TrialSpec, created: str, say: Say) -> None:
        if spec.settings is None or spec.workload is None or spec.protocol is None:
            raise ValueError("a load trial needs settings, workload and protocol")
        self._place, self._nvml, self._spec, self._created, self._say = place, nvml, spec, created, say
        self._settings: EngineSettings = spec.settings
        self._workload: Workload = spec.workload
        self._protocol: Protocol = spec.protocol
        self._uuid = place.manifest.gpu.uuid
        self._clock = Clock()
        self._seen = _Evidence()
        self._daemon: mps.Daemon | None = None
        self._engines: Engines | None = None
        self._load: Load | None = None
        self.interrupted = False  # asked to stop while cleaning up; the record is complete all the same
        self._sampler: Sampler | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="t", dir=place.scratch))

    def run(self) -> RawTrial:
        refuse_company(self._nvml, self._uuid)
        memory_before = self._nvml.memory_used_bytes(self._uuid)
        try:
            self._measure()
        except EngineFailed as failure:
            self._fail(failure.ended, failure.detail)
        except LoadFailed as failure:
            self._fail(*self._blame(failure))
        except mps.MpsQueryError as failure:
            self._fail("crash", f"MPS: {failure}")
        finally:
            with uninterrupted(self._say) as interrupted:
                self._tear_down(memory_before)
            self.interrupted = interrupted.asked
        return self._record()

    def _blame(self, failure: LoadFailed) -> tuple[str, str]:
        """Requests that fail are mostly an engine that died: give that a moment to show, for it is the cause."""
        deadline = time.monotonic() + BLAME_S
        while self._engines is not None and time.monotonic() < deadline:
            try:
                self._engines.check()
            except EngineFailed as cause:
                return cause.ended, cause.detail
            time.sleep(0.1)
        return "crash", str(failure)

    def _fail(self, ended: str, detail: str) -> None:
        match ended:
            case "oom" | "crash" | "timeout" | "not_attached":
                self._seen.ended = ended
            case _:
                self._seen.ended = "crash"
        self._seen.detail = detail

    # -- the story of a trial

    def _measure(self) -> None:
        self._clock.stage("start engines")
        with whole():
            environment = self._start_daemon()
            self._engines = Engines(self._launches(environment), self._clock.origin_s, self._place.scrub)
            self._engines.start()
        total = self._spec.engines
        self._engines.wait_ready(
            self._protocol.engine_start_timeout_s,
            lambda ready: self._say(f"starting engines, {ready} of {total} ready"),
        )
        self._clock.stage("check")
        self._engines.ask_logprobs(self._fixed_prompts(), generated=self._workload.kind == "decode", timeout_s=60.0)
        # Now that the engines are idle: beside a load the cores would show how busy they are, not how fast.
        self._seen.core_speeds = core_speeds(self._cores())
        self._start_load()
        self._clock.stage("warm-up")
        self._warm_up()
        self._clock.stage("window")
        self._window()
        self._clock.stage("drain")
        if self._load is not None and self._seen.window is not None:
            parts = self._load.stop(self._seen.window, self._protocol.drain_timeout_s)
            self._seen.loads = by_engine(parts, self._spec.engines)

    def _start_daemon(self) -> dict[str, str]:
        if not self._spec.mps:
            return mps.without_mps_environment(self._directory)
        if self._place.control is None:
            raise Unfit("nvidia-cuda-mps-control is not on PATH; install the NVIDIA driver's MPS programs")
        self._daemon = mps.Daemon.start(self._directory, self._place.control, self._uuid)
        return self._daemon.client_environment(self._spec.thread_percentage)

    def _launches(self, mps_environment: Mapping[str, str]) -> list[Launch]:
        argv = [*self._place.vllm_command, "serve", str(self._place.model_folder)]
        argv += ["--served-model-name", SERVED_NAME]
        argv += serve_arguments(self._settings, self._workload.kind)
        return [
            Launch(
                argv=argv,
                environment=child_environment(
                    {
                        **mps_environment,
                        **serve_environment(self._settings),
                        "CUDA_VISIBLE_DEVICES": self._uuid,
                        "MPS_ADVISOR_ENGINE": str(index),
                    }
                ),
                cores=cores,
                log=self._directory / f"engine-{index}.log",
            )
            for index, cores in enumerate(self._spec.engine_cores)
        ]

    def _fixed_prompts(self) -> list[str]:
        chooser = random.Random(FIXED_PROMPT_SEED)
        length = min(FIXED_PROMPT_TOKENS, self._workload.isl)
        return [
            "".join(f" {word}" for word in chooser.choices(self._place.words, k=length)) for _ in range(FIXED_PROMPTS)
        ]

    def _start_load(self) -> None:
        assert self._engines is not None
        # Every core for the load gets a generator: one generator is one thread, and may be the limit.
        jobs = deal(self._engines.urls, SERVED_NAME, self._workload, len(self._spec.load_cores))
        with whole():
            self._load = Load.start(
                jobs,
                tokenizer=self._place.tokenizer,
                directory=self._directory,
                bin_s=self._protocol.bin_s,
                origin_s=self._clock.origin_s,
                cores=self._spec.load_cores,
                environment=child_environment({}),
                drain_timeout_s=self._protocol.drain_timeout_s,
            )
        self._load.wait_ready(60.0)
        self._sampler = Sampler(
            self._uuid,
            self._clock.origin_s,
            self._protocol.nvml_interval_s,
            self._protocol.gpm_interval_s,
            self._place.manifest.gpu.gpm,
        )
        self._sampler.start()
        self._load.go()

    def _warm_up(self) -> None:
        if self._workload.kind == "decode":
            wave = self._workload.concurrency * output_tokens(self._workload)
            enough, least_s = 0.15 * wave, 1.0
        else:
            enough = self._protocol.warmup_turnovers * turnover_tokens(self._workload)
            least_s = self._protocol.warmup_min_s
        begin = self._clock.now()
        limit_s = begin + self._protocol.window_max_s
        for tokens, completed in self._watch():
            elapsed = self._clock.now() - begin
            if (tokens >= 1.02 * enough and elapsed >= least_s) or (self._workload.kind == "decode" and completed):
                return
            if self._clock.now() > limit_s:
                raise EngineFailed(
                    "timeout", 0, f"the warm-up did not get through {enough:.0f} tokens in {limit_s - begin:.0f} s"
                )
            self._say(f"warm-up {min(1.0, tokens / max(enough, 1)):.0%}")

    def _window(self) -> None:
        assert self._engines is not None
        engines = self._engines
        decode = self._workload.kind == "decode"
        wave = self._workload.concurrency * output_tokens(self._workload)
        clients_start, servers_start = self._attached()
        engines.count()
        cpu_start, steal_start = self._cpu_times(), steal_s()
        who_start = contention.read([row.pid for row in cpu_start])
        start = self._clock.now()
        base = self._tokens()[0]
        enough = 1.03 * self._protocol.measure_turnovers * turnover_tokens(self._workload)
        end = start
        for tokens, completed in self._watch():
            end = self._clock.now()
            if decode:
                if completed or tokens >= 0.93 * wave:
                    # A completion is noticed up to a tick late: the window ends safely before it.
                    end = max(end - 0.4, start) if completed else end
                    break
            elif tokens - base >= enough and end - start >= self._protocol.measure_min_s:
                break
            if end - start >= self._protocol.window_max_s:
                break
            rate = (tokens - base) / max(end - start, 1e-6)
            self._say(f"measuring {min(1.0, (tokens - base) / enough):.0%}, {rate:,.0f} tokens/s")
        cpu_end, steal_end = self._cpu_times(), steal_s()
        who_end = contention.read([row.pid for row in cpu_end])
        self._seen.window = (start, end)
        engines.count()
        clients_end, servers_end = self._attached()
        self._seen.foreign = self._foreign(servers_start + servers_end)
        self._seen.steal_s = max(0.0, steal_end - steal_start)
        self._seen.cpu = contention.by_thread(_cpu_use(cpu_start, cpu_end), who_start, who_end)
        ours = {row.pid for row in cpu_start + cpu_end} | self._own_pids()
        self._seen.strangers = contention.strangers(who_start, who_end, end - start, self._cores(), ours)
        self._seen.mps = MpsEvidence(
            daemon=self._daemon_answers(),
            servers_start=servers_start,
            servers_end=servers_end,
            clients_start=clients_start,
            clients_end=clients_end,
        )

    def _watch(self) -> Iterator[tuple[int, int]]:
        """Tokens and completed requests so far, a few times a second, while everything is alive and moving."""
        assert self._engines is not None
        last, last_change = -1, self._clock.now()
        while True:
            time.sleep(0.1)
            self._engines.check()
            tokens, completed = self._tokens()
            now = self._clock.now()
            if tokens != last:
                last, last_change = tokens, now
            elif now - last_change > self._protocol.stall_timeout_s:
                stalled = f"no token from any engine for {self._protocol.stall_timeout_s:.0f} s"
                raise EngineFailed("timeout", 0, stalled)
            yield tokens, completed

    def _tokens(self) -> tuple[int, int]:
        assert self._load is not None
        ticks = self._load.progress()
        for tick in ticks:
            if tick.gave_up is not None:
                raise EngineFailed("crash", 0, f"requests keep failing: {tick.gave_up}")
        return sum(tick.tokens for tick in ticks), sum(tick.completed for tick in ticks)

    # -- evidence

    def _attached(self) -> tuple[list[int], list[int]]:
        """PIDs of the MPS clients and servers; none of either when there is no daemon of ours."""
        if self._daemon is None:
            return [], []
        return sorted(self._daemon.clients()), sorted(self._daemon.servers())

    def _daemon_answers(self) -> bool:
        if self._daemon is not None:
            return True
        if self._place.control is None:
            return False
        return mps.answers(self._directory / "empty", self._place.control)

    def _foreign(self, servers: Sequence[int]) -> list[int]:
        assert self._engines is not None
        mine = self._engines.own_pids() | set(servers)
        return sorted(set(self._nvml.compute_processes(self._uuid)) - mine)

    def _cores(self) -> set[int]:
        return {core for cores in [*self._spec.engine_cores, self._spec.load_cores] for core in cores}

    def _own_pids(self) -> set[int]:
        assert self._engines is not None
        daemon = None if self._daemon is None else self._daemon.pid
        return self._engines.own_pids() | ({daemon} if daemon is not None else set())

    def _cpu_times(self) -> list[CpuUse]:
        """CPU seconds so far of every process that takes part."""
        assert self._engines is not None and self._load is not None
        rows = []
        for index, (front, core) in enumerate(zip(self._engines.front_pids(), self._engines.core_pids, strict=True)):
            rows += [_cpu_time("api_server", index, pid) for pid in front]
            if core is not None:
                rows.append(_cpu_time("engine_core", index, core))
        rows += [_cpu_time("load", None, pid) for pid in self._load.pids]
        rows.append(_cpu_time("advisor", None, psutil.Process().pid))
        if self._daemon is not None:
            rows += [_cpu_time("mps_server", None, pid) for pid in self._daemon.servers()]
        return [row for row in rows if row is not None]

    # -- the end

    def _tear_down(self, memory_before: int | None) -> None:
        self._clock.stage("teardown")
        self._say("cleaning up")
        begin = self._clock.now()
        steps: list[str] = []
        left: list[int] = []
        # Whatever goes wrong with load and sampler, engines and daemon have to be ended.
        if self._load is not None:
            with suppress(Exception):
                self._load.abort()
        if self._sampler is not None:
            with suppress(Exception):
                self._seen.gpu = self._sampler.stop()
        if self._engines is not None:
            more, left = self._engines.stop(self._protocol.teardown_timeout_s)
            steps += more
            self._seen.engines = self._engines.raw()
        daemon_left = False
        if self._daemon is not None:
            steps += self._daemon.quit(self._protocol.teardown_timeout_s)
            left += self._daemon.left()
            daemon_left = not self._daemon.gone()
        memory_after = self._wait_for_memory(memory_before)
        self._seen.teardown = Teardown(
            seconds=self._clock.now() - begin,
            steps=steps,
            left_pids=left,
            daemon_left=daemon_left,
            memory_before_bytes=memory_before,
            memory_after_bytes=memory_after,
        )
        self._clock.close()

    def _wait_for_memory(self, before: int | None) -> int | None:
        """The driver gives memory back a moment after a process ends; wait for it, up to the teardown's limit."""
        deadline = time.monotonic() + self._protocol.teardown_timeout_s
        while True:
            used = self._nvml.memory_used_bytes(self._uuid)
            done = used is None or before is None or used <= before + MEMORY_SLACK_BYTES
            if (done and not self._nvml.compute_processes(self._uuid)) or time.monotonic() > deadline:
                return used
            time.sleep(0.1)

    def _record(self) -> RawTrial:
        seen = self._seen
        return RawTrial(
            schema_version=SCHEMA_VERSION,
            spec=self._spec,
            created=self._created,
            ended=seen.ended,
            detail=seen.detail,
            gpu_uuid=self._uuid,
            window=seen.window,
            engines=seen.engines,
            loads=seen.loads,
            cpu=seen.cpu,
            steal_s=seen.steal_s,
            strangers=seen.strangers,
            core_speeds=seen.core_speeds,
            gpu=seen.gpu,
            mps=seen.mps,
            foreign_pids=seen.foreign,
            teardown=seen.teardown,
            numerics=None,
            timeline=self._clock.stages,
        )


def refuse_company(nvml: Nvml, uuid: str) -> None:
    """Raise Unfit when other processes use this GPU."""
    if others := nvml.compute_processes(uuid):
        raise Unfit(
            f"other processes use this GPU (PID {', '.join(map(str, sorted(others)))}); a measurement beside them "
            "would be wrong: stop them, or choose another GPU with --gpu"
        )
    used = nvml.memory_used_bytes(uuid)
    if used is not None and used > UNSEEN_BYTES:
        raise Unfit(
            f"{used / 2**30:.1f} GiB of this GPU are in use by processes that cannot be seen from here (another "
            "container?); a measurement beside them would be wrong: free the GPU, or choose another with --gpu"
        )


def _cpu_time(role: str, engine: int | None, pid: int) -> CpuUse | None:
    """CPU seconds of one process until now, with those of each thread's maximum; None when it is gone."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        threads = process.threads()
    except psutil.Error:
        return None
    busiest = max((thread.user_time + thread.system_time for thread in threads), default=None)
    return CpuUse(
        role=role,  # type: ignore[arg-type]  # only the literals above are passed
        engine=engine,
        pid=pid,
        cpu_s=times.user + times.system,
        main_thread_s=busiest,
    )


def _cpu_use(start: Sequence[CpuUse], end: Sequence[CpuUse]) -> list[CpuUse]:
    """Differences between two readings, for processes that are in both."""
    before = {one.pid: one for one in start}
    rows = []
    for one in end:
        first = before.get(one.pid)
        if first is None:
            continue
        threads = (one.main_thread_s, first.main_thread_s)
        rows.append(
            CpuUse(
                role=one.role,
                engine=one.engine,
                pid=one.pid,
                cpu_s=max(0.0, one.cpu_s - first.cpu_s),
                main_thread_s=None if threads[0] is None or threads[1] is None else max(0.0, threads[0] - threads[1]),
            )
        )
    return rows


def default_vllm_command() -> list[str]:
    """vLLM's own entry point, run by this interpreter."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]
