"""Do restricted engines give the log-probabilities that unrestricted ones give?"""

import math
import random
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.numerics import LOGPROB_FLOOR, NOT_FINITE, judge_logprobs

PROMPTS = 3
TOKENS = 48


def engine(noise=0.0, seed=0, centre=-4.0, spread=2.0):
    """Log-probabilities of the same model, with `noise` times their spread added by this engine's seed."""
    signal, own = random.Random(7), random.Random(seed)
    return [
        [centre + spread * (signal.gauss(0, 1) + noise * own.gauss(0, 1)) for _ in range(TOKENS)]
        for _ in range(PROMPTS)
    ]


def float32(engine):
    return [[struct.unpack("f", struct.pack("f", value))[0] for value in prompt] for prompt in engine]


def test_engines_that_agree_exactly_are_approved():
    verdict = judge_logprobs([engine()], [engine(), engine()])
    assert (verdict.ok, verdict.worst_error, verdict.why) == (True, 0.0, None)


def test_the_error_is_the_difference_over_the_spread_of_the_worst_prompt():
    reference = [[-1.0, -3.0], [-2.0, -4.0]]
    verdict = judge_logprobs([[[-1.0, -3.0], [-2.0, -4.05]]], [reference])
    assert verdict.worst_error == pytest.approx(0.05 / math.sqrt(2))


def test_an_engine_that_computes_something_else_is_refused_with_error_and_limit():
    verdict = judge_logprobs([engine(), engine(noise=0.4, seed=3)], [engine(), engine()])
    assert not verdict.ok
    assert verdict.worst_error > 0.3
    assert verdict.why.startswith("log-probabilities off by 0.")
    assert verdict.why.endswith("0.08 allowed")


def test_nearly_constant_values_pass_their_float32_rounding():
    reference = engine(centre=-11.9312, spread=3e-5)
    restricted = engine(noise=0.01, seed=1, centre=-11.9312, spread=3e-5)
    verdict = judge_logprobs([float32(restricted)], [float32(reference)])
    assert verdict.ok
    assert verdict.worst_error > 0.005


def test_nearly_constant_values_that_are_wrong_are_refused():
    wrong = engine(noise=0.4, seed=1, centre=-11.9312, spread=3e-5)
    reference = engine(centre=-11.9312, spread=3e-5)
    assert not judge_logprobs([float32(wrong)], [float32(reference), float32(reference)]).ok


def test_a_shift_of_all_values_is_an_error_too():
    assert not judge_logprobs([engine(centre=-3.0)], [engine()]).ok


def test_noise_between_unrestricted_engines_widens_the_limit():
    restricted = [engine(noise=0.09, seed=1)]
    quiet = [engine(), engine()]
    noisy = [engine(), engine(noise=0.06, seed=2)]
    assert not judge_logprobs(restricted, quiet).ok
    assert judge_logprobs(restricted, noisy).ok


def test_unrestricted_engines_that_disagree_grossly_approve_nothing():
    verdict = judge_logprobs([engine()], [engine(), engine(noise=0.5, seed=2)])
    assert not verdict.ok
    assert "differ among themselves" in verdict.why


def test_a_single_unrestricted_engine_leaves_the_floor():
    assert judge_logprobs([engine(noise=0.05, seed=1)], [engine()]).ok
    assert not judge_logprobs([engine(noise=0.12, seed=1)], [engine()]).ok


def test_every_restricted_engine_counts():
    assert not judge_logprobs([engine(), engine(), engine(noise=0.4, seed=1)], [engine(), engine()]).ok


def test_values_without_any_spread_are_right_only_when_equal():
    constant = [[-1.0, -1.0]]
    assert judge_logprobs([constant], [constant]).ok
    verdict = judge_logprobs([[[-1.0, -1.1]]], [constant])
    assert (verdict.ok, verdict.worst_error) == (False, NOT_FINITE)


@pytest.mark.parametrize(
    ("restricted", "unrestricted", "reason"),
    [
        ([], [[[-1.0, -2.0]]], "no restricted engine"),
        ([[[-1.0, -2.0]]], [], "no unrestricted engine"),
        ([[]], [[[-1.0, -2.0]]], "restricted engine 0: log-probabilities are missing"),
        ([[[]]], [[[-1.0, -2.0]]], "restricted engine 0: log-probabilities are missing"),
        ([[[-1.0, -2.0]]], [[]], "unrestricted engine 0: log-probabilities are missing|another number"),
        ([[[-1.0, -2.0]]], [[[-1.0, -2.0]], [[-1.0]]], "unrestricted engine 1: .*another number"),
        ([[[-1.0]]], [[[-1.0, -2.0]]], "restricted engine 0: .*another number"),
        ([[[-1.0, -2.0]] * 2], [[[-1.0, -2.0]]], "restricted engine 0: .*another number"),
        ([[[-1.0, math.nan]]], [[[-1.0, -2.0]]], "not finite"),
        ([[[-1.0, -2.0]]], [[[-1.0, -math.inf]]], "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_its_reason(restricted, unrestricted, reason):
    verdict = judge_logprobs(restricted, unrestricted)
    assert (verdict.ok, verdict.worst_error) == (False, None)
    assert re.search(reason, verdict.why)


values = st.lists(st.integers(min_value=-2000, max_value=0).map(lambda v: v / 64), min_size=8, max_size=8)


@given(values, values, st.integers(min_value=1, max_value=64), st.integers(min_value=-64, max_value=64))
def test_the_error_depends_neither_on_the_scale_nor_on_the_level_of_the_signal(a, b, scale, level):
    def moved(prompt):
        return [scale * value + level for value in prompt]

    before, after = judge_logprobs([[a]], [[b]]), judge_logprobs([[moved(a)]], [[moved(b)]])
    assert after.worst_error == pytest.approx(before.worst_error, rel=1e-9)


@given(values, values)
def test_an_approved_engine_is_within_the_limit_and_a_refused_one_beyond_it(a, b):
    verdict = judge_logprobs([[a]], [[b], [b]])
    assert verdict.ok == (verdict.worst_error <= LOGPROB_FLOOR)
    assert verdict.ok == (verdict.why is None)
