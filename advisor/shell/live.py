"""The Runner that measures on this machine, and everything that has to be true before it may."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from advisor.core import damage
from advisor.core.errors import Unfit
from advisor.core.records import RawTrial, Teardown, TrialSpec
from advisor.core.starts import same_start
from advisor.core.tried import candidate, key, slug
from advisor.shell import mps
from advisor.shell.clock import now
from advisor.shell.gpu import Nvml
from advisor.shell.interrupts import Say, stop, uninterrupted, whole
from advisor.shell.lock import GpuLock
from advisor.shell.numerics_trial import numerics_trial
from advisor.shell.place import Place
from advisor.shell.processes import child_environment
from advisor.shell.start import Start
from advisor.shell.store import RunFolder
from advisor.shell.trial import EngineTrial
from advisor.shell.warm import Warm, python_of


class Live:
    """Measures each spec once; what the run folder already holds is not measured again.

    Starting engines takes nearly all of the time. So they are kept after a trial, and serve the next one when that
    asks for exactly the same engines; otherwise they are ended first. Nothing else may run on the GPU beside them.
    """

    def __init__(self, place: Place, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._place, self._folder, self._say = place, folder, say
        self._recorded = folder.recorded()
        self._lock = GpuLock(place.gpu_uuid)
        self._nvml = Nvml()
        self._start: Start | None = None
        self._last: tuple[Path, RawTrial] | None = None  # the last trial of this start that is on record
        self._warm: Warm | None = None
        self._forks = True  # whether engines may be forked: until that is to blame for a failure
        self._suspect = ""  # the candidate whose forked engines did not come up

    def __enter__(self) -> Self:
        self._lock.__enter__()
        try:
            self._nvml.__enter__()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        finally:
            with uninterrupted(self._say):
                self._cool()
                self._nvml.__exit__(kind, error, trace)
                self._lock.__exit__(kind, error, trace)
                shutil.rmtree(self._place.scratch, ignore_errors=True)

    def run(self, spec: TrialSpec) -> RawTrial:
        """The recorded trial, or a fresh one, recorded before it is returned."""
        if found := self._recorded.get(key(spec)):
            if found.gpu_uuid != self._place.gpu_uuid:
                raise Unfit(
                    f"trial “{slug(spec)}” was recorded on another GPU ({found.gpu_uuid}); choose another --out"
                )
            return found

        def say(text: str) -> None:
            self._say(f"{slug(spec)}: {text}")

        if self._start is not None and not same_start(self._start.spec, spec):
            self.finish()
        if spec.kind == "numerics":
            self._numerics(spec, say)
        else:
            self._engines(spec, say)
        return self._recorded[key(spec)]

    def recorded(self) -> Iterable[RawTrial]:
        """What the run folder holds, from before and from now."""
        return self._recorded.values()

    def finish(self) -> None:
        """End the engines that are kept, if any, and put on record how that went.

        Raises Unfit when something could not be ended, KeyboardInterrupt when somebody asked to stop meanwhile.
        """
        with uninterrupted(self._say) as interrupted:
            start, last = self._start, self._last
            self._start = self._last = None
            if start is not None:
                ended = start.end(self._say)
                if last is not None:
                    self._recorded[key(last[1].spec)] = raw = damage.kept(ended.complete(last[1]))
                    self._folder.complete(last[0], raw)
                _refuse_leftovers(ended.teardown, slug(start.spec if last is None else last[1].spec))
        if interrupted.asked:
            stop()

    def _engines(self, spec: TrialSpec, say: Say) -> None:
        try:
            if self._start is None:
                self._start = Start(self._place, self._nvml, spec, self._forked_from(spec, say))
            trial = EngineTrial(self._start, spec, now(), say)
            raw = damage.kept(trial.run())
            # What is on disk has to be known as this start's last trial, for its end is written there.
            with whole():
                path = self._folder.append(raw)
                self._recorded[key(spec)] = raw
                self._last = path, raw
        except BaseException:
            self.finish()
            raise
        if raw.ended != "completed" or trial.interrupted:
            self.finish()
        self._learn(raw)
        if trial.interrupted:
            stop()

    def _learn(self, raw: RawTrial) -> None:
        """Whether forking is to blame where engines do not come up: if the same ones, started, do."""
        up = bool(raw.engines) and all(one.ready_s is not None for one in raw.engines)
        forked = any(one.forked for one in raw.engines)
        same = self._suspect == candidate(raw.spec)
        if same and up and not forked:
            self._cool()
        self._suspect = candidate(raw.spec) if forked and not up and raw.ended in ("crash", "timeout") else ""

    def _forked_from(self, spec: TrialSpec, say: Say) -> Warm | None:
        """What engines are forked from; None where they have to be started."""
        if not self._forks or candidate(spec) == self._suspect:
            return None
        if self._warm is None:
            say("importing vLLM")
            self._warm = _warm(self._place)
            self._place.note([self._warm.pid] if self._warm is not None else [])
        if self._warm is None or not self._warm.ready():
            self._cool()
        return self._warm

    def _cool(self) -> None:
        warm, self._warm, self._forks = self._warm, None, False
        if warm is not None:
            warm.close()

    def _numerics(self, spec: TrialSpec, say: Say) -> None:
        raw, interrupted = numerics_trial(self._place, self._nvml, spec, say)
        raw = damage.kept(raw)
        self._folder.append(raw)
        self._recorded[key(spec)] = raw
        if raw.teardown is not None:
            _refuse_leftovers(raw.teardown, slug(spec))
        if interrupted:
            stop()


def _warm(place: Place) -> Warm | None:
    python = python_of(place.vllm_command)
    if python is None:
        return None
    environment = child_environment({"CUDA_VISIBLE_DEVICES": place.gpu_uuid})
    return Warm(place.vllm_command, python, environment, place.scratch / "warm.log")


def _refuse_leftovers(left: Teardown, trial: str) -> None:
    if left.left_pids or left.daemon_left:
        what = f"PID {', '.join(map(str, left.left_pids))}" if left.left_pids else "the MPS daemon"
        raise Unfit(f"{what} could not be ended after trial “{trial}”; end it, then go on with --resume")


def refuse_unfit(control: Path | None, others: Sequence[mps.ForeignDaemon]) -> None:
    """Refuse a machine whose MPS is missing or in someone else's hands."""
    if control is None:
        raise Unfit(
            "nvidia-cuda-mps-control is not on PATH; install the NVIDIA driver's MPS programs, or see --replay auto"
        )
    if others:
        first = others[0]
        where = f" in {first.pipe_directory}" if first.pipe_directory else ""
        raise Unfit(
            f"an MPS daemon of {first.user} already runs{where} (PID {first.pid}); clients of two daemons only take "
            "turns, so nothing measured would be true: quit it first"
        )
