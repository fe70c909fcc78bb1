"""Requests to the engines from load generator processes, on cores of their own.

One process is one thread and may be the limit, so there are as many as there are cores for them. Each holds a part of
all requests in flight and sends to every engine: together they do what a router does that knows how many requests are
in flight where. This is the parent's side; what the processes do, and the lines they speak, is in `load_worker`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

import advisor
from advisor.core.errors import Unfit
from advisor.core.records import RawLoad, Record, Workload
from advisor.core.workload import output_tokens, shares
from advisor.shell import board
from advisor.shell.load_worker import Calibration, LoadConfig, Tick
from advisor.shell.patience import LOAD_ABORT_S as ABORT_TIMEOUT_S
from advisor.shell.patience import LOAD_EXIT_S as EXIT_TIMEOUT_S
from advisor.shell.patience import LOAD_SUMMARY_S as SUMMARY_TIMEOUT_S
from advisor.shell.patience import LOAD_THREAD_S
from advisor.shell.patience import REQUEST_S as REQUEST_TIMEOUT_S

WORKER: Final = [sys.executable, "-m", "advisor.shell.load_worker"]
BOARD: Final = "in-flight"
STDERR_LINES_KEPT: Final = 20


class LoadFailed(Unfit):
    """A load generator cannot go on: it died, could not do its work, or sent what it should not."""

    def __init__(self, worker: int, why: str) -> None:
        super().__init__(f"load generator {worker} {why}")
        self.worker = worker


class LoadTimeout(LoadFailed):
    """A load generator did not answer in time."""


class LoadJob(Record, frozen=True):
    """The part of load generator `worker` of `workers`: `concurrency` of the workload's requests in flight.

    They go to whichever of the engines, at `base_urls` in their order, has the fewest in flight. `model` is the name
    that the engines serve. `first_slot` is the number of this part's first slot over all parts. `decode_tokens` is
    the output length of the requests of the workload "decode", which are sent once, to engine slot modulo engines.
    `cores` replaces the cores that all workers share.
    """

    worker: int
    workers: int
    base_urls: list[str]
    model: str
    workload: Workload
    concurrency: int
    first_slot: int = 0
    decode_tokens: int = 0
    cores: list[int] | None = None


def deal(base_urls: Sequence[str], model: str, workload: Workload, workers: int) -> list[LoadJob]:
    """The requests in flight, dealt evenly to `workers` load generators, or to fewer where requests are fewer."""
    parts = shares(workload.concurrency, max(1, min(workers, workload.concurrency)))
    return [
        LoadJob(
            worker=worker,
            workers=len(parts),
            base_urls=list(base_urls),
            model=model,
            workload=workload,
            concurrency=part,
            first_slot=sum(parts[:worker]),
            decode_tokens=output_tokens(workload),
        )
        for worker, part in enumerate(parts)
    ]


class _Message(Record, frozen=True):
    ready: Calibration | None = None
    tick: Tick | None = None
    result: list[RawLoad] | None = None
    error: str | None = None


class _Worker:
    """One load generator process. Its output is read by threads, so that it never waits for this process."""

    def __init__(self, config: LoadConfig, env: Mapping[str, str], changed: threading.Condition) -> None:
        self.number = config.worker
        self.ready: Calibration | None = None
        self.tick: Tick | None = None
        self.result: list[RawLoad] | None = None
        self.trouble: str | None = None
        self._changed = changed
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES_KEPT)
        self._process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(env),
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
        )
        self._threads = [
            threading.Thread(target=target, name=f"load-{config.worker}", daemon=True)
            for target in (self._read_stderr, self._read_stdout)
        ]
        for thread in self._threads:
            thread.start()
        self.send(config)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: object) -> None:
        """Write one line. A worker that is gone does not read it; its end is noticed where its output ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._stderr.append(line.decode(errors="replace").strip())

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._take(line)
                self._changed.notify_all()
        how = self._how_it_ended()
        with self._changed:
            if self.result is None and self.trouble is None:
                self.trouble = how
            self._changed.notify_all()

    def _take(self, line: bytes) -> None:
        try:
            message = msgspec.json.decode(line, type=_Message)
        except msgspec.MsgspecError as error:
            self.trouble = self.trouble or f"sent what is not a message ({error}): {line[:80]!r}"
            return
        if message.ready is not None:
            # Nothing has been sent by now, which makes these zeros counts and not gaps.
            self.tick = Tick(at_s=0.0, tokens=0, completed=0, failed=0, in_flight=0, cpu_s=0.0)
        self.ready = message.ready or self.ready
        self.tick = message.tick or self.tick
        self.result = message.result or self.result
        if message.error is not None:
            self.trouble = f"gave up: {message.error}"

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "closed its output and lives on"
        self._threads[0].join(LOAD_THREAD_S)
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{how}: {self._stderr[-1]}" if self._stderr else how

    def end(self, deadline_s: float) -> None:
        """Wait for the process until `deadline_s` (monotonic), then kill it; close its pipes."""
        try:
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_TIMEOUT_S)
        for thread in self._threads:
            thread.join(LOAD_THREAD_S)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` plus where this package lies; a module in the current directory must not hide a library's."""
    home = str(Path(advisor.__file__).resolve().parent.parent)
    path = [home, env["PYTHONPATH"]] if env.get("PYTHONPATH") else [home]
    return {**env, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


class Load:
    """The load generators of one trial. As a context manager it leaves no process behind, however it is left.

    Start it from a thread that outlives the trial: Linux ends the workers with the thread that started them.
    """

    def __init__(self, configs: Sequence[LoadConfig], env: Mapping[str, str]) -> None:
        self._changed = threading.Condition()
        self._workers: list[_Worker] = []
        try:
            for config in configs:
                self._workers.append(_Worker(config, env, self._changed))
        except BaseException:
            self.abort()
            raise

    @classmethod
    def start(
        cls,
        jobs: Sequence[LoadJob],
        *,
        tokenizer: Path,
        directory: Path,
        bin_s: float,
        origin_s: float,
        cores: Sequence[int],
        environment: Mapping[str, str],
        drain_timeout_s: float,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Load:
        """One worker for each job; the jobs are numbered and are all there are. Returns at once.

        `tokenizer` is the path of the served model's tokenizer.json, `directory` where the workers count their requests
        in a file that stays there, `origin_s` the `time.monotonic()` of the trial's start, `cores` the CPUs of all
        workers (empty: not pinned) unless a job names its own, `environment` the workers' whole environment.
        Raises OSError when `directory` cannot be written to.
        """
        counts = directory.resolve() / BOARD
        board.create(counts, len(jobs), len(jobs[0].base_urls))
        configs = [
            LoadConfig(
                worker=job.worker,
                workers=job.workers,
                base_urls=job.base_urls,
                board=str(counts),
                model=job.model,
                workload=job.workload,
                concurrency=job.concurrency,
                first_slot=job.first_slot,
                decode_tokens=job.decode_tokens,
                tokenizer=str(tokenizer.resolve()),
                bin_s=bin_s,
                origin_s=origin_s,
                cores=list(cores if job.cores is None else job.cores),
                request_timeout_s=request_timeout_s,
                drain_timeout_s=drain_timeout_s,
                parent_pid=os.getpid(),
            )
            for job in jobs
        ]
        return cls(configs, environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of jobs."""
        return [worker.pid for worker in self._workers]

    def wait_ready(self, timeout_s: float) -> list[Calibration]:
        """Wait until every worker knows how to make its prompts. Raises LoadFailed, and LoadTimeout after the time."""
        self._wait(lambda worker: worker.ready is not None, timeout_s, "was not ready")
        return [worker.ready for worker in self._workers if worker.ready is not None]

    def go(self) -> None:
        """Start all loads. Call after `wait_ready`."""
        self._send({"go": True})

    def check(self) -> None:
        """Raise LoadFailed when a worker is gone or in trouble."""
        with self._changed:
            self._raise_trouble()

    def progress(self) -> list[Tick]:
        """The latest tick of each worker, without waiting. Raises LoadFailed where a worker is gone or not ready."""
        with self._changed:
            self._raise_trouble()
            ticks = []
            for worker in self._workers:
                if worker.tick is None:
                    raise LoadFailed(worker.number, "is not ready yet; wait for it before asking for progress")
                ticks.append(worker.tick)
            return ticks

    def stop(self, window: tuple[float, float] | None, timeout_s: float) -> list[RawLoad]:
        """Send nothing new, let the requests in flight end, and return what each worker saw of each engine.

        `window` is the measured part (start, end) in seconds since `origin_s`; None when none was reached. The
        workers cut off what has not ended after `drain_timeout_s`, so `timeout_s` is at least that; 30 s are
        added for summing up. Raises LoadFailed, and LoadTimeout after the time.
        """
        self._send({"stop": {"window": window}})
        self._wait(lambda worker: worker.result is not None, timeout_s + SUMMARY_TIMEOUT_S, "had not reported")
        deadline_s = time.monotonic() + EXIT_TIMEOUT_S
        for worker in self._workers:
            worker.end(deadline_s)
        return [part for worker in self._workers for part in worker.result or ()]

    def abort(self) -> None:
        """Close all connections and end all workers now. Does nothing to workers that have ended."""
        self._send({"abort": True})
        deadline_s = time.monotonic() + ABORT_TIMEOUT_S
        for worker in self._workers:
            worker.end(deadline_s)

    def _send(self, message: dict[str, Any]) -> None:
        for worker in self._workers:
            worker.send(message)

    def _wait(self, done: Callable[[_Worker], bool], timeout_s: float, late: str) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: any(worker.trouble for worker in self._workers) or all(map(done, self._workers)), timeout_s
            )
            self._raise_trouble()
            for worker in self._workers:
                if not done(worker):
                    raise LoadTimeout(worker.number, f"{late} after {timeout_s:g} s")

    def _raise_trouble(self) -> None:
        for worker in self._workers:
            if worker.trouble is not None:
                raise LoadFailed(worker.number, worker.trouble)
