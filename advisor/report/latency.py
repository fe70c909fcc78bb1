"""Throughput against latency: a figure for each latency that an objective is about, with the line of the objective."""

from __future__ import annotations

from collections.abc import Iterator

from advisor.core import slo
from advisor.core.records import Candidate
from advisor.report import figures
from advisor.report.figures import Limit, Point, Series, Sort
from advisor.report.formats import milliseconds, rate
from advisor.report.sheet import (
    SORTS,
    Drawn,
    Sheet,
    count,
    drawn,
    full_name,
    latencies_seen,
    latency,
    ordered,
    point_of,
    predicted,
    sort_of,
)
from advisor.report.tables import Line, Table


def latencies(sheet: Sheet) -> list[Drawn]:
    """One figure for each latency that an objective is about; without objectives for TTFT and ITL."""
    metrics = latencies_seen(sheet.report)
    if not metrics:
        name = f"{sheet.prefix}latency"
        return [Drawn(name, "Throughput against latency", (), missing="No latency was measured for any candidate.")]
    return [_figure(sheet, metric) for metric in metrics]


def _figure(sheet: Sheet, metric: str) -> Drawn:
    report, name = sheet.report, f"{sheet.prefix}latency-{metric.replace('_', '-')}"
    said = in_words(metric)
    title = f"Throughput against {said}"
    series: list[Series] = []
    lines: list[Line] = []
    alone: dict[Sort, list[Point]] = {}
    for index, one in ordered(report):
        if len(one.curve) > 1:
            points = list(_curve(sheet, index, one, metric))
            if points:
                label = full_name(report, one)
                order = sorted(range(len(points)), key=lambda n, at=points: at[n].y)  # type: ignore[misc]
                series.append(Series(label, sort_of(one), points, order, dash=len(series)))
        elif latency(one, metric) is not None:
            seen = sheet.fields.interval("candidates", index, "throughput_tok_per_s", form=rate, source=one.source)
            if seen is not None:
                at = latency(one, metric)
                # Without their whiskers, which would hide the curves; the table has the intervals.
                alone.setdefault(sort_of(one), []).append(point_of(at or 0.0, seen, predicted(one))._replace(low=None))
        lines += _lines(sheet, index, one, metric)
    curves = bool(series)
    series += [Series(f"{SORTS[sort]}, at one load", sort, points, faint=curves) for sort, points in alone.items()]
    limit = sheet.fields.number("question", "slo", metric, form=milliseconds)
    told = f"{sheet.unit} against {said} for {len(series)} groups of candidates, on a logarithmic scale of latency. "
    told += f"The objective is {limit.text}. " if limit else "No objective was set for it. "
    told += "The table after the figure has the numbers."
    drawings = drawn(
        figures.plot, series, name, title, told,
        x_axis=f"{said} in ms (log scale)", y_axis=sheet.unit, log_x=True,
        limit=Limit(limit.value, ["SLO ", limit]) if limit else None,
        x_holds=sheet.shared.latencies.get(metric, ()), y_holds=[sheet.shared.rate[sheet.unit]],
    )  # fmt: skip
    caption = "Up and to the left is better. "
    if curves:
        caption += (
            "Small numbers are requests in flight; lines join one candidate's loads; whiskers are 90 % intervals. "
        )
    caption += (
        "The upright line is the objective: what keeps to it lies left of it."
        if limit
        else "No objective was set, so that there is no line for one; profile --slo sets them."
    )
    table = Table(
        f"{name}-data",
        f"Throughput (with 90 % interval) and {said} behind the figure",
        ("candidate", "in flight", sheet.unit, said),
        lines,
    )
    return Drawn(name, title, [caption], drawings, table)


def _curve(sheet: Sheet, index: int, one: Candidate, metric: str) -> Iterator[Point]:
    for number, point in enumerate(one.curve):
        at = latency(point, metric)
        seen = sheet.fields.interval("candidates", index, "curve", number, "throughput_tok_per_s", form=rate)
        load = sheet.fields.number("candidates", index, "curve", number, "concurrency", form=count)
        if at is not None and seen is not None and load is not None:
            yield point_of(at, seen, predicted(one), [load])


def _lines(sheet: Sheet, index: int, one: Candidate, metric: str) -> Iterator[Line]:
    what, percentile = metric.split("_")
    label = full_name(sheet.report, one)
    places: list[tuple[str | int, ...]] = [("candidates", index)]
    if len(one.curve) > 1:
        places = [("candidates", index, "curve", number) for number in range(len(one.curve))]
    for place in places:
        seen = sheet.fields.interval(*place, "throughput_tok_per_s", form=rate, source=one.source)
        at = sheet.fields.number(*place, f"{what}_ms", percentile, form=milliseconds)
        load = sheet.fields.number(*place, "concurrency", form=count)
        if at is not None and seen is not None:
            yield Line((label, load, seen, at))


def in_words(metric: str) -> str:
    """“TTFT p95”, as objectives are called."""
    return slo.shown({metric: 0}).partition(" ≤")[0]
