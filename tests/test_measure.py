"""What a trial's raw evidence says, as numbers."""

import itertools
import math
import random
from itertools import pairwise

import msgspec
import pytest
import raw
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.core.intervals import ratio
from advisor.core.measure import (
    arrival_curve,
    block_edges,
    block_rates,
    half_width_so_far,
    measure,
    tokens_between,
)
from advisor.core.records import RawTrial, Workload

TRIAL = raw.trial()
SERVE = raw.WORKLOAD
TURNOVER = SERVE.concurrency * SERVE.osl
PREFILL = Workload(kind="prefill", isl=1024, osl=128, concurrency=256)
DECODE = Workload(kind="decode", isl=1024, osl=128, concurrency=256)
few = settings(max_examples=25, deadline=None)
some = settings(max_examples=60, deadline=None)


def rescaled(trial, factor):
    """The same trial with `factor` times as many tokens in every bin."""
    return raw.changed(
        trial, "loads", lambda loads: [raw.changed(x, "tokens", [n * factor for n in x.tokens]) for x in loads]
    )


def steady(tokens_per_bin, bins, window, bin_s=0.1):
    """A one-engine trial with hand-written bins from second 60 on."""
    load = msgspec.structs.replace(
        raw.trial(1, False).loads[0],
        bin_s=bin_s,
        tokens=[tokens_per_bin] * bins,
        first_tokens=[0] * bins,
        completions=[0] * bins,
    )
    return raw.trial(1, False, loads=[load], window=window)


def test_the_rate_is_that_of_whole_turnovers_between_the_first_and_the_last_block_edge():
    first, *_, last = block_edges(TRIAL)
    tokens = tokens_between(TRIAL.loads, first, last)
    assert tokens == pytest.approx(7 * TURNOVER)
    rate = measure(TRIAL).throughput_tok_per_s.value
    assert rate == pytest.approx(tokens / (last - first))
    start, end = TRIAL.window
    assert rate == pytest.approx(tokens_between(TRIAL.loads, start, end) / (end - start), rel=0.005)


def test_the_rate_of_a_window_of_under_three_turnovers_is_the_windows_mean():
    start, end = 64.0, 68.0
    trial = raw.changed(TRIAL, "window", (start, end))
    tokens = sum(load.tokens[i] for load in trial.loads for i in range(40, 80))
    assert tokens < 3 * TURNOVER
    assert measure(trial).throughput_tok_per_s.value == pytest.approx(tokens / 4.0)


def test_a_bin_that_lies_half_inside_the_window_counts_half():
    assert measure(steady(100.0, 200, (64.05, 76.05))).throughput_tok_per_s.value == pytest.approx(1000.0)
    spike = raw.changed(steady(100.0, 200, (64.05, 76.05)), "loads.0.tokens.40", 1300.0)
    assert measure(spike).throughput_tok_per_s.value == pytest.approx(1000.0 + 0.5 * 1200.0 / 12.0)


def test_tokens_outside_the_window_do_not_count():
    spike = raw.changed(TRIAL, "loads.0.tokens.3", 1e9)
    spike = raw.changed(spike, f"loads.0.tokens.{len(TRIAL.loads[0].tokens) - 1}", 1e9)
    assert measure(spike) == measure(TRIAL)


def test_a_span_that_the_bins_do_not_reach_holds_nothing_beyond_them():
    loads = steady(100.0, 200, (64.0, 76.0)).loads
    assert tokens_between(loads, 0.0, 1000.0) == pytest.approx(20000.0)
    assert tokens_between(loads, 0.0, 60.0) == 0.0
    assert tokens_between(loads, 80.0, 90.0) == 0.0


@few
@given(st.floats(min_value=0.5, max_value=4.0))
def test_in_steady_decode_the_rate_scales_with_the_tokens_and_its_relative_interval_stays(factor):
    trial = raw.trial(workload=DECODE)
    same_but_scaled(measure(trial), measure(rescaled(trial, factor)), factor)
    assert measure(rescaled(trial, factor)).turnovers == pytest.approx(factor * measure(trial).turnovers)


@few
@given(st.integers(min_value=2, max_value=9))
def test_longer_answers_in_the_same_time_scale_the_rate_and_leave_turnovers_and_relative_interval(factor):
    longer = raw.changed(rescaled(TRIAL, factor), "spec.workload.osl", lambda osl: osl * factor)
    same_but_scaled(measure(TRIAL), measure(longer), factor)
    assert measure(longer).turnovers == pytest.approx(measure(TRIAL).turnovers)
    assert block_edges(longer) == pytest.approx(block_edges(TRIAL))


def same_but_scaled(before, after, factor):
    for field in ("value", "low", "high"):
        assert getattr(after.throughput_tok_per_s, field) == pytest.approx(
            factor * getattr(before.throughput_tok_per_s, field)
        )
    assert after.log_se == pytest.approx(before.log_se)


@few
@given(st.floats(min_value=0.5, max_value=9.0))
def test_more_tokens_are_more_turnovers_of_the_same_engine_and_scale_the_rate_all_but_exactly(factor):
    before, after = measure(TRIAL), measure(rescaled(TRIAL, factor))
    assert after.turnovers == pytest.approx(factor * before.turnovers)
    # Blocks are cut elsewhere: other tokens are left out at the window's ends.
    assert after.throughput_tok_per_s.value == pytest.approx(factor * before.throughput_tok_per_s.value, rel=0.01)
    assert after.throughput_tok_per_s.low < factor * before.throughput_tok_per_s.high
    assert after.throughput_tok_per_s.high > factor * before.throughput_tok_per_s.low


@few
@given(st.floats(min_value=0.0, max_value=1e5))
def test_shifting_all_times_changes_nothing(by_s):
    before, after = measure(TRIAL), measure(raw.shifted(TRIAL, by_s))
    assert after.blocks_tok_per_s == pytest.approx(before.blocks_tok_per_s)
    assert after.throughput_tok_per_s.value == pytest.approx(before.throughput_tok_per_s.value)
    for name in ("log_mean", "log_se", "turnovers", "requests_per_s", "window_s", "sm_active_pct", "gpu_idle_pct"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-6), name
    assert (after.dof, after.ttft_ms, after.itl_ms, after.e2e_ms) == (
        before.dof,
        before.ttft_ms,
        before.itl_ms,
        before.e2e_ms,
    )


@few
@given(st.integers(min_value=0, max_value=1), st.integers(min_value=0, max_value=999), st.integers(-500, 500))
def test_changing_the_tokens_of_any_bin_between_the_first_and_the_last_block_edge_changes_the_result(engine, at, more):
    first, *_, last = block_edges(TRIAL)
    inside = range(math.ceil((first - raw.READY_S) / 0.1), math.floor((last - raw.READY_S) / 0.1))
    more = more or 1
    path = f"loads.{engine}.tokens.{inside[at % len(inside)]}"
    before, after = measure(TRIAL), measure(raw.changed(TRIAL, path, lambda tokens: tokens + more))
    change = after.throughput_tok_per_s.value - before.throughput_tok_per_s.value
    assert change == pytest.approx(more / (last - first), rel=0.1)
    assert after.blocks_tok_per_s != before.blocks_tok_per_s


@few
@given(st.integers(min_value=1, max_value=1000))
def test_less_noise_gives_a_narrower_interval(seed):
    quiet = measure(raw.trial(noise=0.002, seed=seed)).throughput_tok_per_s
    loud = measure(raw.trial(noise=0.2, seed=seed)).throughput_tok_per_s
    assert quiet.high / quiet.low < loud.high / loud.low


@few
@given(st.integers(min_value=1, max_value=1000), st.floats(min_value=0.001, max_value=0.1))
def test_the_gain_of_a_trial_over_itself_is_one(seed, noise):
    mean = measure(raw.trial(noise=noise, seed=seed))
    gain = ratio(mean.log_mean, mean.log_se, mean.dof, mean.log_mean, mean.log_se, mean.dof)
    assert gain.low <= gain.value == 1.0 <= gain.high


def test_the_quoted_value_lies_in_the_middle_of_its_interval():
    rate = measure(raw.trial(noise=0.1)).throughput_tok_per_s
    assert rate.low < rate.value < rate.high
    assert rate.high / rate.value == pytest.approx(rate.value / rate.low)


def test_nine_of_ten_windows_of_one_steady_engine_hold_its_true_rate_in_their_intervals():
    rates = [measure(raw.trial(rate=20000.0, noise=0.02, seed=seed)).throughput_tok_per_s for seed in range(200)]
    assert 0.82 <= sum(rate.low <= 20000.0 <= rate.high for rate in rates) / len(rates) <= 0.97


# ---------------------------------------------------------------- blocks


def counted(bins, window, turnover, offsets_s=(0.0,), bin_s=0.1):
    """A trial with the bins given, one list for each engine, from second 60 + offset on; so many tokens a turnover."""
    base = raw.trial(len(bins))
    loads = [
        msgspec.structs.replace(
            load,
            bins_start_s=60.0 + offset,
            bin_s=bin_s,
            tokens=[float(n) for n in tokens],
            first_tokens=[0] * len(tokens),
            completions=[0] * len(tokens),
        )
        for load, tokens, offset in zip(base.loads, bins, offsets_s, strict=True)
    ]
    trial = msgspec.structs.replace(base, loads=loads, window=window)
    return raw.changed(trial, "spec.workload", Workload(kind="serve", isl=1, osl=turnover, concurrency=1))


@some
@given(st.floats(min_value=0.0, max_value=raw.SWING_S))
def test_an_engine_that_swings_once_per_turnover_is_measured_as_well_as_a_steady_one(phase_s):
    rate = TURNOVER / raw.SWING_S
    measured = measure(raw.swinging(phase_s))
    # Only where the window starts and ends in mid-prefill is it not known where the swing began.
    assert measured.throughput_tok_per_s.value == pytest.approx(rate, rel=0.02)
    assert measured.throughput_tok_per_s.low > 0.95 * rate


def test_blocks_end_when_a_turnover_has_arrived_and_what_is_left_over_is_left_out_at_both_ends():
    trial = counted([[100] * 125], (60.0, 72.5), 1000)
    assert block_edges(trial) == pytest.approx([60.25 + i for i in range(13)])
    thirteen = counted([[100] * 139], (60.0, 73.9), 1000)
    assert block_edges(thirteen) == pytest.approx([60.95 + 2 * i for i in range(7)])  # at most 12 blocks


@pytest.mark.parametrize("turnovers", [3, 5, 12])
def test_a_window_of_exactly_so_many_turnovers_has_so_many_blocks_and_they_fill_it(turnovers):
    trial = counted([[7] * 10 * turnovers], (60.0, 60.0 + turnovers), 70)
    for by_s in (0.0, 0.1, 12345.678):
        edges = block_edges(raw.shifted(trial, by_s))
        assert edges == pytest.approx([60.0 + by_s + i for i in range(turnovers + 1)], abs=1e-4)


def test_an_edge_between_two_bursts_lies_in_the_middle_between_them():
    trial = counted([([100] * 10 + [0] * 20) * 5], (60.0, 75.0), 1000)
    # The last edge is that of what the window holds: one second of tokens and two without.
    assert block_edges(trial) == pytest.approx([60.0, 62.0, 65.0, 68.0, 71.0, 74.0], abs=1e-4)


@pytest.mark.parametrize(("length_s", "tokens"), [(3.5, 500), (4.5, 500), (2.0, 3000), (8.0, 290), (8.0, 0)])
def test_a_window_that_holds_no_three_blocks_is_cut_into_equal_times(length_s, tokens):
    trial = counted([[tokens / 10 / length_s] * 100], (60.0, 60.0 + length_s), 100)
    widths = [high - low for low, high in pairwise(block_edges(trial))]
    assert len(widths) == min(max(3, int(length_s)), 8)
    assert widths == pytest.approx([length_s / len(widths)] * len(widths))


def scattered(chance, shortest_s):
    """A trial of 1 to 4 engines whose bins start anywhere, and hold anything, with stretches of nothing."""
    engines = chance.randint(1, 4)
    busy = [chance.choice([0.0, 0.3, 1.0]) for _ in range(20)]
    bins = [
        [chance.randint(1, 300) if chance.random() < busy[i // 10] else 0 for i in range(200)] for _ in range(engines)
    ]
    offsets = [chance.choice([0.0, round(chance.uniform(-2, 2), 1), chance.uniform(-2, 2)]) for _ in bins]
    start = chance.choice([60.0, 61.7, chance.uniform(59, 62)])
    length = chance.choice([round(chance.uniform(shortest_s, 16), 1), chance.uniform(shortest_s, 16)])
    return counted(bins, (start, start + length), chance.randint(100, 9000), offsets)


@few
@given(st.integers())
def test_the_arrival_curve_never_falls_and_counts_what_arrived_up_to_each_of_its_corners(seed):
    trial = scattered(random.Random(seed), 1.0)
    start, end = trial.window
    curve = arrival_curve(trial.loads, start, end)
    assert (curve[0], curve[-1][0]) == ((start, 0.0), end)
    for (before, fewer), (at, tokens) in pairwise(curve):
        assert before < at
        assert fewer <= tokens == pytest.approx(tokens_between(trial.loads, start, at), abs=1e-6)
        if tokens_between(trial.loads, before + 1e-9, at - 1e-9) == 0 and at - before > 1e-6:
            assert tokens == fewer


@some
@given(st.integers())
def test_block_edges_ascend_within_the_window_and_make_three_to_twelve_blocks(seed):
    trial = scattered(random.Random(seed), 0.5)
    start, end = trial.window
    edges = block_edges(trial)
    assert start <= edges[0]
    assert edges[-1] <= end
    assert all(low < high for low, high in pairwise(edges))
    assert 3 <= len(edges) - 1 <= min(12, max(3, math.floor(end - start + 1e-6)))


@some
@given(st.integers())
def test_blocks_hold_one_and_the_same_number_of_turnovers_and_leave_out_less_than_one_block(seed):
    trial = scattered(random.Random(seed), 5.0)
    start, end = trial.window
    turnover, total = trial.spec.workload.osl, tokens_between(trial.loads, start, end)
    if total < 3 * turnover:
        return
    edges = block_edges(trial)
    held = [tokens_between(trial.loads, low, high) / turnover for low, high in pairwise(edges)]
    assert held == pytest.approx([round(held[0])] * len(held), abs=1e-4)
    before, after = tokens_between(trial.loads, start, edges[0]), tokens_between(trial.loads, edges[-1], end)
    assert before == pytest.approx(after, abs=1e-4 * turnover)
    assert before + after < (held[0] + 1e-3) * turnover
    # Blocks of equal counts: their rates' harmonic mean is the rate over all of them.
    rates = block_rates(trial)
    rate = (edges[-1] - edges[0]) / (sum(held) * turnover)
    assert math.fsum(1 / each for each in rates) / len(rates) == pytest.approx(rate, rel=1e-3)


@some
@given(st.integers(), st.floats(min_value=0.0, max_value=1e5))
def test_block_edges_follow_the_clock_and_not_the_order_of_the_engines(seed, by_s):
    trial = scattered(random.Random(seed), 1.0)
    edges = block_edges(trial)
    assert block_edges(raw.shifted(trial, by_s)) == pytest.approx([at + by_s for at in edges], rel=0, abs=1e-3)
    assert block_edges(raw.changed(trial, "loads", lambda loads: loads[::-1])) == pytest.approx(edges)


@few
@given(st.floats(min_value=4000.0, max_value=90000.0), st.integers(min_value=1, max_value=4))
def test_each_block_of_a_steady_engine_holds_whole_turnovers_and_lasts_about_a_second_or_more(rate, engines):
    trial = raw.trial(engines, rate=rate)
    edges = block_edges(trial)
    assert 4 <= len(edges) <= 13
    for low, high in pairwise(edges):
        tokens = tokens_between(trial.loads, low, high)
        assert tokens / TURNOVER == pytest.approx(round(tokens / TURNOVER), abs=1e-3)
        assert tokens > 0.9 * TURNOVER
        assert high - low > 0.85  # 12 blocks of a 12 s window, less what is left over, give or take the noise
    measured = measure(trial)
    assert measured.dof == len(measured.blocks_tok_per_s) - 1 == len(edges) - 2
    assert measured.log_mean == pytest.approx(
        sum(map(math.log, measured.blocks_tok_per_s)) / len(measured.blocks_tok_per_s)
    )


@pytest.mark.parametrize(("rate", "blocks"), [(48000.0, 4), (24000.0, 8), (4000.0, 8)])
def test_steady_decode_is_cut_into_up_to_eight_equal_times_of_at_least_a_second(rate, blocks):
    trial = raw.trial(2, workload=DECODE, rate=rate)
    edges = block_edges(trial)
    widths = [high - low for low, high in pairwise(edges)]
    assert (edges[0], edges[-1]) == trial.window
    assert widths == pytest.approx([widths[0]] * blocks)
    assert widths[0] >= 1.0


def test_a_slow_swing_gives_a_wider_interval_than_the_same_blocks_in_turn():
    blocks = [1.0, 1.02, 1.04, 1.06, 1.04, 1.02, 1.0, 0.98, 0.96, 0.98, 1.0, 1.02]
    order = sorted(range(12), key=lambda i: (i * 5) % 12)

    def widths(factors):
        tokens = list(itertools.chain.from_iterable([10000.0 * f] * 10 for f in factors))
        trial = steady(0.0, 120, (60.0, 72.0))
        return measure(raw.changed(trial, "loads.0.tokens", tokens)).log_se

    assert widths(blocks) > 1.3 * widths([blocks[i] for i in order])


# ---------------------------------------------------------------- latencies, GPU, CPU


def test_percentiles_are_in_milliseconds_and_over_all_engines():
    measured = measure(TRIAL)
    assert measured.ttft_ms.p50 <= measured.ttft_ms.p95 <= measured.ttft_ms.p99
    # Closed loop: requests in flight = requests/s times the time each is in flight (Little 1961).
    assert measured.e2e_ms.p50 / 1000 * measured.requests_per_s == pytest.approx(256, rel=0.05)
    slow = raw.changed(TRIAL, "loads.1.ttft.counts", lambda counts: {i + 70: n for i, n in counts.items()})
    assert measure(slow).ttft_ms.p95 == pytest.approx(measured.ttft_ms.p95 * 1.02**70, rel=0.2)
    assert measure(slow).itl_ms == measured.itl_ms


def test_prefill_has_no_time_between_tokens():
    measured = measure(raw.trial(workload=PREFILL, rate=60.0))
    assert measured.itl_ms is None
    assert measured.ttft_ms is not None
    assert measured.requests_per_s == pytest.approx(measured.throughput_tok_per_s.value)


def test_requests_are_counted_over_the_same_turnovers_as_tokens():
    measured = measure(TRIAL)
    assert measured.requests_per_s * SERVE.osl == pytest.approx(measured.throughput_tok_per_s.value, rel=0.002)
    first, *_, last = block_edges(TRIAL)
    outside = raw.changed(TRIAL, f"loads.0.completions.{math.floor((first - raw.READY_S) / 0.1) - 1}", 50)
    outside = raw.changed(outside, f"loads.1.completions.{math.ceil((last - raw.READY_S) / 0.1)}", 50)
    assert measure(outside) == measured


def test_steady_decode_completes_nothing_and_still_has_a_rate():
    measured = measure(raw.trial(workload=DECODE))
    assert measured.requests_per_s == 0.0
    assert measured.e2e_ms is None
    assert measured.throughput_tok_per_s.value == pytest.approx(20000, rel=0.05)


def with_gpm(rows):
    """`rows` of (at_s, interval_s, graphics active, SM active)."""
    at, interval, graphics, sms = ([*column] for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    gpu = msgspec.structs.replace(
        TRIAL.gpu,
        gpm_at_s=at,
        gpm_interval_s=interval,
        graphics_active_pct=graphics,
        sm_active_pct=sms,
        sm_occupancy_pct=sms,
        tensor_active_pct=sms,
        dram_active_pct=sms,
    )
    return raw.trial(gpu=gpu, window=(64.0, 76.0))


def test_gpu_activity_is_weighted_by_time_and_leaves_out_rows_that_cross_the_windows_edges():
    rows = [(64.2, 0.5, 0.0, 0.0), (66.0, 2.0, 80.0, 40.0), (67.0, 1.0, 20.0, 10.0), (76.1, 0.5, 0.0, 0.0)]
    measured = measure(with_gpm(rows))
    assert measured.sm_active_pct == pytest.approx(30.0)
    assert measured.gpu_idle_pct == pytest.approx(40.0)


@pytest.mark.parametrize("rows", [[], [(50.0, 0.5, 70.0, 60.0)], [(64.2, 0.5, 70.0, 60.0)]])
def test_gpu_activity_without_rows_in_the_window_is_missing_not_zero(rows):
    measured = measure(with_gpm(rows))
    assert measured.sm_active_pct is None
    assert measured.gpu_idle_pct is None


def test_power_is_that_of_the_window_and_tokens_per_joule_are_its_tokens_over_its_energy():
    measured = measure(TRIAL)
    assert measured.power_w == pytest.approx(400, abs=2)  # the idle samples around the window would pull it to 200
    joules = measured.power_w * (TRIAL.window[1] - TRIAL.window[0])
    assert measured.tokens_per_joule == pytest.approx(tokens_between(TRIAL.loads, *TRIAL.window) / joules)
    # What the counter says is of the whole trial, with the start of engines and the drain.
    assert measure(raw.changed(TRIAL, "gpu.energy_end_j", 1e9)).tokens_per_joule == measured.tokens_per_joule


def test_what_was_not_sampled_is_missing():
    blind = measure(raw.trial(gpu=None, cpu=[]))
    assert blind.power_w is blind.tokens_per_joule is blind.sm_active_pct is blind.gpu_idle_pct is None
    assert blind.load_cpu_pct is blind.engine_core_cpu_pct is blind.api_server_cpu_pct is None
    unread = raw.changed(TRIAL, "gpu.power_w", lambda samples: [None] * len(samples))
    assert measure(unread).power_w is None


def test_cpu_shares_are_those_of_the_busiest_process_and_of_its_main_thread_in_the_engine_core():
    uses = [
        msgspec.structs.replace(use, cpu_s=use.cpu_s * 1.5, main_thread_s=use.main_thread_s * 1.1)
        if use.engine == 1 or use.pid == raw.load_pid(1)
        else use
        for use in TRIAL.cpu
    ]
    measured = measure(raw.trial(cpu=uses))
    assert measured.load_cpu_pct == pytest.approx(45.0)
    assert measured.engine_core_cpu_pct == pytest.approx(88.0)
    assert measured.api_server_cpu_pct == pytest.approx(90.0)


def test_a_trial_that_never_reached_its_window_cannot_be_measured():
    with pytest.raises(ValueError, match="window"):
        measure(raw.failed())


def test_measuring_a_recorded_trial_gives_the_same_numbers_as_measuring_the_live_one():
    recorded = msgspec.json.decode(msgspec.json.encode(TRIAL), type=RawTrial)
    assert measure(recorded) == measure(TRIAL)


def test_a_steady_window_is_known_well_and_a_rough_one_is_not_until_it_is_long():
    def curve(seconds, swing):
        tokens, rows = 0.0, [(0.0, 0.0)]
        chance = random.Random(7)
        for second in range(seconds):
            tokens += 1000 * math.exp(chance.gauss(0, swing))
            rows.append((second + 1.0, tokens))
        return rows

    assert half_width_so_far(curve(20, 0.001), 2000) < 0.01
    rough = half_width_so_far(curve(20, 0.2), 2000)
    assert rough > 0.05
    assert half_width_so_far(curve(400, 0.2), 2000) < rough / 2


def test_too_few_turnovers_say_nothing_about_precision():
    assert half_width_so_far([(0.0, 0.0), (1.0, 1000.0), (2.0, 2000.0)], 1000) == math.inf
    assert half_width_so_far([], 1000) == math.inf


def test_what_a_window_had_counted_before_it_began_is_no_part_of_it():
    late = [(float(at), 5000.0 + 1000.0 * at) for at in range(30)]
    assert half_width_so_far(late, 2000) == pytest.approx(0.0, abs=1e-9)
