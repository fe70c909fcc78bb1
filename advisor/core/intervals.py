"""90 % intervals for rates and for ratios of rates. All sums are done on logarithms.

Rates are positive and their errors are relative, so a rate's logarithm is what is taken to be normal: the interval
of a rate is then exp(m ± t·s), and the ratio of two rates is the difference of two means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from advisor.core.records import Figure, Source, Value

CONFIDENCE = 0.90
_NORMAL_95 = 1.6448536269514722  # 95th percentile of the standard normal: half of a two-sided 90 % interval
_SERIES_FROM_DOF = 30.0
_CORRELATION_MIN_VALUES = 6
_CORRELATION_MAX = 0.8


class LogMean(NamedTuple):
    """Mean of logarithms, its standard error, and the degrees of freedom that the error was estimated with."""

    log_mean: float
    log_se: float
    dof: float


@lru_cache(maxsize=1024)
def student_t_90(dof: float) -> float:
    """The t that Student's distribution with `dof` (>= 1, whole or not, or inf) keeps within ±t with 90 %.

    Abramowitz and Stegun, Handbook of Mathematical Functions: from 30 degrees of freedom on the expansion 26.7.5
    around the normal quantile; below, the root of A(t|dof) = 0.9 where, with t = sqrt(dof)·tan(x),
    A = 2·Γ((dof+1)/2) / (sqrt(π)·Γ(dof/2)) · ∫ cos(u)^(dof-1) du from 0 to x. Errors stay below 1e-5.
    Raises ValueError below 1.
    """
    if not dof >= 1.0:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {dof}")
    if dof >= _SERIES_FROM_DOF:
        return _t_by_series(dof)
    low, high = 0.0, math.pi / 2
    for _ in range(36):
        middle = (low + high) / 2
        if _share_within(middle, dof) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return math.sqrt(dof) * math.tan(low)


def _t_by_series(dof: float) -> float:
    z = _NORMAL_95
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / dof**power for power, term in enumerate(terms))


def _share_within(angle: float, dof: float) -> float:
    """A(t|dof) at t = sqrt(dof)·tan(angle), by Simpson's rule: the integrand is smooth and monotonic."""
    steps = 32
    width = angle / steps
    total = sum(
        (1 if i in (0, steps) else 4 if i % 2 else 2) * math.pow(math.cos(i * width), dof - 1.0)
        for i in range(steps + 1)
    )
    scale = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2))
    return scale * total * width / 3


def mean_of_logs(values: Sequence[float]) -> LogMean:
    """Mean of the values' logarithms and its standard error, widened when neighbours are alike.

    s/sqrt(n) holds for independent values. Where the lag-1 autocorrelation r is positive, the error of the mean of
    a first-order autoregressive series is sqrt((1+r)/(1-r)) times that (Bayley and Hammersley 1946, "The effective
    number of independent observations in an autocorrelated time series", in the limit of long series). r is capped
    at 0.8, and left out below 6 values, where its own estimate is mostly noise.
    Raises ValueError for fewer than two values or a value that is not positive.
    """
    n = len(values)
    if n < 2 or min(values) <= 0:
        raise ValueError("an interval needs at least two values, all above zero")
    logs = [math.log(v) for v in values]
    mean = math.fsum(logs) / n
    off = [x - mean for x in logs]
    squares = math.fsum(x * x for x in off)
    error = math.sqrt(squares / (n - 1) / n)
    if n >= _CORRELATION_MIN_VALUES and squares > 0:
        r = math.fsum(a * b for a, b in pairwise(off)) / squares
        r = min(max(r, 0.0), _CORRELATION_MAX)
        error *= math.sqrt((1 + r) / (1 - r))
    return LogMean(mean, error, n - 1)


def value_of(log_mean: float, log_se: float, dof: float, centre: float | None = None) -> Value:
    """The 90 % interval exp(±t·log_se) around `centre`, or around exp(log_mean) when no centre is given."""
    middle = math.exp(log_mean) if centre is None else centre
    factor = math.exp(student_t_90(dof) * log_se)
    return Value(value=middle, low=middle / factor, high=middle * factor)


def figure_of(mean: LogMean, unit: str, source: Source = "measured") -> Figure:
    """The same as a figure of a report."""
    value = value_of(*mean)
    return Figure(value=value.value, unit=unit, source=source, low=value.low, high=value.high)


class Variance(NamedTuple):
    """A squared error and the degrees of freedom that it was estimated with."""

    variance: float
    dof: float


def add(terms: Sequence[Variance]) -> Variance:
    """The sum of independent squared errors. Its degrees of freedom by Welch and Satterthwaite (Satterthwaite 1946;
    Welch 1947): (Σ v)² / Σ (v² / dof). Terms of zero say nothing, unless all are zero. Raises ValueError for no term.
    """
    largest = max(term.variance for term in terms)
    if largest == 0:
        return Variance(0.0, min(term.dof for term in terms))
    # Relative to the largest, so that tiny errors do not underflow when they are squared.
    shares = [Variance(term.variance / largest, term.dof) for term in terms if term.variance > 0]
    total = math.fsum(share.variance for share in shares)
    dof = total**2 / math.fsum(share.variance**2 / share.dof for share in shares)
    return Variance(total * largest, dof)


def log_ratio(a: LogMean, b: LogMean) -> LogMean:
    """Log of the ratio a/b of two independent means: their difference, and the root of the sum of squared errors."""
    error = math.hypot(a.log_se, b.log_se)
    if error == 0:
        return LogMean(a.log_mean - b.log_mean, 0.0, min(a.dof, b.dof))
    # Relative to the larger error, so that tiny errors do not underflow when they are squared.
    larger = max(a.log_se, b.log_se)
    _, dof = add([Variance((one.log_se / larger) ** 2, one.dof) for one in (a, b)])
    return LogMean(a.log_mean - b.log_mean, error, dof)


def ratio(
    log_mean: float, log_se: float, dof: float, base_log_mean: float, base_log_se: float, base_dof: float
) -> Value:
    """How many times the base's rate the first rate is (1.0 = equal), with its 90 % interval (see `log_ratio`)."""
    return value_of(*log_ratio(LogMean(log_mean, log_se, dof), LogMean(base_log_mean, base_log_se, base_dof)))
