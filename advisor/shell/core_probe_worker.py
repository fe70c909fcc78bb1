"""The work by which cores are compared. A program: core numbers as arguments, one line "core seconds" for each.

The standard library only, so that it starts fast and nothing installed changes it. The parent's side is `core_probe`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable

STEPS = 100_000  # of the loop in `work`: about 20 ms on a server core of 2024
REPEATS = 3  # the best counts: a first one may meet a core that is still asleep
_TABLE = 4096


def work(steps: int) -> int:
    """Integer arithmetic and a dictionary, the same every time; the result keeps any of it from being left out."""
    table: dict[int, int] = {}
    state = 1
    for _ in range(steps):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        slot = state % _TABLE
        table[slot] = table.get(slot, 0) + 1
    return state + len(table)


def main(cores: Iterable[int]) -> None:
    """Do the work on every core that this process may be bound to."""
    for core in cores:
        try:
            os.sched_setaffinity(0, {core})
        except OSError:
            continue
        sys.stdout.write(f"{core} {min(_timed() for _ in range(REPEATS)):.6f}\n")
        sys.stdout.flush()


def _timed() -> float:
    begin_s = time.thread_time()
    work(STEPS)
    return time.thread_time() - begin_s


if __name__ == "__main__":
    main(map(int, sys.argv[1:]))
