"""The figures of what was tried: throughput, where the gain comes from, and how many engines. Each has the table behind
it; one that has nothing to show says why instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from advisor.core.advised import advised
from advisor.core.records import Candidate, Report
from advisor.report import figures, tables
from advisor.report.fields import Interval
from advisor.report.figures import Limit, Row, Series, Sort
from advisor.report.formats import rate
from advisor.report.sheet import (
    SORTS,
    Drawn,
    Sheet,
    drawn,
    full_name,
    led_to,
    ordered,
    point_of,
    predicted,
    sort_of,
)
from advisor.report.tables import Cell


def candidates(sheet: Sheet) -> Drawn:
    """Throughput of every candidate that worked, with its interval."""
    report, name, title = sheet.report, f"{sheet.prefix}candidates", "Throughput of every candidate"
    best = advised(report)
    rows = []
    for index, one in ordered(report):
        seen = sheet.fields.interval("candidates", index, "throughput_tok_per_s", form=rate, source=one.source)
        if seen is not None:
            rows.append(_row(_at_its_load(report, one), seen, sort_of(one), one is best, predicted(one)))
    if not rows:
        return Drawn(name, title, (), missing="No candidate has a throughput.")
    told = (
        f"One row for each of the candidates that worked, with its {sheet.unit} and 90 % interval. "
        + (f"Advised: {full_name(report, best)}. " if best else "None is advised. ")
        + "The table after the figure has the numbers."
    )
    axis = f"{sheet.unit}; bars are 90 % intervals"
    drawings = drawn(figures.dots, rows, name, title, told, axis=axis, most=sheet.shared.rate[sheet.unit])
    shapes = "◆ one engine, ■ several without MPS, ● under MPS, ▲ under MPS with thread percentages"
    load = " Each at the load at which it serves the objectives best." if report.question.slo else ""
    hollow = " Hollow marks were not measured." if any(row.predicted for row in rows) else ""
    chosen = " ► is advised." if best else ""
    return Drawn(name, title, [f"{shapes}.{chosen}{load}{hollow}"], drawings)


def _at_its_load(report: Report, one: Candidate) -> str:
    """The name; under objectives candidates are not all quoted at the same load."""
    load = f", {one.concurrency:,} in flight" if report.question.slo and one.concurrency else ""
    return full_name(report, one) + load


def waterfall(sheet: Sheet) -> Drawn:
    """What each change brought by itself, as factors that multiply."""
    report, name, title = sheet.report, f"{sheet.prefix}waterfall", "What each change brings by itself"
    steps = report.waterfall
    if not steps:
        why = "the default or the tuned engine has no rate"
        why += " under the objectives" if report.question.slo else ""
        why += ", or no number of engines was measured both under MPS and without it"
        if not report.protocol.tune:
            why = "this run did not tune the single engine, so that the credit cannot be divided"
        return Drawn(name, title, (), missing=f"Not known: {why}.")
    rows = [Row("the default engine", ["1×"], 1.0)]
    lines: list[Sequence[Cell]] = []
    whole = 1.0
    last = reached(sheet)
    source = last[0].source if last else None
    for index, step in enumerate(steps):
        seen = sheet.gain("waterfall", index, "factor", source=source)
        assert seen is not None
        before, whole = whole, whole * step.factor.value
        low, high = step.factor.low, step.factor.high
        rows.append(
            Row(
                label=step.change,
                text=list(seen.pieces()),
                value=whole,
                shown=seen.middle,
                low=None if low is None else before * low,
                high=None if high is None else before * high,
                begin=before,
            )
        )
        lines.append((step.change, seen, "gain" if step.factor.value >= 1 else "loss"))
    if last is not None:
        who, seen = last
        best = who is advised(report)
        rows.append(_row(f"together: {full_name(report, who)}", seen, sort_of(who), best, predicted(who)))
        lines.append((f"together: {full_name(report, who)}", seen, "gain" if seen.middle.value >= 1 else "loss"))
    told = "Factors that multiply from the default engine on, each drawn from where the one before ends: " + "; ".join(
        f"{step.change} {step.factor.value:.2f} times" for step in steps
    )
    axis = "times the default engine (equal factors are equally long)"
    drawings = drawn(figures.waterfall, rows, name, title, told + ".", axis=axis, holds=sheet.shared.products)
    caption = "A bar to the right is a gain, a dashed one to the left a loss. Whiskers are the 90 % interval of the "
    caption += "factor by itself."
    if not report.recommendation.mps:
        caption += " The last steps are not advised: they show what MPS would bring."
    table = tables.of(
        f"{name}-data", "Factors behind the figure, with 90 % intervals", ("change", "factor", ""), lines, texts=1
    )
    return Drawn(name, title, [caption], drawings, table)


def reached(sheet: Sheet) -> tuple[Candidate, Interval] | None:
    """The candidate that the last step leads to, with its gain."""
    index = led_to(sheet.report)
    if index is None:
        return None
    one = sheet.report.candidates[index]
    seen = sheet.gain("candidates", index, "gain_vs_default", source=one.source)
    return (one, seen) if seen is not None else None


def gains(sheet: Sheet) -> Drawn:
    """Gain over the default engine against the number of engines."""
    report, name, title = sheet.report, f"{sheet.prefix}gain", "Gain over the number of engines"
    series: list[Series] = []
    lines: list[Sequence[Cell]] = []
    places = _beside(report)
    for sort, told in SORTS.items():
        found = [(index, one) for index, one in ordered(report) if sort_of(one) == sort and one.gain_vs_default]
        points = []
        for index, one in found:
            seen = sheet.gain("candidates", index, "gain_vs_default", source=one.source)
            assert seen is not None
            points.append(point_of(places[index], seen, predicted(one)))
            lines.append((full_name(report, one), seen))
        best = {
            one.engines: number for number, (_, one) in sorted(enumerate(found), key=lambda pair: points[pair[0]].y)
        }
        joined = [best[engines] for engines in sorted(best)] if sort != "percentages" else []
        if points:
            series.append(Series(told, sort, points, joined, dash=list(SORTS).index(sort)))
    if not series:
        why = " under the objectives" if report.question.slo else ""
        return Drawn(name, title, (), missing=f"Not known: the default engine has no rate to compare with{why}.")
    told = "Gain over the default engine for each number of engines that was measured: "
    told += "; ".join(one.label for one in series) + ". The table after the figure has the numbers."
    drawings = drawn(
        figures.plot, series, name, title, told,
        x_axis="engines on the GPU", y_axis="times the default engine", whole_x=True,
        reference=Limit(1.0, ["the default engine"]), x_holds=[sheet.shared.engines], y_holds=[sheet.shared.gain],
    )  # fmt: skip
    caption = "Whiskers are 90 % intervals. Lines join the best at each number of engines; marks of one number are "
    caption += "drawn beside each other."
    table = tables.of(
        f"{name}-data", "Gains behind the figure, with 90 % intervals", ("candidate", "over the default engine"), lines
    )
    return Drawn(name, title, [caption], drawings, table)


def _beside(report: Report) -> dict[int, float]:
    """Where candidates stand, by their index: those of one number of engines beside each other, sort by sort."""
    places = {}
    for engines in {one.engines for one in report.candidates}:
        found = [(i, one) for i, one in ordered(report) if one.engines == engines and one.gain_vs_default]
        found.sort(key=lambda pair: list(SORTS).index(sort_of(pair[1])))
        step = min(0.13, 0.7 / max(len(found), 1))
        for number, (index, _) in enumerate(found):
            places[index] = engines + step * (number - (len(found) - 1) / 2)
    return places


def _row(label: str, seen: Interval, sort: Sort, advised: bool, guessed: bool) -> Row:
    return Row(
        label=("► " if advised else "") + label,
        text=list(seen.pieces()),
        value=seen.middle.value,
        shown=seen.middle,
        low=seen.low.value if seen.low else None,
        high=seen.high.value if seen.high else None,
        sort=sort,
        strong=advised,
        predicted=guessed,
    )
