"""What one request looks like: fixed lengths, and lengths that are drawn from a range."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.records import Workload
from advisor.core.workload import as_served, mean_and_range, output_range, prompt_range, prompt_tokens, turnover_tokens

MIXED = Workload(
    kind="serve", isl=1152, osl=65, concurrency=10, osl_spread=13, isl_range=(256, 2048), osl_range=(2, 128)
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1024", (1024, None)),
        ("1", (1, None)),
        ("256:2048", (1152, (256, 2048))),
        ("1:2", (2, (1, 2))),
        ("7:7", (7, None)),
    ],
)
def test_a_length_is_read_as_its_mean_and_its_range(text, found):
    assert mean_and_range(text) == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2048:256", "did you mean 256:2048"),
        ("0:5", "at least 1 token"),
        ("0", "at least 1 token"),
        ("a", "'a' is no length: give a number of tokens"),
        ("", "no length"),
        ("1:", "no length"),
        (":5", "no length"),
        ("1:2:3", "no length"),
        ("-5", "no length"),
        ("1.5", "no length"),
        (" 5", "no length"),
        ("²", "no length"),
    ],
)
def test_what_is_no_length_is_refused_with_the_reason(text, why):
    with pytest.raises(ValueError, match=why):
        mean_and_range(text)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_mean_is_the_middle_of_the_range(a, b):
    low, high = sorted((a, b))
    mean, found = mean_and_range(f"{low}:{high}")
    assert abs(2 * mean - low - high) <= 1
    assert found == (None if low == high else (low, high))


def test_lengths_are_those_of_the_range_where_there_is_one():
    assert (prompt_range(MIXED), output_range(MIXED)) == ((256, 2048), (2, 128))
    fixed = msgspec.structs.replace(MIXED, isl_range=None, osl_range=None)
    assert (prompt_range(fixed), output_range(fixed)) == ((1152, 1152), (52, 78))


def test_prefill_mixes_prompts_only_and_decode_nothing():
    prefill = msgspec.structs.replace(MIXED, kind="prefill")
    assert (prompt_range(prefill), output_range(prefill)) == ((256, 2048), (1, 1))
    decode = msgspec.structs.replace(MIXED, kind="decode")
    assert prompt_range(decode) == (prompt_tokens(decode),) * 2
    assert output_range(decode) == (1728, 1728)


def test_memory_is_planned_for_the_longest_request_and_turnovers_for_the_mean():
    longest = as_served(MIXED)
    assert (longest.isl, longest.osl, longest.osl_spread) == (2048, 128, 0)
    assert (prompt_range(longest), output_range(longest)) == ((2048, 2048), (128, 128))
    assert turnover_tokens(MIXED) == 650


def test_a_workload_that_was_recorded_before_there_were_ranges_is_still_read():
    old = b'{"kind": "serve", "isl": 64, "osl": 16, "concurrency": 8, "osl_spread": 3, "temperature": 0.0, "seed": 0}'
    workload = msgspec.json.decode(old, type=Workload)
    assert (workload.isl_range, workload.osl_range) == (None, None)
    assert msgspec.json.decode(msgspec.json.encode(MIXED), type=Workload) == MIXED
