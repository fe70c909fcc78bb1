"""Trials gathered by candidate: its starts at full load, its curve at other loads, and the rate that gives. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from advisor.core import numerics, slo
from advisor.core.estimate import ALL, Estimate, assumed, estimate, spread
from advisor.core.intervals import Variance
from advisor.core.records import CurvePoint, EngineSettings, Measurement, Outcome, Percentiles, TrialSpec, Value
from advisor.core.tried import Tried, candidate, slug


@dataclass(frozen=True)
class Contender:
    """One candidate with all its evidence.

    `shown` is the trial whose occupations stand for it: the quoted start at the load that decides, which is the full
    load, or under latency objectives the one with the highest rate at which every start keeps to them. `estimate` is
    None for a candidate without a valid trial at a load that may decide. `nearest` is the point that comes closest to
    the objectives where none keeps to them.
    """

    attempts: list[Tried]  # at full load, in order, accidents included
    starts: list[Tried]  # those of them that worked
    shown: Tried
    rate: float  # what it is chosen by, tokens/s of its first start; 0.0 if it cannot be chosen
    estimate: Estimate | None
    point: CurvePoint | None = None  # at the load that decides
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
    def quoted(self) -> Sequence[Tried]:
        """The starts at full load that are quoted; what chose or confirmed it is not."""
        return _quoted(self.starts) if self.starts else []

    @property
    def at_full_load(self) -> bool:
        """Whether its figures are those of the full load, and not of a smaller one that keeps to the objectives."""
        return bool(self.quoted) and self.shown is self.quoted[0]

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


def contenders(
    loads: Sequence[Tried], concurrency: int, objectives: Mapping[str, float], *, single_starts: bool = False
) -> list[Contender]:
    """The candidates of these load trials in the order of their first trial. `single_starts`: none was to be started
    twice, so that how far starts differ is assumed.
    """
    groups: dict[str, list[Tried]] = {}
    for one in loads:
        groups.setdefault(candidate(one.spec), []).append(one)
    full = {name: [one for one in group if _load(one) == concurrency] for name, group in groups.items()}
    met = {name: attempts for name, attempts in full.items() if attempts}  # others only while the load was looked for
    working = [[one for one in attempts if one.ok] for attempts in met.values()]
    between = None if single_starts else _between(working)
    return [_contender(attempts, groups[name], concurrency, objectives, between) for name, attempts in met.items()]


class _Between(NamedTuple):
    """How starts of one kind differ: the kind's name, and the variance."""

    kind: str
    variance: Variance


def kind_of(spec: TrialSpec) -> str:
    """What starts differ by depends on whether the GPU or the host sets the pace (docs/measurement.md), which is not
    known beforehand; but engines that take turns on the GPU, engines that share it and one engine alone are more alike
    among themselves.
    """
    if spec.engines == 1:
        return "one engine"
    return f"several engines {'under' if spec.mps else 'without'} MPS"


def _between(candidates: Sequence[Sequence[Tried]]) -> dict[str, _Between]:
    """How starts differ, by kind and for all; where none of a kind was started twice, as for all."""
    kinds: dict[str, list[Sequence[Tried]]] = {}
    for starts in candidates:
        if starts:
            kinds.setdefault(kind_of(starts[0].spec), []).append(starts)
    everyone = _Between(ALL, spread([_measurements(starts) for starts in candidates]))
    found = {ALL: everyone}
    for kind, members in kinds.items():
        repeated = any(len(starts) > 1 for starts in members)
        found[kind] = _Between(kind, spread([_measurements(starts) for starts in members])) if repeated else everyone
    return found


def _contender(
    attempts: list[Tried],
    everything: list[Tried],
    concurrency: int,
    objectives: Mapping[str, float],
    between: Mapping[str, _Between] | None,
) -> Contender:
    starts = [one for one in attempts if one.ok]
    at_load: dict[int, list[Tried]] = {concurrency: starts}
    for one in everything:
        if one.ok and _load(one) != concurrency:
            at_load.setdefault(_load(one), []).append(one)

    measured = {load: group for load, group in at_load.items() if group}
    quoted = {load: _quoted(group) for load, group in measured.items()}
    known = {}
    for load, group in quoted.items():
        seen = _measurements(group)
        if between is None:
            _, kind, variance = assumed(seen[0].gpu_idle_pct)
            known[load] = estimate(seen, variance, kind)
        else:
            mine = between.get(kind_of(attempts[0].spec), between[ALL])
            known[load] = estimate(seen, *_at(load == concurrency, mine, between[ALL]))
    # An objective has to be kept to by every start, also by the first.
    points = {load: _point(load, group, known[load]) for load, group in measured.items()}
    curve = [points[load] for load in sorted(points)] if len(at_load) > 1 else []
    keeping = [load for load in points if slo.meets(points[load], objectives)]
    if not keeping:
        nearest = min(points.values(), key=lambda point: slo.worst(point, objectives)[0], default=None)
        shown = quoted[concurrency][0] if starts else attempts[-1]
        return Contender(attempts, starts, shown, 0.0, None, None, curve, nearest)
    chose = {load: group[0].rate for load, group in measured.items()}
    # Without objectives the full load decides, whatever smaller ones gave.
    load = concurrency if not objectives and starts else max(keeping, key=lambda one: chose[one])
    shown, rate = quoted[load][0], chose[load]
    return Contender(attempts, starts, shown, rate, known[load], points[load], curve)


def _at(full_load: bool, mine: _Between, everyone: _Between) -> tuple[Variance, str]:
    """How starts differ at a load. What keeps the GPU busy at the full one need not do so at a smaller one, which was
    not started again: the larger of both is what is known there.
    """
    if full_load or mine.variance.variance >= everyone.variance.variance:
        return mine.variance, mine.kind
    return everyone.variance, everyone.kind


def _quoted(group: Sequence[Tried]) -> Sequence[Tried]:
    """Those of several starts that are quoted. First starts chose, among them the default engine's: where that was
    unlucky, others look better than they are. So did a start that confirmed a choice, by the protocol of first ones.
    """
    choosing = group[0].spec.protocol
    return [one for one in group if one.spec.protocol != choosing] or group[1:] or group


def _load(one: Tried) -> int:
    return one.spec.workload.concurrency if one.spec.workload else 0


def _measurements(group: Sequence[Tried]) -> list[Measurement]:
    return [one.measurement for one in group if one.measurement is not None]


def _point(load: int, group: Sequence[Tried], known: Estimate) -> CurvePoint:
    """One load of a candidate; of several starts the worst latencies, for each of them has to keep to an objective."""
    seen = _measurements(group)
    return CurvePoint(
        concurrency=load,
        throughput_tok_per_s=known.value,
        ttft_ms=_worst([one.ttft_ms for one in seen]),
        itl_ms=_worst([one.itl_ms for one in seen]),
        e2e_ms=_worst([one.e2e_ms for one in seen]),
        trial=slug(group[0].spec),
    )


def _worst(seen: Sequence[Percentiles | None]) -> Percentiles | None:
    known = [one for one in seen if one is not None]
    if not known or len(known) < len(seen):
        return None
    return Percentiles(
        p50=max(one.p50 for one in known), p95=max(one.p95 for one in known), p99=max(one.p99 for one in known)
    )


def _unrestricted(one: Tried, loads: Sequence[Tried]) -> Tried | None:
    """The same engines without a thread percentage: under MPS, or else without it, which computes the same."""
    for mps in (True, False):
        wanted = candidate(msgspec.structs.replace(one.spec, thread_percentage=None, mps=mps))
        for other in loads:
            if other.ok and candidate(other.spec) == wanted:
                return other
    return None


def judge_logprobs(loads: Sequence[Tried]) -> list[Tried]:
    """A restricted engine has to give the log-probabilities that unrestricted engines with its settings give."""
    judged = []
    for one in loads:
        if one.ok and one.spec.thread_percentage is not None:
            reference = _unrestricted(one, loads)
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
