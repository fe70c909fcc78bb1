"""How long the GPU is busy under load, and what it gives in a second in which it is. Pure.

Where the GPU waits for the host, tokens per second follow the host; what it gives in a busy second does so less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from advisor.core.contenders import Contender, kind_of
from advisor.core.estimate import LEAST_BETWEEN_STARTS
from advisor.core.intervals import LogMean
from advisor.core.tried import Tried


class Busy(NamedTuple):
    """The share of a window in which some kernel ran, and tokens per second of that time; on logarithms."""

    share: LogMean
    gives: LogMean


class _Seen(NamedTuple):
    log_share: float
    log_gives: float


def busy(one: Contender, everyone: Sequence[Contender]) -> Busy | None:
    """What the quoted starts of a candidate at full load say together; None where the GPU's idle time is not known of
    all of them, or where a smaller load decides.

    Two or three starts may agree by chance: how far starts are from their candidate's mean is taken from all starts of
    all candidates of its kind.
    """
    if not one.at_full_load:
        return None
    quoted = [_seen(start) for start in one.quoted]
    alike = [[_seen(start) for start in other.starts] for other in everyone if _kind(other) == _kind(one)]
    groups = [[seen for seen in starts if seen is not None] for starts in alike]
    known = [seen for seen in quoted if seen is not None]
    dof = sum(len(starts) - 1 for starts in groups if starts)
    if len(known) < len(quoted) or dof < 1:
        return None

    def mean(what: Callable[[_Seen], float]) -> LogMean:
        logs = [[what(seen) for seen in starts] for starts in groups if len(starts) > 1]
        variance = max(math.fsum(_squares(starts) for starts in logs) / dof, LEAST_BETWEEN_STARTS**2)
        return LogMean(math.fsum(map(what, known)) / len(known), math.sqrt(variance / len(known)), dof)

    return Busy(mean(lambda seen: seen.log_share), mean(lambda seen: seen.log_gives))


def _kind(one: Contender) -> str:
    return kind_of(one.attempts[0].spec)


def _seen(start: Tried) -> _Seen | None:
    measured = start.measurement
    if measured is None or measured.gpu_idle_pct is None or measured.gpu_idle_pct >= 100:
        return None
    log_share = math.log(1 - measured.gpu_idle_pct / 100)
    return _Seen(log_share, math.log(measured.throughput_tok_per_s.value) - log_share)


def _squares(logs: Sequence[float]) -> float:
    mean = math.fsum(logs) / len(logs)
    return math.fsum((one - mean) ** 2 for one in logs)
