"""The verdict: every candidate with its gains, why the losers lost, and what to run. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from advisor.core import deployment, intervals, limits, numerics
from advisor.core.cautions import caution
from advisor.core.records import (
    SCHEMA_VERSION,
    Candidate,
    Caution,
    Manifest,
    Measurement,
    Outcome,
    Recommendation,
    Report,
    Stage,
    Value,
)
from advisor.core.search import LeftOut
from advisor.core.tried import Tried, slug

# Candidates within 3 % of the best are as good; the simplest of them is advised.
AS_GOOD = 1.03
# An interval that straddles the threshold and is wider than this decides nothing.
TOO_WIDE = 0.03


def conclude(
    manifest: Manifest, tried: Sequence[Tried], left_out: Sequence[LeftOut], *, created: str, replayed: bool
) -> Report:
    """The whole report, from judged trials alone."""
    loads = _judge_logprobs(_last_attempts(tried))
    checks = [one for one in tried if one.spec.kind == "numerics"]
    default = _find(loads, engines=1, mps=False)
    best_without = max((one for one in loads if one.ok and not one.spec.mps), key=lambda one: one.rate, default=None)

    candidates = [_candidate(manifest, one, default, best_without, checks) for one in loads]
    candidates += [_left_out(manifest, one, checks) for one in left_out]
    recommendation = _recommend(manifest, candidates, default)
    candidates = [_explain(one, recommendation, candidates) for one in candidates]
    return Report(
        schema_version=SCHEMA_VERSION,
        created=created,
        replayed=replayed,
        model=manifest.model,
        gpu=manifest.gpu,
        host=manifest.host,
        software=manifest.software,
        workload=manifest.question.workload,
        protocol=manifest.protocol,
        candidates=candidates,
        profile=None,
        waterfall=None,
        warnings=_cautions(manifest, tried),
        recommendation=recommendation,
        timeline=_timeline(tried),
        question=manifest.question,
    )


def _last_attempts(tried: Sequence[Tried]) -> list[Tried]:
    """The load trials, without those that were rejected and run once more."""
    loads = [one for one in tried if one.spec.kind == "load"]
    last = {_configuration(one): one for one in loads}
    return [one for one in loads if last[_configuration(one)] is one]


def _configuration(one: Tried) -> tuple[int, bool, int | None]:
    return one.spec.engines, one.spec.mps, one.spec.thread_percentage


def _find(loads: Sequence[Tried], *, engines: int, mps: bool) -> Tried | None:
    for one in loads:
        if one.ok and one.spec.engines == engines and one.spec.mps == mps and one.spec.thread_percentage is None:
            return one
    return None


def _judge_logprobs(loads: Sequence[Tried]) -> list[Tried]:
    """A restricted engine has to give the log-probabilities that unrestricted engines give."""
    judged = []
    for one in loads:
        if one.ok and one.spec.thread_percentage is not None:
            reference = _find(loads, engines=one.spec.engines, mps=True)
            verdict = numerics.judge_logprobs(
                [engine.prompt_logprobs for engine in one.raw.engines],
                [engine.prompt_logprobs for engine in reference.raw.engines] if reference else [],
            )
            if not verdict.ok:
                # Where nothing could be compared, nothing was shown to be wrong.
                outcome: Outcome = "skipped" if verdict.worst_error is None else "wrong_results"
                why = verdict.why or ""
                judged.append(msgspec.structs.replace(one, outcome=outcome, measurement=None, why=why))
                continue
        judged.append(one)
    return judged


def _gain(one: Measurement | None, base: Tried | None) -> Value | None:
    if one is None or base is None or base.measurement is None:
        return None
    if one is base.measurement:
        return Value(value=1.0, low=1.0, high=1.0)
    interval = intervals.ratio(one.log_mean, one.log_se, one.dof, *_log(base.measurement))
    # The central value is the ratio of the quoted rates, so that a reader can check it.
    value = one.throughput_tok_per_s.value / base.measurement.throughput_tok_per_s.value
    if interval.low is None or interval.high is None:
        return Value(value=value)
    return Value(value=value, low=value * interval.low / interval.value, high=value * interval.high / interval.value)


def _log(measurement: Measurement) -> tuple[float, float, int]:
    return measurement.log_mean, measurement.log_se, measurement.dof


def _candidate(
    manifest: Manifest, one: Tried, default: Tried | None, best_without: Tried | None, checks: Sequence[Tried]
) -> Candidate:
    spec, measured = one.spec, one.measurement
    percentage = spec.thread_percentage
    error, sms = _numerics_of(checks, percentage)
    limit = limits.limited_by(one.raw, measured) if measured else None
    return Candidate(
        engines=spec.engines,
        mps=spec.mps,
        thread_percentages=None if percentage is None else [percentage] * spec.engines,
        sms_each=manifest.gpu.sms if percentage is None else sms,
        settings=spec.settings,
        outcome=one.outcome,
        source="measured",
        throughput_tok_per_s=measured.throughput_tok_per_s if measured else None,
        requests_per_s=measured.requests_per_s if measured else None,
        ttft_ms=measured.ttft_ms if measured else None,
        itl_ms=measured.itl_ms if measured else None,
        e2e_ms=measured.e2e_ms if measured else None,
        gain_vs_default=_gain(measured, default),
        gain_vs_best_without_mps=_gain(measured, best_without),
        sm_active_pct=measured.sm_active_pct if measured else None,
        gpu_idle_pct=measured.gpu_idle_pct if measured else None,
        tokens_per_joule=measured.tokens_per_joule if measured else None,
        limited_by=limit.what if limit else None,
        limit_evidence=limit.evidence if limit else None,
        worst_product_error=error,
        why_not=one.why or None,
        trial=slug(spec),
    )


def _numerics_of(checks: Sequence[Tried], percentage: int | None) -> tuple[float | None, int | None]:
    """The worst product error and the SMs that the check saw at a percentage, None where not checked."""
    if percentage is None:
        return None, None
    for check in checks:
        raw = check.raw.numerics
        if raw is not None:
            errors = [r.worst_error for r in raw.results if r.percentage == percentage]
            return _finite(max(errors, default=None)), numerics.sms_at(raw, percentage)
    return None, None


def _finite(error: float | None) -> float | None:
    """An error, or None where the result was not even finite: there is no figure for that."""
    return None if error is None or error >= numerics.NOT_FINITE else error


def _left_out(manifest: Manifest, one: LeftOut, checks: Sequence[Tried]) -> Candidate:
    percentage = one.thread_percentage
    error, sms = _numerics_of(checks, percentage)
    return Candidate(
        engines=one.engines,
        mps=one.mps,
        thread_percentages=None if percentage is None else [percentage] * one.engines,
        sms_each=manifest.gpu.sms if percentage is None else sms,
        settings=None,
        outcome=one.outcome,
        source="measured" if one.outcome == "wrong_results" else None,
        worst_product_error=_finite(error if one.worst_product_error is None else one.worst_product_error),
        why_not=one.why,
    )


def _simplicity(one: Candidate) -> tuple[bool, int, bool]:
    """Simplest first: without MPS, then fewer engines, then no thread percentage."""
    return one.mps, one.engines, one.thread_percentages is not None


def _rate(one: Candidate) -> float:
    return one.throughput_tok_per_s.value if one.throughput_tok_per_s else 0.0


def _recommend(manifest: Manifest, candidates: Sequence[Candidate], default: Tried | None) -> Recommendation:
    if default is None:
        return Recommendation(
            status="inconclusive",
            sentence="No verdict: the default engine has no valid trial, so there is nothing to compare with.",
        )
    threshold = 1.0 + manifest.question.min_gain
    # One engine under MPS shows what MPS costs; it is not a way to run.
    ok = [one for one in candidates if one.outcome == "ok" and not (one.mps and one.engines == 1)]
    if missing := _not_comparable(candidates):
        return Recommendation(status="inconclusive", sentence=f"No verdict: {missing}.")
    allowed = [one for one in ok if not one.mps or _clears(one, threshold)]
    best = max(allowed, key=_rate)
    choice = min((one for one in allowed if _rate(one) * AS_GOOD >= _rate(best)), key=_simplicity)
    undecided = [one for one in ok if one.mps and not choice.mps and _undecided(one, threshold)]
    if undecided:
        worst = max(undecided, key=_rate)
        return Recommendation(
            status="inconclusive",
            sentence=(
                f"No verdict: {_name(worst)} gives {_times(worst.gain_vs_best_without_mps)} the best without MPS, "
                f"too uncertain to say whether it reaches {threshold:.2f}×."
            ),
        )
    return Recommendation(
        status="recommend",
        engines=choice.engines,
        mps=choice.mps,
        thread_percentages=choice.thread_percentages,
        settings=choice.settings,
        gain_vs_default=choice.gain_vs_default,
        gain_vs_tuned=choice.gain_vs_tuned,
        gain_vs_best_without_mps=choice.gain_vs_best_without_mps,
        sentence=_sentence(choice, ok, threshold) + _rival_missing(choice, candidates),
        because=_because(choice, candidates, threshold),
        cost_of_mps=deployment.COST_OF_MPS if choice.mps else [],
        environment=deployment.environment(manifest, choice),
        commands=deployment.commands(manifest, choice),
    )


# Outcomes that say nothing about a candidate: it may work the next time. The others are answers.
_ACCIDENTS = ("crash", "timeout", "invalid", "not_attached")


def _not_comparable(candidates: Sequence[Candidate]) -> str:
    """Which side of the comparison is missing by accident; empty when both sides were measured or cannot be.

    A verdict for or against MPS needs several engines without it and several engines under it.
    """
    for mps, side in ((False, "without MPS"), (True, "under MPS")):
        several = [one for one in candidates if one.engines > 1 and one.mps == mps and one.thread_percentages is None]
        failed = [one for one in several if one.outcome in _ACCIDENTS]
        if failed and not any(one.outcome == "ok" for one in several):
            return f"no trial of several engines {side} succeeded ({_name(failed[0])}: {failed[0].why_not})"
    return ""


def _rival_missing(choice: Candidate, candidates: Sequence[Candidate]) -> str:
    """A note for the sentence when as many engines without MPS could not be measured."""
    for one in candidates:
        same = one.engines == choice.engines and not one.mps and one.outcome in _ACCIDENTS
        if same and choice.mps:
            return f" {_name(one)} could not be measured ({one.outcome.replace('_', ' ')})."
    return ""


def _clears(one: Candidate, threshold: float) -> bool:
    gain = one.gain_vs_best_without_mps
    return gain is not None and gain.low is not None and gain.low >= threshold


def _undecided(one: Candidate, threshold: float) -> bool:
    """Whether a gain straddles the threshold by an interval too wide to decide from."""
    gain = one.gain_vs_best_without_mps
    if gain is None or gain.low is None or gain.high is None:
        return False
    return gain.low < threshold <= gain.high and (gain.high - gain.low) / 2 / gain.value > TOO_WIDE


def _name(one: Candidate) -> str:
    text = f"{one.engines} engine" + ("s" if one.engines > 1 else "")
    if one.mps:
        text += " under MPS"
        if one.thread_percentages:
            text += f" at {one.thread_percentages[0]} % of the threads each"
    elif one.engines > 1:
        text += " without MPS"
    return text


def _times(gain: Value | None) -> str:
    if gain is None:
        return "–"
    if gain.low is None or gain.high is None:
        return f"{gain.value:.2f}×"
    return f"{gain.value:.2f}× ({gain.low:.2f} to {gain.high:.2f})"


def _best_mps(ok: Sequence[Candidate]) -> Candidate | None:
    """The fastest of several engines under MPS; one engine under MPS shows what MPS costs, and is no rival."""
    return max((one for one in ok if one.mps and one.engines > 1), key=_rate, default=None)


def _sentence(choice: Candidate, ok: Sequence[Candidate], threshold: float) -> str:
    if choice.mps:
        share = (
            f"{choice.thread_percentages[0]} % of the threads each"
            if choice.thread_percentages
            else "no thread percentage"
        )
        return (
            f"Run {choice.engines} engine{'s' if choice.engines > 1 else ''} under MPS, {share}: "
            f"{_times(choice.gain_vs_default)} one engine, {_times(choice.gain_vs_best_without_mps)} without MPS."
        )
    rival = _best_mps(ok)
    against = ""
    if rival is not None:
        against = f" MPS brings {_times(rival.gain_vs_best_without_mps)} at best; {threshold:.2f}× is asked."
    if choice.engines == 1:
        return f"Run 1 engine, leave MPS alone.{against}"
    return f"Run {choice.engines} engines without MPS: {_times(choice.gain_vs_default)} one engine.{against}"


def _because(choice: Candidate, candidates: Sequence[Candidate], threshold: float) -> list[str]:
    """Reasons made only of figures that stand in the candidates."""
    reasons = []
    ok = [one for one in candidates if one.outcome == "ok"]
    without = [one for one in ok if not one.mps]
    best_without = max(without, key=_rate)
    rival = _best_mps(ok)
    if choice.mps:
        reasons.append(
            f"{_name(choice)}: {_rate(choice):,.0f} tokens/s; the best without MPS is {_name(best_without)} "
            f"with {_rate(best_without):,.0f}."
        )
        if best_without.engines > 1:
            reasons.append(
                f"Of the gain over one engine, {_times(best_without.gain_vs_default)} needs no MPS, "
                f"only {best_without.engines} engines."
            )
    elif rival is not None:
        gain = rival.gain_vs_best_without_mps
        reached = gain is not None and gain.value >= threshold
        reasons.append(
            f"{_name(rival)} gives {_times(gain)} the best without MPS, {_name(best_without)}"
            + (", and its lower bound stays" if reached else "; that is")
            + f" under {threshold:.2f}×."
        )
    alone = next((one for one in ok if one.mps and one.engines == 1), None)
    if alone is not None and alone.gain_vs_default is not None:
        reasons.append(f"MPS itself, with one engine: {_times(alone.gain_vs_default)} the same engine without it.")
    return reasons


def _explain(one: Candidate, recommendation: Recommendation, candidates: Sequence[Candidate]) -> Candidate:
    """Say why a candidate that worked was not chosen."""
    if one.outcome != "ok" or recommendation.status != "recommend":
        return one
    chosen = next(other for other in candidates if _is_choice(other, recommendation))
    if one is chosen:
        return one
    ratio = _rate(one) / _rate(chosen)
    if ratio < 1 / AS_GOOD:
        why = f"{(1 - ratio) * 100:.0f} % slower than what is advised"
    elif _simplicity(one) > _simplicity(chosen) and ratio <= AS_GOOD:
        why = "no more than 3 % faster than what is advised, and less simple"
    elif one.mps and not chosen.mps:
        why = "its gain over the best without MPS does not clear --min-gain"
    else:
        why = "within 3 % of what is advised"
    return msgspec.structs.replace(one, why_not=why)


def _is_choice(one: Candidate, recommendation: Recommendation) -> bool:
    return (
        one.outcome == "ok"
        and one.engines == recommendation.engines
        and one.mps == recommendation.mps
        and one.thread_percentages == recommendation.thread_percentages
    )


def _cautions(manifest: Manifest, tried: Sequence[Tried]) -> list[Caution]:
    """Every caution once, with the trials it was seen in."""
    seen: dict[tuple[str, str], tuple[Caution, list[str]]] = {}
    for one in tried:
        for told in one.cautions:
            seen.setdefault((told.code, told.remedy), (told, []))[1].append(slug(one.spec))
    cautions = []
    for told, where in seen.values():
        more = f" (and {len(where) - 1} more trials)" if len(where) > 1 else ""
        cautions.append(msgspec.structs.replace(told, text=f"{where[0]}{more}: {told.text}"))
    last = _last_attempts(tried)
    cautions += [
        caution(
            "not_measured",
            f"{slug(one.spec)} could not be measured ({one.outcome.replace('_', ' ')}); the verdict was reached "
            "without it.",
        )
        for one in last
        if one.outcome in ("crash", "timeout", "invalid", "not_attached")
    ]
    cautions += [
        caution("repeated", f"{slug(one.spec)} was run once more: {one.why}")
        for one in tried
        if one.spec.kind == "load" and one not in last
    ]
    if manifest.model.weights == "dummy":
        cautions.append(
            caution(
                "dummy_weights", "Weights are dummies of the right shape: speed is measured, the texts mean nothing."
            )
        )
    return cautions


def _timeline(tried: Sequence[Tried]) -> list[Stage]:
    """Every stage of every trial, one after another, in seconds of profile time (pauses between calls left out)."""
    stages, offset = [], 0.0
    for one in tried:
        ends = [stage.end_s for stage in one.raw.timeline]
        stages += [
            Stage(name=f"{slug(one.spec)}: {stage.name}", start_s=offset + stage.start_s, end_s=offset + stage.end_s)
            for stage in one.raw.timeline
        ]
        offset += max((end for end in ends if math.isfinite(end)), default=0.0)
    return stages
