"""What several starts of the same engines say together: a rate with an interval that a new start would fall into.

Blocks of one window say how steady that start was, not how far the next start would be from it. So the error of a
rate is taken from engines that were started more than once, over all candidates of a run: how well a start repeats
is a property of the machine and the load rather than of a candidate, and one candidate's two starts alone would
leave one degree of freedom. Pure.

The best of several candidates was in part lucky. Where candidates are started more than once, what chooses
(`choosing_rate`: every other block of the first start) is therefore never part of what is quoted (the blocks between
them, and later starts whole).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from advisor.core.intervals import LogMean, log_ratio, student_t_90, value_of
from advisor.core.records import Measurement, Value


class Start(NamedTuple):
    """One start of a candidate's engines. `chose`: every other block of its window has chosen between candidates."""

    measured: Measurement
    chose: bool


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


def choosing_rate(measured: Measurement) -> float:
    """Output tokens per second over the 1st, 3rd, 5th … block."""
    return _rate(measured.blocks_tok_per_s[::2])


def quoted_rate(start: Start) -> float:
    """Output tokens per second of a start as it is quoted."""
    if not start.chose:
        return start.measured.throughput_tok_per_s.value
    return _rate(start.measured.blocks_tok_per_s[1::2])


def _rate(blocks: Sequence[float]) -> float:
    # Blocks hold equal numbers of tokens, not equal times: their common rate is the harmonic mean.
    return len(blocks) / math.fsum(1 / rate for rate in blocks)


def spread(candidates: Sequence[Sequence[Start]]) -> Spread:
    """The pooled variance between starts of the same candidate, over all candidates started at least twice."""
    squares, dof = 0.0, 0
    for starts in candidates:
        logs = [math.log(quoted_rate(one)) for one in starts]
        if len(logs) < 2:
            continue
        mean = math.fsum(logs) / len(logs)
        squares += math.fsum((one - mean) ** 2 for one in logs)
        dof += len(logs) - 1
    return Spread(squares / dof if dof else 0.0, dof)


def estimate(starts: Sequence[Start], between: Spread) -> Estimate:
    """A candidate's rate from its starts (at least one), with the error that `between` gives.

    Where no candidate was started twice, or where the windows' own blocks vary more than starts did, the blocks'
    error is taken: a start cannot be known better than its window.
    """
    mean = math.fsum(math.log(quoted_rate(one)) for one in starts) / len(starts)
    within = math.fsum(_within(one) for one in starts) / len(starts)
    pooled = between.dof > 0 and between.variance >= within
    variance = between.variance if pooled else within
    dof = between.dof if pooled else sum(one.measured.dof for one in starts)
    return Estimate(LogMean(mean, math.sqrt(variance / len(starts)), dof), pooled)


def _within(start: Start) -> float:
    """Squared error of a start's quoted log rate as its blocks show it; fewer blocks, more error."""
    blocks = len(start.measured.blocks_tok_per_s)
    return start.measured.log_se**2 * (blocks / (blocks // 2) if start.chose else 1)


def gain(one: Estimate, base: Estimate) -> Value:
    """How many times the base's rate, with its 90 % interval.

    Two errors that both come from the run's pooled variance are one estimate used twice: its degrees of freedom do
    not add up as they do for independent errors (Welch and Satterthwaite, in `intervals.log_ratio`).
    """
    ratio = log_ratio(one.mean, base.mean)
    return value_of(ratio.log_mean, ratio.log_se, one.mean.dof if one.pooled and base.pooled else ratio.dof)


def upper_gain(one: Measurement, base: Measurement) -> float:
    """How many times the base's rate at most (90 % interval), by the parts of two first windows that choose."""
    # Every other block: half of them, and so twice the squared error.
    a, b = (LogMean(math.log(choosing_rate(m)), m.log_se * math.sqrt(2), m.dof) for m in (one, base))
    ratio = log_ratio(a, b)
    return math.exp(ratio.log_mean + student_t_90(ratio.dof) * ratio.log_se)


def half_width(value: Value) -> float:
    """Half of an interval as a share of its value; infinite where there is no interval."""
    if value.low is None or value.high is None or value.value <= 0:
        return math.inf
    return (value.high - value.low) / 2 / value.value
