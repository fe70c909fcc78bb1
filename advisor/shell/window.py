"""One timed window against running engines: load generators, warm-up, window, drain, and what was seen meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from advisor.core.loads import by_engine
from advisor.core.measure import half_width_so_far
from advisor.core.records import (
    CoreSpeed,
    CpuUse,
    GpuSamples,
    MpsEvidence,
    Protocol,
    RawLoad,
    RawStep,
    RawTrace,
    Stranger,
    TrialSpec,
    Workload,
)
from advisor.core.workload import output_tokens, turnover_tokens
from advisor.shell import contention
from advisor.shell.clock import Clock
from advisor.shell.core_probe import core_speeds
from advisor.shell.cpu import cpu_times, cpu_use
from advisor.shell.engines import SERVED_NAME, EngineFailed
from advisor.shell.gpu import Sampler
from advisor.shell.host import steal_s
from advisor.shell.interrupts import Say, whole
from advisor.shell.load import Load, deal
from advisor.shell.patience import LOAD_READY_S
from advisor.shell.processes import child_environment
from advisor.shell.start import Start


@dataclass
class Seen:
    """What has been gathered so far; a window that fails half-way keeps what it has."""

    window: tuple[float, float] | None = None
    loads: list[RawLoad] = field(default_factory=list)
    cpu: list[CpuUse] = field(default_factory=list)
    steal_s: float | None = None
    strangers: list[Stranger] = field(default_factory=list)
    core_speeds: list[CoreSpeed] = field(default_factory=list)
    gpu: GpuSamples | None = None
    mps: MpsEvidence | None = None
    foreign: list[int] = field(default_factory=list)
    steps: list[RawStep] = field(default_factory=list)
    traces: list[RawTrace] = field(default_factory=list)


class LoadWindow:
    """`run` it once, and `close` it however that ended: load generators and sampler are this window's own."""

    def __init__(self, start: Start, spec: TrialSpec, clock: Clock, say: Say) -> None:
        if spec.workload is None or spec.protocol is None:
            raise ValueError("a load trial needs workload and protocol")
        self._start, self._spec, self._clock, self._say = start, spec, clock, say
        self._workload: Workload = spec.workload
        self._protocol: Protocol = spec.protocol
        self._load: Load | None = None
        self._sampler: Sampler | None = None
        self.seen = Seen()

    def run(self) -> None:
        """Raises EngineFailed, LoadFailed and MpsQueryError; `seen` then holds what there is."""
        self._clock.stage("check")
        self._start.next_window(self._spec, self._workload)
        # Now that the engines are idle: beside a load the cores would show how busy they are, not how fast.
        self.seen.core_speeds = core_speeds(self._cores())
        load = self._start_load()
        self._clock.stage("warm-up")
        self._warm_up()
        self._clock.stage("window")
        self._measure(load)
        self._clock.stage("drain")
        parts = load.stop(self.seen.window, self._protocol.drain_timeout_s)
        self._start.unfinished = any(part.sent > part.completed + part.failed for part in parts)
        self.seen.loads = by_engine(parts, self._spec.engines)

    def close(self) -> None:
        """End load generators and sampler; whatever goes wrong with them, engines and daemon have to be ended."""
        if self._load is not None:
            with suppress(Exception):
                self._load.abort()
        if self._sampler is not None:
            with suppress(Exception):
                self.seen.gpu = self._sampler.stop()
        self._clock.close()

    def _start_load(self) -> Load:
        # Every core for the load gets a generator: one generator is one thread, and may be the limit.
        jobs = deal(
            self._start.engines.urls[: self._spec.engines], SERVED_NAME, self._fresh(), len(self._spec.load_cores)
        )
        directory = self._start.directory / f"window-{self._start.windows}"
        directory.mkdir()
        with whole():
            self._load = Load.start(
                jobs,
                tokenizer=self._start.place.tokenizer,
                directory=directory,
                bin_s=self._protocol.bin_s,
                origin_s=self._clock.origin_s,
                cores=self._spec.load_cores,
                environment=child_environment({}),
                drain_timeout_s=self._protocol.drain_timeout_s,
            )
        self._load.wait_ready(LOAD_READY_S)
        self._sampler = self._start.sampler()
        self._sampler.start()
        self._load.go()
        return self._load

    def _fresh(self) -> Workload:
        """The workload with a seed of this window's own: the engines still hold the prompts of an earlier one."""
        return msgspec.structs.replace(self._workload, seed=self._workload.seed + self._start.windows - 1)

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

    def _measure(self, load: Load) -> None:
        engines = self._start.engines
        decode = self._workload.kind == "decode"
        wave = self._workload.concurrency * output_tokens(self._workload)
        attached = self._start.attached()
        engines.count()
        cpu_start, steal_start = self._cpu_times(load), steal_s()
        who_start = contention.read([row.pid for row in cpu_start])
        start = self._clock.now()
        base = self._tokens()[0]
        turnover = turnover_tokens(self._workload)
        enough = 1.03 * self._protocol.measure_turnovers * turnover
        end, curve = start, [(start, float(base))]
        for tokens, completed in self._watch():
            end = self._clock.now()
            curve.append((end, float(tokens)))
            if decode:
                if completed or tokens >= 0.93 * wave:
                    # A completion is noticed up to a tick late: the window ends safely before it.
                    end = max(end - 0.4, start) if completed else end
                    break
            elif tokens - base >= enough and end - start >= self._protocol.measure_min_s:
                wanted, late = self._protocol.precision, end - start >= self._protocol.precise_max_s
                if not wanted or late or half_width_so_far(curve, turnover) <= wanted:
                    break
            if end - start >= self._protocol.window_max_s:
                break
            rate = (tokens - base) / max(end - start, 1e-6)
            self._say(f"measuring {min(1.0, (tokens - base) / enough):.0%}, {rate:,.0f} tokens/s")
        cpu_end, steal_end = self._cpu_times(load), steal_s()
        who_end = contention.read([row.pid for row in cpu_end])
        self.seen.window = (start, end)
        engines.count()
        self.seen.mps, self.seen.foreign = self._start.evidence(attached)
        self.seen.steal_s = max(0.0, steal_end - steal_start)
        self.seen.cpu = contention.by_thread(cpu_use(cpu_start, cpu_end), who_start, who_end)
        ours = {row.pid for row in cpu_start + cpu_end} | self._start.own_pids()
        self.seen.strangers = contention.strangers(who_start, who_end, end - start, self._cores(), ours)

    def _watch(self) -> Iterator[tuple[int, int]]:
        """Tokens and completed requests so far, a few times a second, while everything is alive and moving."""
        last, last_change = -1, self._clock.now()
        while True:
            time.sleep(0.1)
            self._start.engines.check()
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

    def _cores(self) -> set[int]:
        return {core for cores in [*self._spec.engine_cores, self._spec.load_cores] for core in cores}

    def _cpu_times(self, load: Load) -> list[CpuUse]:
        return cpu_times(self._start.engines, load.pids, self._start.servers())
