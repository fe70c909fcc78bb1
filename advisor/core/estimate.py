"""What several starts of the same engines say together: a rate with an interval that a new start would fall into.

Blocks of one window say how steady that start was, not how far the next start would be from it. A start's rate has
both errors: that of its window, which its own blocks tell, and that of starts about their candidate, which is taken
from all candidates of its kind that were started more than once: one candidate's two starts alone would leave one
degree of freedom. What two starts differ by beyond what their windows explain is the second; so a candidate that waits
for the CPU, whose windows are rough, does not make the others look rough as well. Pure.

The best of several candidates was in part lucky, and the start that chose it holds that luck in all of its blocks:
starts differ more than blocks do. So what chose a candidate, its first start, is not part of what is quoted of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from advisor.core.intervals import LogMean, Variance, add, log_ratio, value_of
from advisor.core.records import Measurement, Value

# Assumed, not measured: no two starts repeat better than this, however alike the few that were seen. Keeps intervals
# honest where the estimate below comes out as zero by chance (tests/test_estimate.py).
LEAST_BETWEEN_STARTS = 0.003


# The kind of an estimate of `between` from all candidates of a run.
ALL = "all"


class Assumed(NamedTuple):
    """How far starts differ where the GPU idles for at most `idle_pct`: a kind's name, and the variance."""

    idle_pct: float
    kind: str
    variance: Variance


# Of 25 candidates that were started 2 to 8 times each on hosts C to H: `spread` of those of a kind, computed again from
# the recorded runs by tests/test_estimate.py.
ASSUMED = (
    Assumed(2.0, "a busy GPU", Variance(0.003**2, 12.6)),
    Assumed(10.0, "a GPU that waits a little", Variance(0.045**2, 6.5)),
    Assumed(math.inf, "a GPU that waits", Variance(0.068**2, 12.9)),
)


def assumed(idle_pct: float | None) -> Assumed:
    """What starts of such a candidate are taken to differ by where none was started twice. None: not known."""
    return next(one for one in ASSUMED if (math.inf if idle_pct is None else idle_pct) <= one.idle_pct)


class Estimate(NamedTuple):
    """A candidate's rate over its starts, on logarithms as in `intervals`, with its two errors.

    `window` is this candidate's own, `between` comes from the starts of its `kind` and is one estimate for all of it.
    """

    log_mean: float
    window: Variance
    between: Variance
    kind: str = ""

    @property
    def mean(self) -> LogMean:
        variance, dof = add([self.window, self.between])
        return LogMean(self.log_mean, math.sqrt(variance), dof)

    @property
    def value(self) -> Value:
        """Output tokens per second with their 90 % interval."""
        return value_of(*self.mean)


def _log_rate(start: Measurement) -> float:
    return math.log(start.throughput_tok_per_s.value)


def spread(candidates: Sequence[Sequence[Measurement]]) -> Variance:
    """Variance of a start's log rate about its candidate's, beyond what its window explains.

    By moments, as in random-effects models (DerSimonian and Laird 1986): of each candidate that was started several
    times the variance of its starts less the mean variance of its windows, weighted by how well the windows are known.
    Zero, with degrees of freedom that do not matter, where nothing was started twice.
    """
    weights, excess, squares = [], [], []
    for starts in candidates:
        if len(starts) < 2:
            continue
        logs = [_log_rate(one) for one in starts]
        mean = math.fsum(logs) / len(logs)
        between = math.fsum((one - mean) ** 2 for one in logs) / (len(logs) - 1)
        within = math.fsum(one.log_se**2 for one in starts) / len(starts)
        weights.append((len(logs) - 1) / (within + LEAST_BETWEEN_STARTS**2))
        squares.append(weights[-1] ** 2 / (len(logs) - 1))
        excess.append(between - within)
    if not weights:
        return Variance(0.0, math.inf)
    found = math.fsum(weight * one for weight, one in zip(weights, excess, strict=True)) / math.fsum(weights)
    return Variance(max(found, LEAST_BETWEEN_STARTS**2), math.fsum(weights) ** 2 / math.fsum(squares))


def estimate(starts: Sequence[Measurement], between: Variance, kind: str = "") -> Estimate:
    """A candidate's rate from those of its starts that are quoted (at least one); `between` as `spread` gives it for
    candidates of its kind.
    """
    count = len(starts)
    own = add([Variance(one.log_se**2 / count**2, one.dof) for one in starts])
    mean = math.fsum(_log_rate(one) for one in starts) / count
    return Estimate(mean, own, Variance(between.variance / count, between.dof), kind)


def gain(one: Estimate, base: Estimate) -> Value:
    """How many times the base's rate, with its 90 % interval."""
    return value_of(*log_gain(one, base))


def log_gain(one: Estimate, base: Estimate) -> LogMean:
    """How many times the base's rate, on logarithms.

    Of one kind the errors between starts are one estimate used twice: its degrees of freedom do not add up as those of
    two independent ones do.
    """
    terms = [one.window, base.window]
    if one.kind == base.kind or ALL in (one.kind, base.kind):
        between = one.between.variance + base.between.variance
        terms.append(Variance(between, min(one.between.dof, base.between.dof)))
    else:
        terms += [one.between, base.between]
    variance, dof = add(terms)
    return LogMean(one.log_mean - base.log_mean, math.sqrt(variance), dof)


def ratio_of_windows(one: Measurement, base: Measurement) -> Value:
    """How many times the base's rate, with its 90 % interval, as the blocks of these two windows alone show it."""
    first, second = (LogMean(_log_rate(m), m.log_se, m.dof) for m in (one, base))
    return value_of(*log_ratio(first, second))


def half_width(value: Value) -> float:
    """Half of an interval as a share of its value; infinite where there is no interval."""
    if value.low is None or value.high is None or value.value <= 0:
        return math.inf
    return (value.high - value.low) / 2 / value.value
