"""Durations in logarithmic bins."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.histogram import FLOOR_S, RATIO, add, empty, merge, percentile
from advisor.core.records import LogHistogram

durations = st.lists(st.floats(min_value=FLOOR_S, max_value=3600.0), min_size=1, max_size=200)
shares = st.floats(min_value=0.0, max_value=1.0)


def histogram_of(seconds):
    histogram = empty()
    for value in seconds:
        add(histogram.counts, value)
    return histogram


@given(durations, shares)
def test_a_percentile_is_within_one_ratio_of_the_exact_one(seconds, q):
    exact = sorted(seconds)[max(1, math.ceil(q * len(seconds))) - 1]
    assert exact / RATIO <= percentile(histogram_of(seconds), q) <= exact * RATIO


@given(durations, durations, durations)
def test_merging_is_associative_and_loses_nothing(a, b, c):
    a, b, c = map(histogram_of, (a, b, c))
    together = merge([a, b, c])
    assert merge([merge([a, b]), c]) == together == merge([a, merge([b, c])])
    assert sum(together.counts.values()) == sum(sum(h.counts.values()) for h in (a, b, c))


@given(durations, durations, shares)
def test_a_percentile_of_several_is_that_of_all_their_durations(a, b, q):
    assert percentile([histogram_of(a), histogram_of(b)], q) == percentile(histogram_of(a + b), q)


@given(durations)
def test_a_recorded_histogram_is_read_back_as_it_was(seconds):
    histogram = histogram_of(seconds)
    assert msgspec.json.decode(msgspec.json.encode(histogram), type=LogHistogram) == histogram


def test_what_is_shorter_than_the_floor_counts_in_the_first_bin():
    histogram = histogram_of([0.0, FLOOR_S / 3, FLOOR_S])
    assert histogram.counts == {0: 3}


def test_several_equal_durations_are_added_at_once():
    counts = {}
    add(counts, 0.5, 3)
    assert counts == histogram_of([0.5, 0.5, 0.5]).counts


def test_nothing_has_no_percentile():
    assert percentile(empty(), 0.5) is None
    assert percentile([], 0.99) is None


def test_histograms_with_other_bins_are_not_added():
    with pytest.raises(ValueError, match="different bins"):
        merge([empty(), LogHistogram(floor_s=FLOOR_S, ratio=1.5, counts={0: 1})])


@pytest.mark.parametrize("seconds", [-0.001, math.inf, math.nan])
def test_a_duration_that_cannot_be_is_refused(seconds):
    with pytest.raises(ValueError, match="finite and not negative"):
        add({}, seconds)


@pytest.mark.parametrize("q", [-0.1, 1.1, 95])
def test_a_share_outside_0_to_1_is_refused(q):
    with pytest.raises(ValueError, match="from 0 to 1"):
        percentile(empty(), q)
