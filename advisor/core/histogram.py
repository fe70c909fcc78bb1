"""Durations in logarithmic bins: how they are filled, merged and read back.

A bin is 2 % wide, so a percentile read back is within 1 % of the exact one (its bin's geometric centre is at
most a factor of the square root of 1.02 away), and histograms of different engines can be added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from advisor.core.records import LogHistogram

FLOOR_S = 1e-5
RATIO = 1.02
_LOG_RATIO = math.log(RATIO)


def empty() -> LogHistogram:
    """A histogram that holds nothing, with the bins that this program records."""
    return LogHistogram(floor_s=FLOOR_S, ratio=RATIO, counts={})


def add(counts: dict[int, int], seconds: float, n: int = 1) -> None:
    """Count `n` durations of `seconds` in `counts`, whose bins are those of `empty`.

    What is shorter than the floor (10 microseconds) falls into bin 0: chunks that arrive in one read are no
    time apart. Raises ValueError for a negative or infinite duration.
    """
    if not 0 <= seconds < math.inf:
        raise ValueError(f"a duration has to be finite and not negative, not {seconds}")
    index = math.floor(math.log(seconds / FLOOR_S) / _LOG_RATIO) if seconds > FLOOR_S else 0
    counts[index] = counts.get(index, 0) + n


def merge(histograms: Sequence[LogHistogram]) -> LogHistogram:
    """All durations of several histograms in one. Raises ValueError where their bins differ."""
    if not histograms:
        return empty()
    first = histograms[0]
    counts: dict[int, int] = {}
    for histogram in histograms:
        if (histogram.floor_s, histogram.ratio) != (first.floor_s, first.ratio):
            raise ValueError(
                f"histograms with different bins cannot be added: floor {first.floor_s} s and ratio {first.ratio}"
                f" against {histogram.floor_s} s and {histogram.ratio}"
            )
        for index, n in histogram.counts.items():
            counts[index] = counts.get(index, 0) + n
    return LogHistogram(floor_s=first.floor_s, ratio=first.ratio, counts=dict(sorted(counts.items())))


def percentile(histograms: LogHistogram | Sequence[LogHistogram], q: float) -> float | None:
    """The duration in seconds that a share `q` (0 to 1) of all durations does not exceed; None when there are none.

    Nearest rank: the ceil(q * n)-th smallest of n, at least the first, given as the geometric centre of its bin.
    Raises ValueError for a `q` outside 0 to 1 and for histograms with different bins.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q is a share from 0 to 1, not {q}")
    whole = histograms if isinstance(histograms, LogHistogram) else merge(histograms)
    rank = max(1, math.ceil(q * sum(whole.counts.values())))
    seen = 0
    for index, n in sorted(whole.counts.items()):
        seen += n
        if seen >= rank:
            return float(whole.floor_s * whole.ratio ** (index + 0.5))
    return None
