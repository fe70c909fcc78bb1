"""One trial of engines on this machine: a window against the engines of a start, and its raw record."""

from __future__ import annotations

import time

from advisor.core.records import SCHEMA_VERSION, Ended, RawTrial, TrialSpec
from advisor.shell import mps
from advisor.shell.clock import Clock
from advisor.shell.engines import EngineFailed
from advisor.shell.interrupts import Say, uninterrupted
from advisor.shell.load import LoadFailed
from advisor.shell.patience import BLAME_S
from advisor.shell.start import Start
from advisor.shell.steps_window import StepsWindow
from advisor.shell.window import LoadWindow


class EngineTrial:
    """Runs one spec once, and launches the engines where that was not done yet.

    `run` returns the raw record; it raises only for a machine that is unfit, or Ctrl-C. How the engines ended is not
    in the record: they may be wanted for another trial. A trial that did not complete leaves them unfit for one.
    """

    def __init__(self, start: Start, spec: TrialSpec, created: str, say: Say) -> None:
        self._start, self._spec, self._created, self._say = start, spec, created, say
        self._clock = Clock(start.origin_s)
        window_of = StepsWindow if spec.kind == "steps" else LoadWindow
        self._window = window_of(start, spec, self._clock, say)
        self._ended: Ended = "completed"
        self._detail = ""
        self.interrupted = False  # asked to stop when all was measured; the record is complete all the same

    def run(self) -> RawTrial:
        try:
            if not self._start.launched:
                self._clock.stage("start engines")
                self._start.launch(self._say)
            self._window.run()
        except EngineFailed as failure:
            self._fail(failure.ended, failure.detail)
        except LoadFailed as failure:
            self._fail(*self._blame(failure))
        except mps.MpsQueryError as failure:
            self._fail("crash", f"MPS: {failure}")
        finally:
            with uninterrupted(self._say) as interrupted:
                self._window.close()
            self.interrupted = interrupted.asked
        return self._record()

    def _blame(self, failure: LoadFailed) -> tuple[str, str]:
        """Requests that fail are mostly an engine that died: give that a moment to show, for it is the cause."""
        deadline = time.monotonic() + BLAME_S
        while time.monotonic() < deadline:
            try:
                self._start.engines.check()
            except EngineFailed as cause:
                return cause.ended, cause.detail
            time.sleep(0.1)
        return "crash", str(failure)

    def _fail(self, ended: str, detail: str) -> None:
        match ended:
            case "oom" | "crash" | "timeout" | "not_attached":
                self._ended = ended
            case _:
                self._ended = "crash"
        self._detail = detail

    def _record(self) -> RawTrial:
        seen = self._window.seen
        return RawTrial(
            schema_version=SCHEMA_VERSION,
            spec=self._spec,
            created=self._created,
            ended=self._ended,
            detail=self._detail,
            gpu_uuid=self._start.place.gpu_uuid,
            window=seen.window,
            engines=self._start.engines.close_window() if self._start.launched else [],
            loads=seen.loads,
            cpu=seen.cpu,
            steal_s=seen.steal_s,
            strangers=seen.strangers,
            core_speeds=seen.core_speeds,
            gpu=seen.gpu,
            mps=seen.mps,
            foreign_pids=seen.foreign,
            teardown=None,
            numerics=None,
            timeline=self._clock.stages,
            started=self._start.began,
            steps=seen.steps,
            traces=seen.traces,
        )
