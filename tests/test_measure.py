"""What a trial's raw evidence says, as numbers."""

import itertools
import math
from itertools import pairwise

import msgspec
import pytest
import raw
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.core.intervals import ratio
from advisor.core.measure import block_edges, measure, tokens_between
from advisor.core.records import RawTrial, Workload

TRIAL = raw.trial()
PREFILL = Workload(kind="prefill", isl=1024, osl=128, concurrency=256)
DECODE = Workload(kind="decode", isl=1024, osl=128, concurrency=256)
few = settings(max_examples=25, deadline=None)


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


def test_the_rate_is_the_tokens_that_arrived_inside_the_window_over_its_length():
    start, end = 64.0, 76.0
    trial = raw.changed(TRIAL, "window", (start, end))
    bins = range(round((start - 60) / 0.1), round((end - 60) / 0.1))
    tokens = sum(load.tokens[i] for load in trial.loads for i in bins)
    assert measure(trial).throughput_tok_per_s.value == pytest.approx(tokens / 12.0)


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
def test_the_rate_scales_with_the_tokens_and_its_relative_interval_stays(factor):
    # Blocks are cut by turnovers, so the number of turnovers is kept by as many times the requests in flight.
    before = measure(raw.trial(workload=DECODE))
    after = measure(rescaled(raw.trial(workload=DECODE), factor))
    for field in ("value", "low", "high"):
        assert getattr(after.throughput_tok_per_s, field) == pytest.approx(
            factor * getattr(before.throughput_tok_per_s, field)
        )
    assert after.turnovers == pytest.approx(factor * before.turnovers)
    assert after.log_se == pytest.approx(before.log_se)


@few
@given(st.floats(min_value=0.0, max_value=1e5))
def test_shifting_all_times_changes_nothing(by_s):
    before, after = measure(TRIAL), measure(raw.shifted(TRIAL, by_s))
    assert msgspec.structs.asdict(after)["blocks_tok_per_s"] == pytest.approx(before.blocks_tok_per_s)
    for name in ("log_mean", "log_se", "turnovers", "requests_per_s", "window_s", "sm_active_pct", "gpu_idle_pct"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-6), name
    assert (after.dof, after.ttft_ms, after.itl_ms, after.e2e_ms) == (
        before.dof,
        before.ttft_ms,
        before.itl_ms,
        before.e2e_ms,
    )


@few
@given(st.integers(min_value=0, max_value=1), st.integers(min_value=45, max_value=155), st.integers(1, 500))
def test_changing_the_tokens_of_one_bin_changes_the_result(engine, index, more):
    changed = raw.changed(TRIAL, f"loads.{engine}.tokens.{index}", lambda tokens: tokens + more)
    before, after = measure(TRIAL), measure(changed)
    assert after.throughput_tok_per_s.value == pytest.approx(before.throughput_tok_per_s.value + more / before.window_s)
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


def test_the_quoted_value_is_the_windows_mean_and_lies_inside_its_interval():
    rate = measure(raw.trial(noise=0.1)).throughput_tok_per_s
    assert rate.low < rate.value < rate.high
    assert rate.high / rate.value == pytest.approx(rate.value / rate.low)


def test_three_windows_of_one_steady_engine_agree_within_their_intervals():
    lows, highs = zip(
        *(
            (rate.low, rate.high)
            for rate in (measure(raw.trial(noise=0.02, seed=seed)).throughput_tok_per_s for seed in (1, 2, 3))
        ),
        strict=True,
    )
    assert max(lows) < min(highs)


# ---------------------------------------------------------------- blocks

SERVE = raw.WORKLOAD
TURNOVER = SERVE.concurrency * SERVE.osl


def swinging(period_s: float, phase_s: float, rate: float = 8000.0, window_s: float = 26.0):
    """A trial whose engine decodes in one half of each turnover and only prefills in the other."""
    whole = raw.trial(1, mps=False, rate=rate)
    start = 10.0
    bins = [
        2 * rate * 0.1 if ((index * 0.1 + phase_s) % period_s) < period_s / 2 else 0.0
        for index in range(int((start + window_s + 5) / 0.1))
    ]
    load = msgspec.structs.replace(
        whole.loads[0], bins_start_s=0.0, bin_s=0.1, tokens=bins, first_tokens=[0] * len(bins),
        completions=[0] * len(bins),
    )  # fmt: skip
    return msgspec.structs.replace(whole, loads=[load], window=(start, start + window_s))


@pytest.mark.parametrize("phase_s", [0.0, 0.7, 1.9, 3.3])
def test_an_engine_that_swings_once_per_turnover_is_measured_as_well_as_a_steady_one(phase_s):
    rate = TURNOVER / 4.1  # one swing is one turnover: 4.1 s
    measured = measure(swinging(4.1, phase_s, rate))
    assert measured.throughput_tok_per_s.value == pytest.approx(rate, rel=0.03)
    assert measured.throughput_tok_per_s.low > 0.95 * rate


@few
@given(st.floats(min_value=4000.0, max_value=90000.0), st.integers(min_value=1, max_value=4))
def test_each_block_holds_whole_turnovers_and_lasts_a_second(rate, engines):
    trial = raw.trial(engines, rate=rate)
    edges = block_edges(trial)
    assert 4 <= len(edges) <= 13
    for low, high in pairwise(edges):
        tokens = tokens_between(trial.loads, low, high)
        assert tokens / TURNOVER == pytest.approx(round(tokens / TURNOVER), abs=1e-3)
        assert tokens > 0.9 * TURNOVER
        assert high - low > 0.5
    measured = measure(trial)
    assert measured.dof == len(measured.blocks_tok_per_s) - 1 == len(edges) - 2
    assert measured.log_mean == pytest.approx(
        sum(map(math.log, measured.blocks_tok_per_s)) / len(measured.blocks_tok_per_s)
    )


def test_steady_decode_is_cut_into_equal_times():
    trial = raw.trial(2, workload=DECODE, rate=20000.0)
    widths = [high - low for low, high in pairwise(block_edges(trial))]
    assert len(widths) == 8
    assert max(widths) == pytest.approx(min(widths))


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


def test_power_is_that_of_the_window_and_gives_tokens_per_joule():
    measured = measure(TRIAL)
    assert measured.power_w == pytest.approx(400, abs=2)  # the idle samples around the window would pull it to 200
    assert measured.tokens_per_joule == pytest.approx(measured.throughput_tok_per_s.value / measured.power_w)


def test_what_was_not_sampled_is_missing():
    blind = measure(raw.trial(gpu=None, cpu=[]))
    assert blind.power_w is blind.tokens_per_joule is blind.sm_active_pct is blind.gpu_idle_pct is None
    assert blind.load_cpu_pct is blind.engine_core_cpu_pct is blind.api_server_cpu_pct is None
    unread = raw.changed(TRIAL, "gpu.power_w", lambda samples: [None] * len(samples))
    assert measure(unread).power_w is None


def test_cpu_shares_are_those_of_the_busiest_process_and_of_its_main_thread_in_the_engine_core():
    uses = [
        msgspec.structs.replace(use, cpu_s=use.cpu_s * 1.5, main_thread_s=use.main_thread_s * 1.1)
        if use.engine == 1
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
