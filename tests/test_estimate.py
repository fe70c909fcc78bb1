"""Rates over several starts: who is chosen, what is quoted, and how sure that is."""

from __future__ import annotations

import math
import random
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.estimate import ASSUMED, assumed, estimate, gain, half_width, ratio_of_windows, spread
from advisor.core.intervals import mean_of_logs, student_t_90
from advisor.core.records import Measurement, Value
from advisor.core.tried import candidate, judge
from advisor.shell.store import RunFolder

rates = st.lists(st.floats(min_value=10.0, max_value=1e5), min_size=4, max_size=12)


def measured(blocks: list[float]) -> Measurement:
    mean = mean_of_logs(blocks)
    return Measurement(
        throughput_tok_per_s=Value(value=statistics.harmonic_mean(blocks)),
        requests_per_s=1.0,
        blocks_tok_per_s=blocks,
        log_mean=mean.log_mean,
        log_se=mean.log_se,
        dof=len(blocks) - 1,
        turnovers=6.0,
        window_s=15.0,
        ttft_ms=None,
        itl_ms=None,
        e2e_ms=None,
        sm_active_pct=None,
        gpu_idle_pct=None,
        tokens_per_joule=None,
        power_w=None,
        load_cpu_pct=None,
        engine_core_cpu_pct=None,
        api_server_cpu_pct=None,
    )


def start(level: float, noise: random.Random, block_error: float = 0.005) -> Measurement:
    return measured([level * math.exp(noise.gauss(0, block_error)) for _ in range(8)])


def alone(blocks: list[float]) -> list[Measurement]:
    return [measured(blocks)]


def test_a_run_without_second_starts_quotes_each_window_with_its_own_interval():
    blocks = [100.0, 104.0, 98.0, 101.0, 99.0, 103.0]
    mean = mean_of_logs(blocks)
    value = estimate(alone(blocks), spread([])).value
    assert value.high / value.value == pytest.approx(math.exp(student_t_90(5) * mean.log_se))


@given(rates)
def test_a_start_lies_between_its_slowest_and_its_fastest_block(blocks):
    one = estimate(alone(blocks), spread([])).value
    assert min(blocks) * 0.999 <= one.value <= max(blocks) * 1.001


@given(rates, rates)
def test_the_gains_of_two_candidates_over_each_other_multiply_to_one(first, second):
    a, b = (estimate(alone(blocks), spread([])) for blocks in (first, second))
    assert gain(a, b).value * gain(b, a).value == pytest.approx(1.0)
    assert gain(a, b).low * gain(b, a).high == pytest.approx(1.0)


def test_a_machine_whose_starts_differ_widens_every_interval_also_that_of_a_single_start():
    noise = random.Random(1)
    single = [start(1000, noise)]
    calm = spread([[start(500, noise), start(500, noise)], [start(800, noise), start(801, noise)]])
    rough = spread([[start(500, noise), start(560, noise)], [start(800, noise), start(720, noise)]])
    assert half_width(estimate(single, rough).value) > 4 * half_width(estimate(single, calm).value)


def test_a_second_start_narrows_the_interval():
    noise = random.Random(2)
    both = [start(1000, noise), start(1020, noise)]
    between = spread([both, [start(500, noise), start(510, noise)]])
    assert half_width(estimate(both, between).value) == pytest.approx(
        half_width(estimate(both[:1], between).value) / math.sqrt(2), rel=0.01
    )


def test_a_rough_window_sets_its_own_error_and_nobody_elses():
    noise = random.Random(3)
    rough = [start(1000, noise, 0.2), start(1000, noise, 0.2)]
    calm = [[start(level, noise, 0.003), start(level, noise, 0.003)] for level in (500, 800)]
    assert half_width(estimate(rough[:1], spread([rough, *calm])).value) > 0.05
    assert half_width(estimate(calm[0], spread([rough, *calm])).value) < 0.01


def test_without_a_second_start_the_blocks_are_all_there_is():
    only = [start(1000, random.Random(4))]
    assert spread([only]).variance == 0
    assert estimate(only, spread([only])).mean.dof == pytest.approx(only[0].dof)


@pytest.mark.parametrize("between_starts", [0.0, 0.003, 0.01, 0.03])
@pytest.mark.parametrize("windows", [(0.01, 0.01, 0.01, 0.01), (0.1, 0.1, 0.01, 0.01)], ids=["calm", "rough singles"])
def test_nine_of_ten_intervals_hold_the_true_gain(between_starts, windows):
    """Four candidates with two starts each, of which the second is quoted, as a profile has them."""
    noise, held, wide, runs = random.Random(5), 0, [], 500
    levels = [1000.0, 1500.0, 1800.0, 2200.0]
    for _ in range(runs):
        starts = [
            [start(level * math.exp(noise.gauss(0, between_starts)), noise, error) for _ in range(2)]
            for level, error in zip(levels, windows, strict=True)
        ]
        between = spread(starts)
        factor = gain(estimate(starts[3][1:], between), estimate(starts[2][1:], between))
        held += factor.low <= 2200 / 1800 <= factor.high
        wide.append(half_width(factor))
    assert held / runs >= 0.86
    assert statistics.median(wide) < 0.015 + 4 * between_starts


def test_two_windows_that_swing_are_not_told_apart():
    noise = random.Random(6)
    calm = ratio_of_windows(start(1080, noise, 0.003), start(1000, noise, 0.003))
    rough = ratio_of_windows(start(1080, noise, 0.15), start(1000, noise, 0.15))
    assert calm.low > 1.0
    assert rough.low < 1.0 < rough.high


def test_starts_that_happen_to_agree_are_not_taken_to_repeat_perfectly():
    alike = [[measured([1000.0 + n for n in range(8)])] * 2 for _ in range(3)]
    assert spread(alike).variance == pytest.approx(0.003**2)
    assert half_width(estimate(alike[0][1:], spread(alike)).value) > 0.005


def test_an_error_that_two_rates_share_is_not_known_better_for_that():
    noise = random.Random(8)
    rough = [[start(level * factor, noise, 1e-4) for factor in (1.0, 1.1)] for level in (500, 800, 900)]
    between = spread(rough)
    factor = gain(estimate(rough[1][1:], between), estimate(rough[0][1:], between))
    expected = student_t_90(between.dof) * math.sqrt(2 * between.variance)
    assert math.log(factor.high / factor.value) == pytest.approx(expected, rel=1e-3)


def test_errors_of_two_kinds_are_independent_and_those_of_one_kind_are_not():
    noise = random.Random(9)
    first = spread([[start(500, noise, 1e-4), start(530, noise, 1e-4)]])
    second = spread([[start(900, noise, 1e-4), start(960, noise, 1e-4)]])
    one, base = [start(950, noise, 1e-4)], [start(520, noise, 1e-4)]
    apart = gain(estimate(one, second, "several"), estimate(base, first, "one"))
    alike = gain(estimate(one, second, "one"), estimate(base, first, "one"))
    assert apart.value == pytest.approx(alike.value)
    assert half_width(apart) < half_width(alike)


def test_what_starts_are_assumed_to_differ_by_is_what_they_did_in_the_recorded_runs():
    """All candidates of recorded profiles that were started twice and more at full load, by how long the GPU idled."""
    groups: dict[str, list[list[Measurement]]] = {}
    data = Path(__file__).parent.parent / "data"
    for folder in sorted(path.parent for path in data.glob("**/manifest.json")):
        if not re.search("call-|cut-short|full|repeats", folder.name):
            continue  # those before second starts were made
        run = RunFolder(folder)
        load, starts = run.manifest().question.workload.concurrency, {}
        for one in (judge(raw) for raw in run.trials() if raw.spec.kind == "load"):
            # A window of the same start with other prompts is no candidate of its own here.
            if one.ok and one.spec.workload.concurrency == load:
                starts.setdefault(candidate(one.spec), []).append(one.measurement)
        for seen in starts.values():
            if len(seen) > 1:
                idle = statistics.mean(one.gpu_idle_pct for one in seen)
                groups.setdefault(assumed(idle).kind, []).append(seen)
    assert sum(map(len, groups.values())) >= 25
    for _, kind, variance in ASSUMED:
        found = spread(groups[kind])
        assert math.sqrt(found.variance) == pytest.approx(math.sqrt(variance.variance), rel=0.05)
        assert found.dof == pytest.approx(variance.dof, rel=0.05)
