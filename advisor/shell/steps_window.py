"""Fixed steps on all engines of a start at once: the GPU's work alone, with no scheduler, front end or request."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import msgspec

from advisor.core.records import RawKernel, RawStep, RawTrace, Step, TrialSpec
from advisor.shell.clock import Clock
from advisor.shell.gpu import Sampler
from advisor.shell.interrupts import Say
from advisor.shell.patience import STEP_S
from advisor.shell.start import Start
from advisor.shell.window import Seen

# All engines begin a step together, so long after they were asked to.
HEAD_START_S = 0.5
# A step is repeated for so many marks at least, which are a batch apart; together each batch takes up to as many times
# as long as there are engines.
FEWEST_MARKS, MARK_S = 26, 0.05


class StepsWindow:
    """`run` the spec's steps once, one after another, and `close` it however that ended.

    A step that cannot be prepared is on record as refused, and the others are run.
    """

    def __init__(self, start: Start, spec: TrialSpec, clock: Clock, say: Say) -> None:
        self._start, self._spec, self._clock, self._say = start, spec, clock, say
        self._sampler: Sampler | None = None
        self.seen = Seen()

    def run(self) -> None:
        """Raises EngineFailed and MpsQueryError; `seen` then holds what there is."""
        self._clock.stage("steps")
        self._sampler = self._start.sampler()
        self._sampler.start()
        attached = self._start.attached()
        begin = self._clock.now()
        for index, step in enumerate(self._spec.steps):
            self._say(f"step {index + 1} of {len(self._spec.steps)}")
            self._one(index, step)
        self.seen.window = (begin, self._clock.now())
        self.seen.mps, self.seen.foreign = self._start.evidence(attached)

    def close(self) -> None:
        """End the sampler; whatever goes wrong with it, engines and daemon have to be ended."""
        if self._sampler is not None:
            with suppress(Exception):
                self.seen.gpu = self._sampler.stop()
        self._clock.close()

    def _one(self, index: int, step: Step) -> None:
        engines = self._start.engines
        wanted = {key: value for key, value in msgspec.to_builtins(step).items() if value}
        prepared = engines.call("advisor_prepare", wanted, STEP_S)
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
            # They prepared it side by side: the least of their times is nearest to what a step takes alone.
            alone_s = min(float(one.get("step_s", 0.0)) for one in prepared)
            seconds = max(self._spec.step_s, FEWEST_MARKS * len(prepared) * max(alone_s, MARK_S))
            asked = {"start_s": time.monotonic() + HEAD_START_S, "seconds": seconds}
            done = engines.call("advisor_run", asked, seconds + STEP_S)
            rows = [self._marked(row, one) for row, one in zip(rows, done, strict=True)]
            if self._spec.traced:
                self._trace(index)
        self.seen.steps += rows

    def _trace(self, index: int) -> None:
        """Trace the step that is prepared, on the first engine while the others rest."""
        self._say(f"step {index + 1} of {len(self._spec.steps)}: tracing its kernels")
        (found,) = self._start.engines.call("advisor_trace", {"repeats": self._spec.traced}, STEP_S, engines=1)
        kernels = [
            RawKernel(name=int(name), start_s=float(at), seconds=float(length), blocks=int(blocks))
            for name, at, length, blocks in found.get("kernels", [])
        ]
        names, refused = [str(name) for name in found.get("names", [])], str(found.get("refused", ""))
        self.seen.traces.append(RawTrace(step=index, engine=0, names=names, kernels=kernels, refused=refused))

    def _marked(self, row: RawStep, answer: dict[str, Any]) -> RawStep:
        marks = [(at - self._start.origin_s, int(count)) for at, count in answer.get("marks", [])]
        return msgspec.structs.replace(row, marks=marks, refused=str(answer.get("refused", "")))
