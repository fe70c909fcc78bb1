"""90 % intervals of rates and of their ratios."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.intervals import LogMean, log_ratio, mean_of_logs, ratio, student_t_90, value_of

rates = st.floats(min_value=1.0, max_value=1e6)
errors = st.floats(min_value=0.0, max_value=0.5)
dofs = st.integers(min_value=2, max_value=11)

# Upper 5 % points of Student's t, from the usual printed tables.
TABLE = {1: 6.3138, 2: 2.9200, 3: 2.3534, 4: 2.1318, 5: 2.0150, 6: 1.9432, 8: 1.8595, 10: 1.8125, 11: 1.7959}
TABLE |= {15: 1.7531, 20: 1.7247, 29: 1.6991, 30: 1.6973, 40: 1.6839, 60: 1.6706, 120: 1.6577, math.inf: 1.6449}


@pytest.mark.parametrize(("dof", "t"), TABLE.items())
def test_students_t_is_what_the_tables_say(dof, t):
    assert student_t_90(dof) == pytest.approx(t, abs=1e-4)


@given(st.floats(min_value=1.0, max_value=200.0), st.floats(min_value=0.01, max_value=50.0))
def test_more_degrees_of_freedom_never_widen_an_interval(dof, more):
    assert student_t_90(dof + more) <= student_t_90(dof) + 1e-6


@pytest.mark.parametrize("dof", [0.99, 0.0, -1.0, math.nan])
def test_less_than_one_degree_of_freedom_is_refused(dof):
    with pytest.raises(ValueError, match="degree of freedom"):
        student_t_90(dof)


def test_the_interval_of_three_known_rates_is_the_one_worked_by_hand():
    mean = mean_of_logs([math.e, math.e**2, math.e**3])
    assert mean == pytest.approx((2.0, 1 / math.sqrt(3), 2))
    interval = value_of(*mean)
    assert interval.value == pytest.approx(math.e**2)
    assert math.log(interval.high) == pytest.approx(2 + 2.9200 / math.sqrt(3), abs=1e-4)
    assert math.log(interval.low) == pytest.approx(2 - 2.9200 / math.sqrt(3), abs=1e-4)


def test_an_interval_moves_with_its_centre_and_keeps_its_relative_width():
    own, moved = value_of(2.0, 0.1, 5), value_of(2.0, 0.1, 5, centre=100.0)
    assert moved.value == 100.0
    assert moved.high / moved.value == pytest.approx(own.high / own.value)
    assert moved.low / moved.value == pytest.approx(own.low / own.value)


@pytest.mark.parametrize("values", [[], [3.0], [3.0, 0.0], [3.0, -1.0]])
def test_values_that_allow_no_interval_are_refused(values):
    with pytest.raises(ValueError, match="at least two values"):
        mean_of_logs(values)


def test_neighbours_that_are_alike_widen_the_error_and_alternating_ones_do_not():
    alike = mean_of_logs([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    alternating = mean_of_logs([1.0, 2.0] * 4)
    # r of the first is 5/8: the sum of seven neighbouring products is 5 where the squares sum to 8.
    assert alike.log_se == pytest.approx(alternating.log_se * math.sqrt((1 + 5 / 8) / (1 - 5 / 8)))


def test_correlation_is_not_estimated_from_five_values():
    rising = mean_of_logs([math.exp(x) for x in range(5)])
    assert rising.log_se == pytest.approx(math.sqrt(2.5 / 5))


def test_the_correction_for_correlation_is_capped_at_three_times():
    values = [1.0] * 500 + [2.0] * 500
    independent = math.log(2) / 2 * math.sqrt(1000 / 999) / math.sqrt(1000)
    assert mean_of_logs(values).log_se == pytest.approx(3 * independent)


@given(rates, errors, dofs)
def test_the_ratio_of_a_thing_with_itself_holds_one(rate, error, dof):
    gain = ratio(math.log(rate), error, dof, math.log(rate), error, dof)
    assert gain.value == 1.0
    assert gain.low <= 1.0 <= gain.high


@given(rates, errors, dofs, rates, errors, dofs)
def test_turning_a_ratio_round_turns_its_interval_round(rate_a, error_a, dof_a, rate_b, error_b, dof_b):
    a, b = (math.log(rate_a), error_a, dof_a), (math.log(rate_b), error_b, dof_b)
    there, back = ratio(*a, *b), ratio(*b, *a)
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high)
    assert there.high == pytest.approx(1 / back.low)


@given(errors, dofs, errors, dofs)
def test_welchs_degrees_of_freedom_lie_between_the_smaller_and_the_sum(error_a, dof_a, error_b, dof_b):
    dof = log_ratio(LogMean(0.0, error_a, dof_a), LogMean(0.0, error_b, dof_b)).dof
    assert min(dof_a, dof_b) - 1e-9 <= dof <= dof_a + dof_b + 1e-9


def test_two_equal_errors_add_their_degrees_of_freedom_and_a_sure_base_adds_nothing():
    assert log_ratio(LogMean(1.0, 0.1, 4), LogMean(0.0, 0.1, 4)) == pytest.approx((1.0, 0.1 * math.sqrt(2), 8))
    assert log_ratio(LogMean(1.0, 0.1, 4), LogMean(0.0, 0.0, 9)) == pytest.approx((1.0, 0.1, 4))


def test_ninety_percent_intervals_hold_the_truth_about_nine_times_in_ten():
    chance = random.Random(7)
    held = 0
    for _ in range(1000):
        a = mean_of_logs([math.exp(chance.gauss(2.0, 0.05)) for _ in range(4)])
        b = mean_of_logs([math.exp(chance.gauss(1.0, 0.02)) for _ in range(5)])
        gain = ratio(*a, *b)
        held += gain.low <= math.e <= gain.high
    assert 0.87 <= held / 1000 <= 0.93
