"""What several load generators saw of an engine makes one record."""

from __future__ import annotations

import msgspec
import pytest
import raw
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.core.loads import by_engine, merge
from advisor.core.measure import completions_between, measure, tokens_between

TRIAL = raw.trial(engines=1, mps=False)
LOAD = TRIAL.loads[0]


def test_one_part_is_itself():
    assert merge([LOAD]) == LOAD


@settings(max_examples=30, deadline=None)
@given(st.integers(min_value=0, max_value=40), st.floats(min_value=0.0, max_value=1.0))
def test_parts_that_start_at_different_times_add_up_bin_by_bin(late, share):
    early = msgspec.structs.replace(LOAD, tokens=[n * share for n in LOAD.tokens])
    later = msgspec.structs.replace(
        LOAD,
        bins_start_s=LOAD.bins_start_s + late * LOAD.bin_s,
        tokens=[n * (1 - share) for n in LOAD.tokens],
    )
    whole = merge([early, later])
    start, end = TRIAL.window
    for low, high in ((start, end), (start + 1, start + 2.5)):
        for count in (tokens_between, completions_between):
            assert count([whole], low, high) == pytest.approx(count([early, later], low, high))
    assert whole.sent == 2 * LOAD.sent
    assert sum(whole.itl.counts.values()) == 2 * sum(LOAD.itl.counts.values())


def test_halves_of_a_load_are_measured_like_the_whole():
    half = msgspec.structs.replace(LOAD, tokens=[n / 2 for n in LOAD.tokens])
    halves = msgspec.structs.replace(TRIAL, loads=[merge([half, half])])
    assert measure(halves).throughput_tok_per_s.value == pytest.approx(measure(TRIAL).throughput_tok_per_s.value)


def test_loads_of_different_engines_are_not_added_up():
    other = msgspec.structs.replace(LOAD, engine=1)
    with pytest.raises(ValueError, match="one engine"):
        merge([LOAD, other])


def test_every_generator_saw_every_engine_and_every_engine_gets_one_record():
    parts = [msgspec.structs.replace(LOAD, engine=engine, sent=sent) for sent, engine in enumerate([0, 1, 0, 1])]
    assert [(load.engine, load.sent) for load in by_engine(parts, 2)] == [(0, 2), (1, 4)]


def test_an_engine_that_no_generator_saw_is_an_error():
    with pytest.raises(ValueError, match="no load generator"):
        by_engine([LOAD], 2)
