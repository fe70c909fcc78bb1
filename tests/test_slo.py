"""Latency objectives: how they are written, and who keeps to them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.records import CurvePoint, Percentiles, Value
from advisor.core.slo import meets, parse, shown, worst

times = st.floats(min_value=0.1, max_value=1e5)


def point(ttft=None, itl=None):
    def same(value):
        return None if value is None else Percentiles(p50=value, p95=value, p99=value)

    return CurvePoint(
        concurrency=64,
        throughput_tok_per_s=Value(value=1000.0),
        ttft_ms=same(ttft),
        itl_ms=same(itl),
        e2e_ms=None,
        trial="t",
    )


def test_objectives_are_read_in_milliseconds():
    read = parse("ttft_p95=200ms, itl_p99=0.03s,e2e_p50=1500")
    assert read == {"ttft_p95": 200.0, "itl_p99": 30.0, "e2e_p50": 1500.0}


@pytest.mark.parametrize(
    "text", ["", "ttft=200ms", "ttft_p90=1", "itl_p95=0", "itl_p95=-3", "itl_p95=1.2.3", "x_p95=3"]
)
def test_what_is_no_objective_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="like ttft_p95=200ms"):
        parse(text)


def test_an_objective_given_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        parse("itl_p95=3,itl_p95=4")


@given(times, times)
def test_a_point_keeps_to_an_objective_exactly_when_it_is_not_above_it(seen, limit):
    assert meets(point(itl=seen), {"itl_p95": limit}) == (seen <= limit)


def test_all_objectives_count_and_the_worst_is_named():
    seen = point(ttft=100.0, itl=30.0)
    assert meets(seen, {"ttft_p95": 200.0, "itl_p95": 40.0})
    assert worst(seen, {"ttft_p95": 200.0, "itl_p95": 20.0}) == (1.5, "itl_p95")
    assert shown({"ttft_p95": 200.0, "itl_p95": 20.0}) == "TTFT p95 ≤ 200 ms, ITL p95 ≤ 20 ms"


def test_a_latency_that_was_not_seen_keeps_to_nothing():
    assert not meets(point(), {"ttft_p95": 1e9})


def test_without_objectives_everything_keeps_to_them():
    assert meets(point(), {})
