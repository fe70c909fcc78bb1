"""Whether the cores of a host keep their speed: a fixed piece of work, again and again, on one core and on all at once.

    python benchmarks/core_flicker.py [--seconds 10]

Run it on an idle machine. It prints, for each phase, how long the work took (percentiles, in ms of CPU time), in
which share of the pieces at least half as long again as the lower quartile, and how long such slow stretches lasted. If
a core that works alone is slow at times, somebody outside this machine takes part of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from statistics import median, quantiles

from advisor.core.contention import SLOWED_RATIO
from advisor.shell.core_probe_worker import work

STEPS = 20_000  # about 4 ms


def worker(core: int, seconds: float) -> None:
    """Print the CPU milliseconds of each piece of work on this core, one a line."""
    os.sched_setaffinity(0, {core})
    taken, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        begin = time.thread_time()
        work(STEPS)
        taken.append((time.thread_time() - begin) * 1000)
    print("\n".join(f"{ms:.3f}" for ms in taken))


def together(cores: Sequence[int], seconds: float) -> list[list[float]]:
    """The milliseconds of each piece on each of these cores, which work at the same time."""
    argv = [sys.executable, __file__, "--seconds", str(seconds), "--core"]
    running = [subprocess.Popen([*argv, str(core)], stdout=subprocess.PIPE, text=True) for core in cores]
    return [[float(line) for line in one.communicate()[0].splitlines()] for one in running]


def told(phase: str, series: Sequence[Sequence[float]], best_ms: float) -> str:
    every = [ms for one in series for ms in one]
    if len(every) < 2:
        return f"{phase}: too little time for two pieces of work"
    low, high = quantiles(every, n=10)[0], quantiles(every, n=10)[-1]
    stretches = [
        sum(ms for _, ms in run)
        for one in series
        for slow, run in groupby([(ms >= SLOWED_RATIO * best_ms, ms) for ms in one], key=lambda piece: piece[0])
        if slow
    ]
    share = sum(ms >= SLOWED_RATIO * best_ms for ms in every) / len(every)
    lasted = f", stretches of {median(stretches):.0f} ms, at most {max(stretches):.0f}" if stretches else ""
    return f"{phase}: {low:.2f} / {median(every):.2f} / {high:.2f} ms (p10/p50/p90), slow {share * 100:.0f} %{lasted}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.core is not None:
        worker(options.core, options.seconds)
        return
    cores = sorted(os.sched_getaffinity(0))
    phases = {f"core {core} alone": together([core], options.seconds) for core in (cores[0], cores[-1])}
    phases["every second core"] = together(cores[::2], options.seconds)
    phases["all cores"] = together(cores, options.seconds)
    every = sorted(ms for series in phases.values() for one in series for ms in one)
    best_ms = every[len(every) // 4] if every else 0.0  # as `contention.host_speed`
    for phase, series in phases.items():
        print(told(phase, series, best_ms))
    for core, one in zip(cores, phases["all cores"], strict=True):
        print(told(f"  core {core}", [one], best_ms))


if __name__ == "__main__":
    main()
