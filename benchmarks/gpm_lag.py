"""How far GPM's figures lag behind the GPU: a load that is switched on and off, and what was sampled meanwhile.

    python benchmarks/gpm_lag.py [--gpu N] [--seconds 30]

Needs torch and a GPU with GPM. Prints the lag at which the samples fit the switching best, and the correlation there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from advisor.shell.gpu import Nvml, Sampler

PERIOD_S = 2.0
INTERVAL_S = 0.1  # the shortest that NVML's documentation allows

# Prints "begin END" of each stretch of work, on the monotonic clock that processes share.
_SWITCH = f"""
import sys, time, torch
a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
until = time.monotonic() + float(sys.argv[1])
while time.monotonic() < until:
    begin = time.monotonic()
    while time.monotonic() < begin + {PERIOD_S / 2}:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()
    print(begin, time.monotonic(), flush=True)
    time.sleep({PERIOD_S / 2})
"""


def share_on(stretches: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
    """The share of [start_s, end_s) that lies in the stretches of work."""
    inside = sum(max(0.0, min(end_s, right) - max(start_s, left)) for left, right in stretches)
    return inside / (end_s - start_s)


def best_lag_s(
    stretches: Sequence[tuple[float, float]], at_s: Sequence[float], spans_s: Sequence[float], values: Sequence[float]
) -> tuple[float, float]:
    """The lag, in steps of 10 ms up to 1 s, at which samples correlate best with the work, and that correlation.

    A sample taken at `at_s` describes the `span` before it; lagging by d it describes the span before `at_s` - d.
    """

    def correlation(lag: float) -> float:
        on = [share_on(stretches, at - span - lag, at - lag) for at, span in zip(at_s, spans_s, strict=True)]
        mean_on, mean = sum(on) / len(on), sum(values) / len(values)
        covariance = sum((x - mean_on) * (y - mean) for x, y in zip(on, values, strict=True))
        spread = (sum((x - mean_on) ** 2 for x in on) * sum((y - mean) ** 2 for y in values)) ** 0.5
        return covariance / spread if spread else 0.0

    lag = max((step / 100 for step in range(101)), key=correlation)
    return lag, correlation(lag)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu")
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    with Nvml() as nvml:
        gpu = nvml.find(options.gpu)
    origin_s = time.monotonic()
    work = subprocess.Popen(
        [sys.executable, "-c", _SWITCH, str(options.seconds)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu.uuid},
    )  # fmt: skip
    sampler = Sampler(gpu.uuid, origin_s, 1.0, INTERVAL_S, gpu.gpm)
    sampler.start()
    out, _ = work.communicate(timeout=options.seconds + 120)
    seen = sampler.stop()
    rows = [line.split() for line in out.splitlines()]
    stretches = [(float(left) - origin_s, float(right) - origin_s) for left, right in rows]
    first, last = stretches[1][0], stretches[-1][1]
    kept = [index for index, at in enumerate(seen.gpm_at_s) if first + 2 < at < last]
    for name, column in (("graphics active", seen.graphics_active_pct), ("SM active", seen.sm_active_pct)):
        lag, fit = best_lag_s(
            stretches,
            [seen.gpm_at_s[index] for index in kept],
            [seen.gpm_interval_s[index] for index in kept],
            [column[index] for index in kept],
        )
        print(f"{name}: lag {lag:.2f} s (correlation {fit:.3f}, {len(kept)} samples)")


if __name__ == "__main__":
    main()
