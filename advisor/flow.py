"""The main job in one page: ask, run, judge, conclude. The same for a live run, a resumed one and a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from advisor.core import search
from advisor.core.errors import NotRecorded
from advisor.core.outline import Outline
from advisor.core.quick import Quick
from advisor.core.recommend import conclude
from advisor.core.records import Manifest, Question, RawTrial, Report, TrialSpec
from advisor.core.tried import Tried, candidate, is_retry, judge, key


class Runner(Protocol):
    """Live or replay: both give raw evidence, nothing more."""

    def run(self, spec: TrialSpec) -> RawTrial: ...

    def recorded(self) -> Iterable[RawTrial]:
        """Every trial that this run holds."""
        ...


def profile(
    manifest: Manifest,
    runner: Runner,
    *,
    created: str,
    replayed: bool,
    on_trial: Callable[[Tried], None] = lambda tried: None,
    finish: Callable[[], None] = lambda: None,
    judged_by: Question | None = None,
) -> Report:
    """Run the trials that the evidence so far asks for, then conclude from all of them.

    Which trials there are is the manifest's question; `judged_by` may ask for another gain or other latencies of them.
    `finish` is called when no more trials come: engines that were kept for another one are then to be ended.
    """
    tried: list[Tried] = []
    story = (Quick if manifest.protocol.quick else search.Search)(manifest).story()
    spec = next(story)
    while True:
        try:
            spec = _next(story, spec, runner, tried, on_trial)
        except StopIteration as end:
            finish()
            complete = [_completed(one, runner) for one in tried] + _further(tried, runner, end.value)
            asked = msgspec.structs.replace(manifest, question=judged_by or manifest.question)
            return conclude(asked, complete, end.value, created=created, replayed=replayed)


def _next(
    story: search.Story, spec: TrialSpec, runner: Runner, tried: list[Tried], on_trial: Callable[[Tried], None]
) -> TrialSpec:
    """Run a trial, tell the story of it, and hear what comes next. Raises StopIteration when nothing does."""
    try:
        result = judge(runner.run(spec))
    except NotRecorded as missing:
        # A run may be older than the rule that tries a failed trial again; then the failure is all there is.
        if tried and is_retry(spec, tried[-1]):
            return story.send(tried[-1])
        # The story knows whether it can do without this one; else it lets the error pass.
        return story.throw(missing)
    tried.append(result)
    on_trial(result)
    return story.send(result)


def _completed(one: Tried, runner: Runner) -> Tried:
    """A trial as it is on record now: how its engines ended may have been added after it was judged."""
    raw = runner.run(one.spec)
    return one if raw is one.raw else judge(raw)


def _further(tried: Sequence[Tried], runner: Runner, outline: Outline) -> list[Tried]:
    """Recorded starts of the candidates that the story did not ask for, because today's rules were sure without them.

    All that was measured counts: leaving it out would choose among the evidence.
    """
    known, candidates = {key(one.spec) for one in tried}, {candidate(one.spec) for one in tried}
    return [
        judge(raw)
        for raw in runner.recorded()
        if raw.spec.workload is not None
        and raw.gpu_uuid == tried[0].raw.gpu_uuid
        and raw.spec.workload.concurrency == outline.concurrency
        and key(raw.spec) not in known
        and candidate(raw.spec) in candidates
    ]
