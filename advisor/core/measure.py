"""One load trial's raw evidence as numbers: rates with their interval, latencies, occupation of GPU and CPU.

Nothing is judged here: `validity.judge` decides first whether a trial may count.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from advisor.core.histogram import percentile
from advisor.core.intervals import mean_of_logs, student_t_90, value_of
from advisor.core.records import LogHistogram, Measurement, Percentiles, RawLoad, RawTrial
from advisor.core.workload import turnover_tokens

BLOCKS_MIN = 3
BLOCKS_MAX = 12
BLOCK_MIN_S = 1.0
_DECODE_BLOCKS = 8
_EDGE_S = 1e-6  # times that differ by less are the same time: sums of bin widths are not exact
_EDGE_SHARE = 1e-6  # counts that differ by less of a turnover are the same count

Role = Literal["api_server", "engine_core", "load", "advisor", "mps_server"]


def measure(raw: RawTrial) -> Measurement:
    """What a trial of kind "load" says about its window. Depends on differences of times only.

    Raises ValueError for a trial without a window or a workload, or with a block in which nothing arrived;
    `validity.judge` reports all of these as faults.
    """
    if raw.window is None or raw.spec.workload is None:
        raise ValueError("only a load trial that reached its window can be measured")
    start, end = raw.window
    length_s = end - start
    tokens = tokens_between(raw.loads, start, end)
    # Rates are those of whole turnovers: what is left of a swing at the window's ends would tilt its mean.
    edges = block_edges(raw)
    first, last = edges[0], edges[-1]
    rate = tokens_between(raw.loads, first, last) / (last - first)
    blocks = rates_between(raw.loads, edges)
    mean = mean_of_logs(blocks)
    power_w = _power_w(raw)
    active_pct = _graphics_active_pct(raw)
    return Measurement(
        throughput_tok_per_s=value_of(*mean, centre=rate),
        requests_per_s=completions_between(raw.loads, first, last) / (last - first),
        blocks_tok_per_s=blocks,
        log_mean=mean.log_mean,
        log_se=mean.log_se,
        dof=len(blocks) - 1,
        turnovers=tokens / turnover_tokens(raw.spec.workload),
        window_s=length_s,
        ttft_ms=_percentiles_ms([load.ttft for load in raw.loads]),
        itl_ms=_percentiles_ms([load.itl for load in raw.loads]),
        e2e_ms=_percentiles_ms([load.e2e for load in raw.loads]),
        sm_active_pct=_sm_active_pct(raw),
        gpu_idle_pct=None if active_pct is None else min(max(100.0 - active_pct, 0.0), 100.0),
        # Both over the whole window. The GPU's own energy counter is read at the trial's ends, not at the window's.
        tokens_per_joule=tokens / (power_w * length_s) if power_w else None,
        power_w=power_w,
        load_cpu_pct=cpu_pct(raw, "load"),
        engine_core_cpu_pct=main_thread_pct(raw, "engine_core"),
        api_server_cpu_pct=cpu_pct(raw, "api_server"),
    )


# ---------------------------------------------------------------- events in bins


def _sum_between(start_s: float, bin_s: float, counts: Sequence[float], low_s: float, high_s: float) -> float:
    """Events in [low_s, high_s). A bin that lies partly inside counts by the part that does."""
    first = max(0, math.floor((low_s - start_s) / bin_s))
    last = min(len(counts), math.ceil((high_s - start_s) / bin_s))
    total = []
    for index in range(first, last):
        left = start_s + index * bin_s
        inside = min(high_s, left + bin_s) - max(low_s, left)
        if inside > 0:
            total.append(counts[index] * (inside / bin_s))
    return math.fsum(total)


def tokens_between(loads: Sequence[RawLoad], low_s: float, high_s: float) -> float:
    """Output tokens that arrived in [low_s, high_s), over all the loads given; partial bins by their part."""
    return math.fsum(_sum_between(load.bins_start_s, load.bin_s, load.tokens, low_s, high_s) for load in loads)


def completions_between(loads: Sequence[RawLoad], low_s: float, high_s: float) -> float:
    """Requests that were answered in full in [low_s, high_s); partial bins by their part."""
    return math.fsum(_sum_between(load.bins_start_s, load.bin_s, load.completions, low_s, high_s) for load in loads)


# ---------------------------------------------------------------- blocks


def arrival_curve(loads: Sequence[RawLoad], start_s: float, end_s: float) -> list[tuple[float, float]]:
    """Output tokens that arrived since `start_s`, as corners (time, tokens) of a line that ends at `end_s`.

    Within a bin tokens are taken to arrive evenly. The line never falls, and is exactly level where nothing arrives.
    """
    steps: list[tuple[float, int, float]] = [(end_s, -1, 0.0)]
    for number, load in enumerate(loads):
        lefts = [load.bins_start_s + index * load.bin_s for index in range(len(load.tokens) + 1)]
        for (left, right), count in zip(pairwise(lefts), load.tokens, strict=True):
            if right > start_s and left < end_s:
                steps.append((max(left, start_s), number, count / load.bin_s))
        if start_s < lefts[-1] < end_s:
            steps.append((lefts[-1], number, 0.0))
    curve, rates = [(start_s, 0.0)], dict.fromkeys(range(len(loads)), 0.0)
    for at, number, rate in sorted(steps):
        before, tokens = curve[-1]
        if at > before:
            # Summed afresh: a running sum of rates would not come back to exactly zero.
            curve.append((at, tokens + math.fsum(rates.values()) * (at - before)))
        rates[number] = rate
    return curve


def block_edges(raw: RawTrial) -> list[float]:
    """Where the window is cut into blocks, in seconds: n+1 times for n blocks. Raises ValueError without a window.

    A block is a whole number of turnovers by count: it ends when so many tokens have arrived, not when so much time
    has passed. Requests of one length that wait for each other fall into step, and an engine then swings between
    prefill and decode once per turnover; a block of whole turnovers holds whole swings, however long each one takes.
    Tokens beyond whole blocks are left out, half of them at each end. A first block that began with the window would
    begin wherever the swing was: in a stretch of prefill, where no later block ends, and the rate would miss it or
    count it twice. 3 to 12 blocks, no more than the window has seconds. Steady decode replaces nothing: there the
    window is cut into equal times, as is a window that does not hold 3 such blocks.
    """
    if raw.window is None or raw.spec.workload is None:
        raise ValueError("a trial that never reached its window has no blocks")
    start, end = raw.window
    turnover = turnover_tokens(raw.spec.workload)
    curve = arrival_curve(raw.loads, start, end)
    total, seconds = curve[-1][1], math.floor((end - start) / BLOCK_MIN_S + _EDGE_S)
    turnovers = math.floor(total / turnover + _EDGE_SHARE)
    each = max(1, math.ceil(turnovers / max(1, min(BLOCKS_MAX, seconds))))
    count = turnovers // each
    if raw.spec.workload.kind == "decode" or count < BLOCKS_MIN:
        count = min(max(seconds, BLOCKS_MIN), _DECODE_BLOCKS)
        return [start + (end - start) * index / count for index in range(count)] + [end]
    block, slack = each * turnover, _EDGE_SHARE * turnover
    first = max(0.0, total - count * block) / 2
    levels = [first + block * index for index in range(count + 1)]
    # The middle of a stretch without tokens, should an edge fall on one.
    return [(_reached(curve, level - slack) + _reached(curve, level + slack)) / 2 for level in levels]


def _reached(curve: Sequence[tuple[float, float]], level: float) -> float:
    """When the curve first holds `level` tokens; its end where it never does."""
    corner = bisect_left(curve, level, key=lambda point: point[1])
    if corner in (0, len(curve)):
        return curve[min(corner, len(curve) - 1)][0]
    (left, low), (right, high) = curve[corner - 1], curve[corner]
    return min(right, left + (right - left) * (level - low) / (high - low))


def block_rates(raw: RawTrial) -> list[float]:
    """Mean output tokens per second in each block of the window, in order. Raises ValueError without a window."""
    return rates_between(raw.loads, block_edges(raw))


def rates_between(loads: Sequence[RawLoad], edges: Sequence[float]) -> list[float]:
    """Mean output tokens per second from each of the ascending edges, in seconds, to the next."""
    return [tokens_between(loads, low, high) / (high - low) for low, high in pairwise(edges)]


def half_width_so_far(curve: Sequence[tuple[float, float]], turnover: float) -> float:
    """Half the 90 % interval of a window's rate, as a share of it, while the window still runs.

    `curve` holds (seconds, tokens so far), ascending. Blocks are single turnovers; infinite for under 3 of them or
    with one in which nothing arrived.
    """
    first = curve[0][1] if curve else 0.0
    rising = [(at, tokens - first) for at, tokens in curve]
    blocks = math.floor(rising[-1][1] / turnover + _EDGE_SHARE) if rising else 0
    if blocks < BLOCKS_MIN:
        return math.inf
    edges = [_reached(rising, turnover * number) for number in range(blocks + 1)]
    spans = [right - left for left, right in pairwise(edges)]
    if min(spans) <= 0:
        return math.inf
    mean = mean_of_logs([turnover / span for span in spans])
    return math.expm1(student_t_90(mean.dof) * mean.log_se)


# ---------------------------------------------------------------- latencies


def _percentiles_ms(histograms: list[LogHistogram]) -> Percentiles | None:
    p50, p95, p99 = (percentile(histograms, q) for q in (0.50, 0.95, 0.99))
    if p50 is None or p95 is None or p99 is None:
        return None
    return Percentiles(p50=p50 * 1000, p95=p95 * 1000, p99=p99 * 1000)


# ---------------------------------------------------------------- GPU and CPU


def _gpm_mean_pct(raw: RawTrial, values: Sequence[float]) -> float | None:
    """Mean of a GPM column over the rows that lie wholly inside the window, weighted by what each row covers."""
    if raw.gpu is None or raw.window is None:
        return None
    start, end = raw.window
    rows = [
        (value, interval)
        for at, interval, value in zip(raw.gpu.gpm_at_s, raw.gpu.gpm_interval_s, values, strict=True)
        if at - interval >= start - _EDGE_S and at <= end + _EDGE_S and interval > 0
    ]
    if not rows:
        return None
    return math.fsum(value * interval for value, interval in rows) / math.fsum(interval for _, interval in rows)


def _sm_active_pct(raw: RawTrial) -> float | None:
    return None if raw.gpu is None else _gpm_mean_pct(raw, raw.gpu.sm_active_pct)


def _graphics_active_pct(raw: RawTrial) -> float | None:
    return None if raw.gpu is None else _gpm_mean_pct(raw, raw.gpu.graphics_active_pct)


def _power_w(raw: RawTrial) -> float | None:
    if raw.gpu is None or raw.window is None:
        return None
    start, end = raw.window
    samples = [
        power
        for at, power in zip(raw.gpu.at_s, raw.gpu.power_w, strict=True)
        if power is not None and start <= at <= end
    ]
    return math.fsum(samples) / len(samples) if samples else None


def load_s_per_piece(raw: RawTrial) -> float | None:
    """CPU seconds of the load generators for each streamed piece that they received in the window.

    They do the same work in every start of a candidate, on cores of their own: what it costs them says how fast the
    host's cores were meanwhile. Not to be compared between candidates: a slower stream wakes them more often for less.
    """
    seconds = [use.cpu_s for use in raw.cpu if use.role == "load"]
    tokens, pieces = sum(load.output_tokens for load in raw.loads), sum(load.chunks for load in raw.loads)
    if raw.window is None or not seconds or not tokens or not pieces:
        return None
    received = tokens_between(raw.loads, *raw.window) * pieces / tokens
    return math.fsum(seconds) / received if received else None


def cpu_pct(raw: RawTrial, role: Role) -> float | None:
    """CPU time of the busiest process of a role over the window, in percent of one core; None if none was seen."""
    return _busiest_pct(raw, [use.cpu_s for use in raw.cpu if use.role == role])


def main_thread_pct(raw: RawTrial, role: Role) -> float | None:
    """CPU time of the busiest main thread of a role over the window, in percent of one core."""
    seen = [use.main_thread_s for use in raw.cpu if use.role == role]
    return _busiest_pct(raw, [seconds for seconds in seen if seconds is not None])


def _busiest_pct(raw: RawTrial, seconds: Sequence[float]) -> float | None:
    if raw.window is None or not seconds:
        return None
    return max(seconds) / (raw.window[1] - raw.window[0]) * 100
