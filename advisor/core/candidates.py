"""What the report says of every candidate, in the field of all of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.core import limits, numerics, tuning
from advisor.core.contenders import Contender
from advisor.core.estimate import gain
from advisor.core.outline import LeftOut, Outline
from advisor.core.records import Candidate, EngineSettings, Manifest, StepShares, Value
from advisor.core.stall import cpu_stall_pct
from advisor.core.tried import Tried, slug


def _quoted_rate(one: Contender) -> float:
    return one.value.value if one.value else 0.0


class Field:
    """All contenders, and those that the others are compared with: the default engine, the tuned one where one was
    looked for, and the fastest of all that need no MPS, by what is quoted of it: over a slower one MPS would be
    credited with what needs none. None where there is no valid trial of it.
    """

    def __init__(self, manifest: Manifest, outline: Outline, found: Sequence[Contender]) -> None:
        self.manifest, self.outline, self.all = manifest, outline, list(found)
        self.default = self._single(manifest.settings)
        self.tuned = self._single(outline.tuned) if manifest.protocol.tune else None
        self.without_mps = [one for one in self.all if one.ok and not one.mps and self.eligible(one)]
        self.best_without = max(self.without_mps, key=_quoted_rate, default=None)

    def _single(self, settings: EngineSettings) -> Contender | None:
        """One engine without MPS with these settings, if a trial of it is valid."""
        wanted = tuning.bare(settings)
        for one in self.all:
            if one.engines == 1 and not one.mps and one.starts and one.settings and tuning.bare(one.settings) == wanted:
                return one
        return None

    def eligible(self, one: Contender) -> bool:
        """Whether it may be advised. What was not started again lost on its first start: a second look at that start
        alone must not let it win. One engine under MPS only shows what MPS costs; settings that were tried and not
        kept are no way to run.
        """
        if len(one.starts) < self.manifest.protocol.starts:
            return False
        if one.engines > 1:
            return True
        kept = self.tuned or self.default
        return not one.mps and (one is kept or one is self.default)

    @staticmethod
    def gain(one: Contender, base: Contender | None) -> Value | None:
        """How many times the base's rate; None where one of them has no rate that decides."""
        if one.estimate is None or base is None or base.estimate is None:
            return None
        return Value(value=1.0, low=1.0, high=1.0) if one is base else gain(one.estimate, base.estimate)


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


def row(field: Field, one: Contender, checks: Sequence[Tried]) -> Candidate:
    shown = one.shown.measurement
    error, sms = _numerics_of(checks, one.percentage)
    limit = limits.limited_by(one.shown.raw, shown) if shown else None
    return Candidate(
        engines=one.engines,
        mps=one.mps,
        thread_percentages=None if one.percentage is None else [one.percentage] * one.engines,
        sms_each=field.manifest.gpu.sms if one.percentage is None else sms,
        settings=one.settings,
        outcome=one.outcome,
        source="measured",
        throughput_tok_per_s=one.value,
        requests_per_s=shown.requests_per_s if shown else None,
        ttft_ms=one.point.ttft_ms if one.point else shown.ttft_ms if shown else None,
        itl_ms=one.point.itl_ms if one.point else shown.itl_ms if shown else None,
        e2e_ms=one.point.e2e_ms if one.point else shown.e2e_ms if shown else None,
        gain_vs_default=field.gain(one, field.default),
        gain_vs_tuned=field.gain(one, field.tuned),
        gain_vs_best_without_mps=field.gain(one, field.best_without),
        sm_active_pct=shown.sm_active_pct if shown else None,
        gpu_idle_pct=shown.gpu_idle_pct if shown else None,
        cpu_stall_pct=cpu_stall_pct(one.shown.raw, shown) if shown else None,
        tokens_per_joule=shown.tokens_per_joule if shown else None,
        limited_by=limit.what if limit else None,
        limit_evidence=limit.evidence if limit else None,
        steps=_steps(one) if shown else None,
        starts=len(one.starts) or None,
        curve=one.curve,
        worst_product_error=error,
        why_not=one.why or None,
        trial=slug(one.shown.spec),
        concurrency=one.shown.spec.workload.concurrency if one.shown.spec.workload else None,
    )


def _steps(one: Contender) -> StepShares | None:
    seen = limits.step_shares(one.shown.raw)
    return seen and StepShares(graphed=seen.graphed, ungraphed=seen.ungraphed, mean_tokens=seen.mean_tokens)


def left_out(manifest: Manifest, one: LeftOut, checks: Sequence[Tried]) -> Candidate:
    percentage = one.thread_percentage
    error, sms = _numerics_of(checks, percentage)
    return Candidate(
        engines=one.engines,
        mps=one.mps,
        thread_percentages=None if percentage is None else [percentage] * one.engines,
        sms_each=manifest.gpu.sms if percentage is None else sms,
        settings=one.settings,
        outcome=one.outcome,
        source="measured" if one.outcome == "wrong_results" else None,
        worst_product_error=_finite(error if one.worst_product_error is None else one.worst_product_error),
        why_not=one.why,
    )
