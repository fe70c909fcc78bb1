"""The verdict: every candidate with its gains, why the losers lost, and what to run. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from advisor.core import deployment, slo, tuning
from advisor.core.candidates import Field, left_out, row
from advisor.core.contenders import Contender, contenders, judge_logprobs
from advisor.core.contention import host_speed
from advisor.core.estimate import gain, half_width
from advisor.core.gpu_work import gpu_work
from advisor.core.outline import Outline
from advisor.core.records import (
    ACCIDENTS,
    SCHEMA_VERSION,
    Candidate,
    Figure,
    Manifest,
    Profile,
    Recommendation,
    Report,
    Source,
    Stage,
    Value,
)
from advisor.core.roofline import throughput_bound
from advisor.core.run_cautions import cautions
from advisor.core.tried import Tried, slug
from advisor.core.waterfall import waterfall
from advisor.core.wording import because, name, of_the_gpu, rate, rival_missing, sentence, tied, times, unit

# Candidates within 3 % of the best are as good; the simplest of them is advised.
AS_GOOD = 1.03
# What is known to this (half of an interval, as a share) is known: two that cannot be told apart are as good, and a
# gain that straddles the threshold does not clear it. What is known worse decides nothing.
KNOWN = 0.05
# Two are as good as well if no more than this can be lost with the simpler one (and no more than a gain that is not
# worth its while, --min-gain).
TIE_LOSS = 1.10
# Of how starts of a kind differ, before more of them may be found unnecessary. Starts of one candidate fall into two
# levels on some hosts (docs/measurement.md): two or three of them agree by chance too often.
FEWEST_DOF = 2.5


Row = tuple[Contender, Candidate]


class Verdict(NamedTuple):
    """What is said, which contender it advises, and which are known too roughly where that is why it advises none."""

    recommendation: Recommendation
    choice: Contender | None = None
    rough: Sequence[Contender] = ()


def conclude(manifest: Manifest, tried: Sequence[Tried], outline: Outline, *, created: str, replayed: bool) -> Report:
    """The whole report, from judged trials alone. The manifest's question is today's, by which they are judged."""
    asked = manifest.question
    field, rows, missing = _rows(manifest, tried, outline)
    profile = _profile(field, rows, [one for one in tried if one.spec.kind == "steps"])
    recommendation, choice, _ = _recommend(field, rows, missing, profile)
    chosen = _row_of(rows, choice)
    host = host_speed([one.raw for one in tried if one.spec.kind == "load"])
    return Report(
        schema_version=SCHEMA_VERSION,
        created=created,
        replayed=replayed,
        model=manifest.model,
        gpu=manifest.gpu,
        host=manifest.host,
        software=manifest.software,
        workload=msgspec.structs.replace(asked.workload, concurrency=outline.concurrency),
        protocol=manifest.protocol,
        candidates=[_explain(one, candidate, field, choice, chosen) for one, candidate in rows] + missing,
        profile=profile,
        waterfall=waterfall(field.default, field.tuned, field.all, choice),
        warnings=cautions(field, tried, recommendation.settings),
        recommendation=recommendation,
        timeline=_timeline(tried),
        question=asked,
        core_s=host.core_s if host else None,
        cores_slowed_pct=host.slowed * 100 if host else None,
    )


class Unsure(NamedTuple):
    """What is known too roughly: groups of candidates, the worst first. `needed`: for a verdict, or because starts were
    hardly repeated, and not only for the precision of gains that are quoted.
    """

    groups: Sequence[Sequence[Contender]]
    needed: bool


def unsure(manifest: Manifest, tried: Sequence[Tried], outline: Outline) -> Unsure:
    """What is known too roughly, by the trials so far: for a verdict, or where there is one, for the precision that the
    protocol asks of the gains that are quoted. Nothing where all is known well enough.

    Only candidates that are judged at the full load: another start there says nothing of a smaller one.
    """
    field, rows, missing = _rows(manifest, tried, outline)
    verdict = _recommend(field, rows, missing, Profile())
    found = Unsure([verdict.rough], True) if verdict.rough else _rough_gains(field, verdict.choice)
    groups = [
        [one for one in group if one.point is not None and one.point.concurrency == outline.concurrency]
        for group in found.groups
    ]
    return found._replace(groups=[group for group in groups if group])


def _rough_gains(field: Field, choice: Contender | None) -> Unsure:
    """The two candidates of each quoted gain that is known worse than the protocol asks, or those of a kind that was
    hardly repeated.
    """
    wanted = field.manifest.protocol.gain_precision
    if choice is None or wanted is None:
        return Unsure([], False)
    shared = [one for one in field.all if one.mps and one.ok and one.engines > 1 and field.eligible(one)]
    under_mps = max(shared, key=lambda one: one.rate, default=choice)
    pairs = [
        (choice, field.default),
        (choice, field.tuned),
        (choice, field.best_without),
        (under_mps, field.best_without),
    ]
    known = [
        (half_width(gained), [one, base])
        for one, base in pairs
        if base is not None and one is not base and (gained := field.gain(one, base)) is not None
    ]
    # Few starts may agree by chance.
    for _, pair in known:
        if few := [one for one in pair if one.estimate is not None and one.estimate.between.dof < FEWEST_DOF]:
            return Unsure([few], True)
    rough = [(width, pair) for width, pair in known if width > wanted]
    return Unsure([pair for _, pair in sorted(rough, key=lambda one: -one[0])], False)


def _rows(manifest: Manifest, tried: Sequence[Tried], outline: Outline) -> tuple[Field, list[Row], list[Candidate]]:
    loads = judge_logprobs([one for one in tried if one.spec.kind == "load"])
    checks = [one for one in tried if one.spec.kind == "numerics"]
    single_starts = manifest.protocol.quick
    found = contenders(loads, outline.concurrency, manifest.question.slo, single_starts=single_starts)
    field = Field(manifest, outline, found)
    rows = [(one, row(field, one, checks)) for one in field.all]
    return field, rows, [left_out(manifest, one, checks) for one in outline.left_out]


def _profile(field: Field, rows: Sequence[Row], steps: Sequence[Tried]) -> Profile:
    manifest, outline, single = field.manifest, field.outline, _single(field, rows)
    bound = None
    # Eight-bit products are faster than the ceilings say.
    eight_bits = manifest.model.quantization is not None or manifest.model.kv_cache_dtype.startswith("fp8")
    if manifest.ceilings is not None and not eight_bits:
        workload = msgspec.structs.replace(manifest.question.workload, concurrency=outline.concurrency)
        bound = throughput_bound(manifest.model, workload, manifest.ceilings)
        if any(rate(row) > bound for _, row in rows):
            bound = None  # then the ceilings are not this GPU's

    def figure(value: float | None, unit: str, source: Source) -> Figure | None:
        return None if value is None else Figure(value=value, unit=unit, source=source)

    alone = gpu_work(field, steps, unit(field))
    kernels = alone.decode.kernels if alone.decode else alone.prefill.kernels if alone.prefill else {}
    best = max((one for one in alone.overlaps if one.mps), key=lambda one: one.engines, default=None)
    return Profile(
        ceilings=manifest.ceilings,
        throughput_bound=figure(bound, unit(field), "bound"),
        gpu_idle_pct=figure(single.gpu_idle_pct if single else None, "%", "measured"),
        cpu_stall_pct=figure(single.cpu_stall_pct if single else None, "%", "bound"),
        gpu_throughput=alone.throughput,
        attention=kernels.get("attention"),
        mlp=kernels.get("mlp"),
        decode=alone.decode,
        prefill=alone.prefill,
        overlap=best.overlap if best else None,
        host=best.host if best else None,
        overlaps=list(alone.overlaps),
    )


def _single(field: Field, rows: Sequence[Row]) -> Candidate | None:
    """The best single engine; the default one where none was looked for."""
    return _row_of(rows, field.tuned or field.default)


def _row_of(rows: Sequence[Row], wanted: Contender | None) -> Candidate | None:
    """What the report says of a contender."""
    return next((row for one, row in rows if one is wanted), None)


def _simplicity(field: Field, one: Candidate) -> tuple[bool, int, bool, bool]:
    """Simplest first: without MPS, then fewer engines, then no thread percentage, then nothing set by hand."""
    default = field.manifest.settings
    changed = one.settings is not None and tuning.bare(one.settings) != tuning.bare(default)
    return one.mps, one.engines, one.thread_percentages is not None, changed


def _recommend(field: Field, rows: Sequence[Row], missing: Sequence[Candidate], profile: Profile) -> Verdict:
    manifest = field.manifest
    candidates = [*(candidate for _, candidate in rows), *missing]
    if field.default is None:
        return _inconclusive("the default engine has no valid trial, so there is nothing to compare with")
    if why := _not_comparable(field, candidates):
        return _inconclusive(why)
    threshold = 1.0 + manifest.question.min_gain
    running = [(one, candidate) for one, candidate in rows if one.ok and field.eligible(one)]
    if not running:
        return _no_slo(field, rows)
    # Where nothing without MPS meets the objectives, MPS has no gain to show and none to fall short of.
    alone = field.best_without is None
    allowed = [(one, row) for one, row in running if not one.mps or alone or _clears(field, one, threshold)]
    if not allowed:
        return _inconclusive("nothing without MPS was started often enough to compare MPS with")
    choice, chosen, doubted, ties = _choose(field, allowed, threshold)
    if doubted is not None:
        other, row = doubted
        return _inconclusive(
            f"{name(field, row)} gives {times(_gain_over(other, choice))} {name(field, chosen)}, "
            "too uncertain to say which is faster",
            other,
            choice,
        )
    if failed := _faster_but_alone(field, rows, choice):
        return _inconclusive(failed)
    undecided = [(one, row) for one, row in running if one.mps and not choice.mps and _undecided(field, one, threshold)]
    if undecided:
        rough, worst = max(undecided, key=lambda pair: rate(pair[1]))
        return _inconclusive(
            f"{name(field, worst)} gives {times(worst.gain_vs_best_without_mps)} the best without MPS, "
            f"too uncertain to say whether it reaches {threshold:.2f}×",
            rough,
            field.best_without,
        )
    ok = [candidate for _, candidate in running]
    advised = Recommendation(
        status="recommend",
        engines=chosen.engines,
        mps=chosen.mps,
        thread_percentages=chosen.thread_percentages,
        settings=chosen.settings,
        concurrency=chosen.concurrency,
        gain_vs_default=chosen.gain_vs_default,
        gain_vs_tuned=chosen.gain_vs_tuned,
        gain_vs_best_without_mps=chosen.gain_vs_best_without_mps,
        sentence=sentence(field, chosen, ok, threshold) + rival_missing(field, chosen, candidates),
        because=[
            *because(field, chosen, ok, threshold, _single(field, rows), _row_of(rows, field.best_without)),
            *(tied(field, row, _gain_over(other, choice)) for other, row in ties),
            *of_the_gpu(profile),
        ],
        cost_of_mps=deployment.cost_of_mps(manifest.model, chosen),
        environment=deployment.environment(manifest, chosen),
        commands=deployment.commands(manifest, chosen),
    )
    return Verdict(advised, choice)


class _Choice(NamedTuple):
    """What was chosen, the fastest of which it cannot be told that it is no better, and what is taken for as good."""

    contender: Contender
    candidate: Candidate
    doubted: Row | None
    ties: Sequence[Row]


def _choose(field: Field, allowed: Sequence[Row], threshold: float) -> _Choice:
    """The simplest that nothing less simple beats beyond noise.

    Which candidates there are to choose from was decided by first starts; this is decided by the later ones. Where
    nothing was to be started twice, few things are told apart: what is not seen to be faster is taken for as good.
    """
    first, *others = sorted(allowed, key=lambda row: (_simplicity(field, row[1]), -row[0].rate))
    chosen, doubted = first, []
    for one in others:
        match _compare(_gain_over(one[0], chosen[0]), threshold):
            case "better":
                chosen = one
            case "unclear":
                doubted.append(one)
    left = [one for one in doubted if _compare(_gain_over(one[0], chosen[0]), threshold) == "unclear"]
    ties: list[Row] = []
    if field.manifest.protocol.quick:
        ties = [one for one in left if _gain_over(one[0], chosen[0]).value <= AS_GOOD]
        left = [one for one in left if one not in ties]
    return _Choice(*chosen, max(left, key=lambda one: one[0].rate, default=None), ties)


def _compare(gained: Value, threshold: float) -> Literal["better", "no better", "unclear"]:
    """Whether this is a gain: beyond noise and beyond what is as good."""
    if gained.low is not None and gained.low > 1.0 and gained.value > AS_GOOD:
        return "better"
    if half_width(gained) <= KNOWN or (gained.high or math.inf) <= min(threshold, TIE_LOSS):
        return "no better"
    return "unclear"


def _inconclusive(why: str, *rough: Contender | None) -> Verdict:
    told = Recommendation(status="inconclusive", sentence=f"No verdict: {why}.")
    return Verdict(told, rough=[one for one in rough if one is not None])


def _no_slo(field: Field, rows: Sequence[Row]) -> Verdict:
    """Nothing meets the objectives: name what comes nearest, and by how much it misses."""
    objectives = field.manifest.question.slo
    nearest = [(slo.worst(one.nearest, objectives), one.nearest, row) for one, row in rows if one.nearest]
    if not objectives or not nearest:
        return _inconclusive("no candidate that could be advised has a valid trial")
    (_, objective), point, candidate = min(nearest, key=lambda one: one[0][0])
    told = Recommendation(
        status="no_slo",
        sentence=(
            f"Nothing meets {slo.shown(objectives)}. The nearest is {name(field, candidate)} with {point.concurrency} "
            f"requests in flight: {slo.told(point, objective)}."
        ),
    )
    return Verdict(told)


def _gain_over(one: Contender, other: Contender) -> Value:
    assert one.estimate is not None and other.estimate is not None
    return gain(one.estimate, other.estimate)


def _faster_but_alone(field: Field, rows: Sequence[Row], choice: Contender) -> str:
    """Which candidate was faster on its first start, but did not start again; empty if none."""
    for one, candidate in rows:
        wanted = one.engines > 1 or one is field.tuned or one is field.default
        last = one.attempts[-1]
        if wanted and one.ok and not last.ok and not field.eligible(one) and one.rate > AS_GOOD * choice.rate:
            return (
                f"{name(field, candidate)} was faster than all that can be advised, but its later start failed "
                f"({last.why or last.outcome})"
            )
    return ""


def _not_comparable(field: Field, candidates: Sequence[Candidate]) -> str:
    """Which side of the comparison is missing by accident; empty when both sides were measured or cannot be.

    A verdict for or against MPS needs several engines without it and several engines under it.
    """
    for mps, side in ((False, "without MPS"), (True, "under MPS")):
        several = [one for one in candidates if one.engines > 1 and one.mps == mps and one.thread_percentages is None]
        # The fast protocol tries one number of engines: too little memory for these says nothing of fewer.
        failures = (*ACCIDENTS, "oom") if field.manifest.protocol.quick else ACCIDENTS
        failed = [one for one in several if one.outcome in failures]
        if failed and not any(one.outcome == "ok" for one in several):
            return f"no trial of several engines {side} succeeded ({name(field, failed[0])}: {failed[0].why_not})"
    return ""


def _clears(field: Field, one: Contender, threshold: float) -> bool:
    """Whether MPS brings what is asked over everything without it that may be advised, lower bounds included."""
    gains = [_gain_over(one, rival) for rival in field.without_mps]
    return bool(gains) and all(gained.low is not None and gained.low >= threshold for gained in gains)


def _undecided(field: Field, one: Contender, threshold: float) -> bool:
    """Whether it cannot be told if MPS brings what is asked: it is refuted over nothing without it, and over something
    the interval holds the threshold and is too wide to decide from.
    """
    gains = [_gain_over(one, rival) for rival in field.without_mps]
    short = [gained for gained in gains if gained.low is None or gained.low < threshold]
    refuted = any(
        (gained.high is not None and gained.high < threshold) or half_width(gained) <= KNOWN for gained in short
    )
    return bool(short) and not refuted


def _explain(
    one: Contender, candidate: Candidate, field: Field, choice: Contender | None, chosen: Candidate | None
) -> Candidate:
    """Say why a candidate that worked was not chosen."""
    if candidate.outcome != "ok" or choice is None or chosen is None or one is choice:
        return candidate
    if not one.ok:
        objectives = field.manifest.question.slo
        assert one.nearest is not None
        missed = slo.told(one.nearest, slo.worst(one.nearest, objectives)[1])
        why = f"misses {slo.shown(objectives)} at every load that was measured; at best {missed}"
        return msgspec.structs.replace(candidate, why_not=why)
    ratio = 1 / _gain_over(choice, one).value
    if ratio < 1 / AS_GOOD:
        why = f"{(1 - ratio) * 100:.0f} % slower than what is advised"
    elif one.mps and one.engines == 1:
        why = "shows what MPS itself costs"
    elif len(one.starts) < field.manifest.protocol.starts and one.attempts[-1].ok:
        why = "no faster than others of its kind on its first start by 3 %, or less simple, and so not started again"
    elif len(one.starts) < field.manifest.protocol.starts:
        why = "its later start failed"
    elif not field.eligible(one):
        why = "brought less than 3 % beyond noise over the settings it was tried on"
    elif _simplicity(field, candidate) > _simplicity(field, chosen) and ratio <= AS_GOOD:
        why = "no more than 3 % faster than what is advised, and less simple"
    elif one.mps and not choice.mps:
        why = "its gain over the best without MPS does not clear --min-gain"
    else:
        why = "cannot be told apart from what is advised"
    return msgspec.structs.replace(candidate, why_not=why)


def _timeline(tried: Sequence[Tried]) -> list[Stage]:
    """Every stage of every trial, one after another, in seconds of profile time (pauses between calls left out)."""
    stages, offset = [], 0.0
    for one in tried:
        starts = [stage.start_s for stage in one.raw.timeline if math.isfinite(stage.start_s)]
        ends = [stage.end_s for stage in one.raw.timeline if math.isfinite(stage.end_s)]
        # Windows of one start share a clock: a later one begins where the last one ended, not at zero.
        shift = offset - (min(starts, default=0.0) if one.raw.started is not None else 0.0)
        stages += [
            Stage(name=f"{slug(one.spec)}: {stage.name}", start_s=shift + stage.start_s, end_s=shift + stage.end_s)
            for stage in one.raw.timeline
        ]
        offset = max([offset, *(shift + end for end in ends)])
    return stages
