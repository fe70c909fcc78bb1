"""One trial of fixed steps: the GPU's work alone, on all engines at once. No scheduler, front end or request."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import msgspec

from advisor.core.records import SCHEMA_VERSION, Ended, MpsEvidence, RawStep, RawTrial, Step, TrialSpec
from advisor.shell import mps
from advisor.shell.clock import Clock
from advisor.shell.engines import EngineFailed
from advisor.shell.gpu import Sampler
from advisor.shell.interrupts import Say
from advisor.shell.start import Start
from advisor.shell.trial import ending

PREPARE_TIMEOUT_S = 120.0
# All engines begin a step together, so long after they were asked to.
HEAD_START_S = 0.5
# A step is repeated for so many marks at least, whose distance is that of the slowest engine's batches.
FEWEST_MARKS, MARK_S = 30, 0.05


class StepsTrial:
    """Launches the engines and runs the spec's steps, one after another; `run` returns the raw record.

    It raises only for a machine that is unfit, or Ctrl-C. A step that cannot be prepared is on record as refused, and
    the others are run.
    """

    def __init__(self, start: Start, spec: TrialSpec, created: str, say: Say) -> None:
        self._start, self._spec, self._created, self._say = start, spec, created, say
        self._clock = Clock(start.origin_s)
        self._steps: list[RawStep] = []
        self._window: tuple[float, float] | None = None
        self._evidence: MpsEvidence | None = None
        self._foreign: list[int] = []
        self.interrupted = False  # asked to stop when all was measured; the record is complete all the same

    def run(self) -> RawTrial:
        ended: Ended = "completed"
        detail = ""
        sampler: Sampler | None = None
        try:
            self._clock.stage("start engines")
            self._start.launch(self._say)
            protocol = self._spec.protocol
            assert protocol is not None  # Start has refused a spec without one
            self._clock.stage("steps")
            gpu, origin_s = self._start.place.manifest.gpu, self._start.origin_s
            sampler = Sampler(gpu.uuid, origin_s, protocol.nvml_interval_s, protocol.gpm_interval_s, gpu.gpm)
            sampler.start()
            clients, servers = self._start.attached()
            begin = self._clock.now()
            for index, step in enumerate(self._spec.steps):
                self._say(f"step {index + 1} of {len(self._spec.steps)}")
                self._one(index, step)
            self._window = (begin, self._clock.now())
            clients_end, servers_end = self._start.attached()
            self._foreign = self._start.foreign(servers + servers_end)
            self._evidence = MpsEvidence(
                daemon=self._start.daemon_answers(),
                servers_start=servers,
                servers_end=servers_end,
                clients_start=clients,
                clients_end=clients_end,
            )
        except EngineFailed as failure:
            ended, detail = ending(failure.ended), failure.detail
        except mps.MpsQueryError as failure:
            ended, detail = "crash", f"MPS: {failure}"
        finally:
            samples = None
            if sampler is not None:
                with suppress(Exception):  # whatever goes wrong with it, the engines have to be ended
                    samples = sampler.stop()
            self._clock.close()
        return RawTrial(
            schema_version=SCHEMA_VERSION,
            spec=self._spec,
            created=self._created,
            ended=ended,
            detail=detail,
            gpu_uuid=self._start.place.gpu_uuid,
            window=self._window,
            engines=self._start.engines.close_window() if self._start.launched else [],
            loads=[],
            cpu=[],
            steal_s=None,
            gpu=samples,
            mps=self._evidence,
            foreign_pids=self._foreign,
            teardown=None,
            numerics=None,
            timeline=self._clock.stages,
            started=self._start.began,
            steps=self._steps,
        )

    def _one(self, index: int, step: Step) -> None:
        engines = self._start.engines
        wanted = {key: value for key, value in msgspec.to_builtins(step).items() if value}
        prepared = engines.call("advisor_prepare", wanted, PREPARE_TIMEOUT_S)
        rows = [
            RawStep(
                step=index,
                engine=number,
                tokens=int(one.get("tokens", 0)),
                sequences=int(one.get("sequences", 0)),
                mode=str(one.get("mode", "")),
                graphed=bool(one.get("graphed")),
                detail=str(one.get("why", "")),
                refused=str(one.get("refused", "")),
            )
            for number, one in enumerate(prepared)
        ]
        if not any(row.refused for row in rows):
            # Together each may take as many times as long as there are engines.
            slowest_s = max(float(one.get("step_s", 0.0)) for one in prepared) * len(prepared)
            seconds = max(self._spec.step_s, FEWEST_MARKS * max(slowest_s, MARK_S))
            asked = {"start_s": time.monotonic() + HEAD_START_S, "seconds": seconds}
            done = engines.call("advisor_run", asked, seconds + PREPARE_TIMEOUT_S)
            rows = [self._marked(row, one) for row, one in zip(rows, done, strict=True)]
        self._steps += rows

    def _marked(self, row: RawStep, answer: dict[str, Any]) -> RawStep:
        marks = [(at - self._start.origin_s, int(count)) for at, count in answer.get("marks", [])]
        return msgspec.structs.replace(row, marks=marks, refused=str(answer.get("refused", "")))
