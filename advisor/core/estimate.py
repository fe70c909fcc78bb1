"""What several starts of the same engines say together: a rate with an interval that a new start would fall into.

Blocks of one window say how steady that start was, not how far the next start would be from it. So the error of a
rate is taken from engines that were started more than once, over all candidates of a run: how well a start repeats
is a property of the machine and the load rather than of a candidate, and one candidate's two starts alone would
leave one degree of freedom. Pure.

The best of several candidates was in part lucky. What chooses (`choosing_rate`: every other block of the first
start) is therefore never part of what is quoted (`quoted_log`: the blocks between them, and later starts whole).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from advisor.core.intervals import LogMean, student_t_90
from advisor.core.records import Measurement, Value


class Spread(NamedTuple):
    """Variance of a start's mean log rate about its candidate's, and its degrees of freedom (0: never repeated)."""

    variance: float
    dof: int


class Estimate(NamedTuple):
    """A candidate's rate over its `starts`, on logarithms as in `intervals`."""

    mean: LogMean
    starts: int

    @property
    def value(self) -> Value:
        """Output tokens per second with their 90 % interval."""
        return _value(self.mean)


def choosing_rate(measured: Measurement) -> float:
    """Output tokens per second over the 1st, 3rd, 5th … block: what candidates are chosen by."""
    return math.exp(_log_rate(measured.blocks_tok_per_s[::2]))


def quoted_log(measured: Measurement, *, first: bool) -> float:
    """Log rate of a start as it is quoted: of the `first` start only the blocks that chose nothing."""
    return _log_rate(measured.blocks_tok_per_s[1::2] if first else measured.blocks_tok_per_s)


def _log_rate(blocks: Sequence[float]) -> float:
    # Blocks hold equal numbers of tokens, not equal times: their common rate is the harmonic mean.
    return math.log(len(blocks) / math.fsum(1 / rate for rate in blocks))


def spread(candidates: Sequence[Sequence[Measurement]]) -> Spread:
    """The pooled variance between starts of the same candidate, over all candidates started at least twice."""
    squares, dof = 0.0, 0
    for starts in candidates:
        if len(starts) < 2:
            continue
        logs = _logs(starts)
        mean = math.fsum(logs) / len(logs)
        squares += math.fsum((one - mean) ** 2 for one in logs)
        dof += len(logs) - 1
    return Spread(squares / dof if dof else 0.0, dof)


def estimate(starts: Sequence[Measurement], between: Spread) -> Estimate:
    """A candidate's rate from its starts (at least one), with the error that `between` gives.

    Where no candidate was started twice, or where a window's own blocks vary more than starts did, the blocks' error
    is taken: a start cannot be known better than its window.
    """
    logs = _logs(starts)
    within = math.fsum(_within(one, first=index == 0) for index, one in enumerate(starts)) / len(starts)
    variance, dof = between.variance, between.dof
    if not dof or within > variance:
        variance, dof = within, sum(one.dof for one in starts)
    return Estimate(LogMean(math.fsum(logs) / len(logs), math.sqrt(variance / len(starts)), dof), len(starts))


def _logs(starts: Sequence[Measurement]) -> list[float]:
    return [quoted_log(one, first=index == 0) for index, one in enumerate(starts)]


def _within(measured: Measurement, *, first: bool) -> float:
    """Squared error of a start's quoted log rate as its blocks show it; fewer blocks, more error."""
    blocks = len(measured.blocks_tok_per_s)
    quoted = blocks // 2 if first else blocks
    return measured.log_se**2 * blocks / quoted


def gain(one: Estimate, base: Estimate) -> Value:
    """How many times the base's rate, with its 90 % interval.

    The errors of both mostly come from one pooled variance, so that degrees of freedom do not add up as they do for
    independent errors (Welch): the smaller number holds.
    """
    error = math.hypot(one.mean.log_se, base.mean.log_se)
    return _value(LogMean(one.mean.log_mean - base.mean.log_mean, error, min(one.mean.dof, base.mean.dof)))


def _value(mean: LogMean) -> Value:
    middle, factor = math.exp(mean.log_mean), math.exp(student_t_90(mean.dof) * mean.log_se)
    return Value(value=middle, low=middle / factor, high=middle * factor)


def half_width(value: Value) -> float:
    """Half of an interval as a share of its value; infinite where there is no interval."""
    if value.low is None or value.high is None or value.value <= 0:
        return math.inf
    return (value.high - value.low) / 2 / value.value
