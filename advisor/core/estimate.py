"""What several starts of the same engines say together: a rate with an interval that a new start would fall into.

Blocks of one window say how steady that start was, not how far the next start would be from it. So the error of a
rate is taken from engines that were started more than once, over all candidates of a run: how well a start repeats
is a property of the machine and the load rather than of a candidate, and one candidate's two starts alone would
leave one degree of freedom. Pure.

The best of several candidates was in part lucky, and the start that chose it holds that luck in all of its blocks:
starts differ more than blocks do. So what chose a candidate, its first start, is not part of what is quoted of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from advisor.core.intervals import LogMean, log_ratio, value_of
from advisor.core.records import Measurement, Value


class Spread(NamedTuple):
    """Variance of a start's mean log rate about its candidate's, and its degrees of freedom (0: never repeated)."""

    variance: float
    dof: int


class Estimate(NamedTuple):
    """A candidate's rate over its starts, on logarithms as in `intervals`. `pooled`: its error is the run's."""

    mean: LogMean
    pooled: bool

    @property
    def value(self) -> Value:
        """Output tokens per second with their 90 % interval."""
        return value_of(*self.mean)


def _log_rate(start: Measurement) -> float:
    return math.log(start.throughput_tok_per_s.value)


def spread(candidates: Sequence[Sequence[Measurement]]) -> Spread:
    """The pooled variance between starts of the same candidate, over all candidates started at least twice."""
    squares, dof = 0.0, 0
    for starts in candidates:
        logs = [_log_rate(one) for one in starts]
        if len(logs) < 2:
            continue
        mean = math.fsum(logs) / len(logs)
        squares += math.fsum((one - mean) ** 2 for one in logs)
        dof += len(logs) - 1
    return Spread(squares / dof if dof else 0.0, dof)


def estimate(starts: Sequence[Measurement], between: Spread) -> Estimate:
    """A candidate's rate from those of its starts that are quoted (at least one), with the error that `between` gives.

    Where no candidate was started twice, or where the windows' own blocks vary more than starts did, the blocks'
    error is taken: a start cannot be known better than its window.
    """
    mean = math.fsum(_log_rate(one) for one in starts) / len(starts)
    within = math.fsum(one.log_se**2 for one in starts) / len(starts)
    pooled = between.dof > 0 and between.variance >= within
    variance = between.variance if pooled else within
    dof = between.dof if pooled else sum(one.dof for one in starts)
    return Estimate(LogMean(mean, math.sqrt(variance / len(starts)), dof), pooled)


def gain(one: Estimate, base: Estimate) -> Value:
    """How many times the base's rate, with its 90 % interval.

    Two errors that both come from the run's pooled variance are one estimate used twice: its degrees of freedom do
    not add up as they do for independent errors (Welch and Satterthwaite, in `intervals.log_ratio`).
    """
    ratio = log_ratio(one.mean, base.mean)
    return value_of(ratio.log_mean, ratio.log_se, one.mean.dof if one.pooled and base.pooled else ratio.dof)


def ratio_of_windows(one: Measurement, base: Measurement) -> Value:
    """How many times the base's rate, with its 90 % interval, as the blocks of these two windows alone show it."""
    first, second = (LogMean(_log_rate(m), m.log_se, m.dof) for m in (one, base))
    return value_of(*log_ratio(first, second))


def half_width(value: Value) -> float:
    """Half of an interval as a share of its value; infinite where there is no interval."""
    if value.low is None or value.high is None or value.value <= 0:
        return math.inf
    return (value.high - value.low) / 2 / value.value
