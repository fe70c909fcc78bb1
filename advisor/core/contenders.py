"""Trials gathered by candidate: its starts at full load, its curve at other loads, and the rate that gives. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from advisor.core import numerics, slo
from advisor.core.estimate import Estimate, Start, estimate, spread
from advisor.core.records import CurvePoint, EngineSettings, Outcome, Value
from advisor.core.tried import Tried, candidate, slug


@dataclass(frozen=True)
class Contender:
    """One candidate with all its evidence.

    `shown` is the trial whose latencies and occupations stand for it: the first start at the load that decides, which
    is the full load, or under latency objectives the one with the highest rate that meets them. `estimate` is None
    for a candidate without a valid trial at a load that may decide. `nearest` is the point that comes closest to the
    objectives where none meets them.
    """

    attempts: list[Tried]  # at full load, in order, accidents included
    starts: list[Tried]  # those of them that count
    shown: Tried
    rate: float  # what it is chosen by, tokens/s; 0.0 if it cannot be chosen
    estimate: Estimate | None
    curve: list[CurvePoint] = field(default_factory=list)
    nearest: CurvePoint | None = None

    @property
    def engines(self) -> int:
        return self.shown.spec.engines

    @property
    def mps(self) -> bool:
        return self.shown.spec.mps

    @property
    def percentage(self) -> int | None:
        return self.shown.spec.thread_percentage

    @property
    def settings(self) -> EngineSettings | None:
        return self.shown.spec.settings

    @property
    def ok(self) -> bool:
        return self.estimate is not None

    @property
    def outcome(self) -> Outcome:
        return self.shown.outcome

    @property
    def why(self) -> str:
        return self.shown.why

    @property
    def value(self) -> Value | None:
        """Output tokens per second at the load that decides; at full load where none may."""
        if self.estimate is not None:
            return self.estimate.value
        return self.shown.measurement.throughput_tok_per_s if self.shown.measurement else None


def contenders(loads: Sequence[Tried], concurrency: int, objectives: Mapping[str, float]) -> list[Contender]:
    """The candidates of these load trials in the order of their first trial at full load."""
    groups: dict[str, list[Tried]] = {}
    for one in loads:
        groups.setdefault(candidate(one.spec), []).append(one)
    full = {name: [one for one in group if _load(one) == concurrency] for name, group in groups.items()}
    between = spread([_starts([one for one in group if one.ok]) for group in full.values()])
    found = []
    for name, attempts in full.items():
        if not attempts:
            continue  # only met while the load was being looked for
        others = [one for one in groups[name] if one.ok and _load(one) != concurrency]
        starts = [one for one in attempts if one.ok]
        loads_of_it = [group for group in (starts, *([one] for one in others)) if group]
        points = [(group, _point(group, estimate(_starts(group), between))) for group in loads_of_it]
        allowed = [(group, point) for group, point in points if slo.meets(point, objectives)]
        curve = sorted((point for _, point in points), key=lambda point: point.concurrency) if others else []
        if not allowed:
            nearest = min((p for _, p in points), key=lambda p: slo.worst(p, objectives)[0]) if points else None
            shown = (starts or attempts[-1:])[0]
            found.append(Contender(attempts, starts, shown, 0.0, None, curve, nearest))
            continue
        # Without objectives the full load decides, whatever smaller ones gave.
        group = allowed[0][0] if not objectives else max(allowed, key=lambda one: one[0][0].rate)[0]
        found.append(Contender(attempts, starts, group[0], group[0].rate, estimate(_starts(group), between), curve))
    return found


def _load(one: Tried) -> int:
    return one.spec.workload.concurrency if one.spec.workload else 0


def _starts(group: Sequence[Tried]) -> list[Start]:
    return [Start(one.measurement, one.chooses) for one in group if one.measurement is not None]


def _point(group: Sequence[Tried], known: Estimate) -> CurvePoint:
    first = group[0].measurement
    assert first is not None
    return CurvePoint(
        concurrency=_load(group[0]),
        throughput_tok_per_s=known.value,
        ttft_ms=first.ttft_ms,
        itl_ms=first.itl_ms,
        e2e_ms=first.e2e_ms,
        trial=slug(group[0].spec),
    )


def judge_logprobs(loads: Sequence[Tried]) -> list[Tried]:
    """A restricted engine has to give the log-probabilities that unrestricted engines with its settings give."""
    judged = []
    for one in loads:
        if one.ok and one.spec.thread_percentage is not None:
            unrestricted = candidate(msgspec.structs.replace(one.spec, thread_percentage=None))
            reference = next((other for other in loads if other.ok and candidate(other.spec) == unrestricted), None)
            verdict = numerics.judge_logprobs(
                [engine.prompt_logprobs for engine in one.raw.engines],
                [engine.prompt_logprobs for engine in reference.raw.engines] if reference else [],
            )
            if not verdict.ok:
                # Where nothing could be compared, nothing was shown to be wrong.
                outcome: Outcome = "skipped" if verdict.worst_error is None else "wrong_results"
                judged.append(msgspec.structs.replace(one, outcome=outcome, measurement=None, why=verdict.why or ""))
                continue
        judged.append(one)
    return judged
