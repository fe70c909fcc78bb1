"""Figures as SVG: pure functions from numbers to a drawing.

A figure is drawn for a width, because text in a drawing that is scaled down cannot be read: the page shows the wide or
the narrow one. Colours are the page's (classes), and never say anything alone: every sort of mark has a shape as well.
Text is escaped by the XML library that writes it. A mark or a text that shows a number of the report carries its place
in the report's JSON (`data-field`), so that what is drawn can be checked against it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup

from advisor.report.fields import Number
from advisor.report.formats import clean, printable

WIDE, NARROW = 640.0, 344.0
# Of a character of 12 px in a sans-serif: widths of text are only estimated, so margins are generous.
CHARACTER = 6.7
LINE = 16.0
# Beyond these a scale is of no use, and products of its ends must not overflow.
SMALLEST, LARGEST = 1e-9, 1e15

Sort = Literal["single", "several", "mps", "percentages"]
Piece = str | Number
Text = Sequence[Piece]
Element = ElementTree.Element


class Row(NamedTuple):
    """One candidate, step or kernel: its name, its number as text, and where its mark stands.

    `value` is a bar's end or a point; `begin` a bar's start, `low` and `high` the ends of its whisker, `inner` the end
    of a part of the bar. `shown` is the number that the mark stands for.
    """

    label: str
    text: Text
    value: float
    shown: Number | None = None
    low: float | None = None
    high: float | None = None
    begin: float | None = None
    inner: float | None = None
    sort: Sort = "single"
    strong: bool = False
    predicted: bool = False


class Point(NamedTuple):
    x: float
    y: float
    shown: Number | None = None
    low: float | None = None
    high: float | None = None
    note: Text = ()
    predicted: bool = False


class Series(NamedTuple):
    """Points of one sort. `line` joins those whose indices it names, in that order; `dash` tells lines apart."""

    label: str
    sort: Sort
    points: Sequence[Point]
    line: Sequence[int] = ()
    dash: int = 0
    faint: bool = False


class Limit(NamedTuple):
    """A line across the plot: where, and what it says."""

    at: float
    text: Text


# ---------------------------------------------------------------- scales


class Scale(NamedTuple):
    """From a value to a place. What lies outside `low` to `high` stands at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high > low else 0.5)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers within the scale, no more than about so many."""
        if not self.log:
            return _linear_ticks(self.low, self.high, about)
        for mantissas in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [tick for d in decades for m in mantissas if self.low <= (tick := m * 10.0**d) <= self.high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / (about + 1))]
        return _linear_ticks(self.low, self.high, about)


def _linear_ticks(low: float, high: float, about: int) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def linear(values: Iterable[float], start: float, end: float, *, zero: bool = True) -> Scale:
    """A scale that holds all of the values, from zero unless some are below."""
    kept = [min(max(value, -LARGEST), LARGEST) for value in values]
    low, high = min([0.0, *kept] if zero or not kept else kept), max(kept, default=1.0)
    if high - low < SMALLEST:
        high = low + 1.0
    return Scale(low, high + (high - low) * 0.06, start, end)


def logarithmic(values: Iterable[float], start: float, end: float) -> Scale:
    """A scale of ratios that holds all of the values above zero, with some room."""
    kept = [min(value, LARGEST) for value in values if value > SMALLEST]
    low, high = min(kept, default=1.0), max(kept, default=1.0)
    room = max(0.06 * math.log(high / low), 0.05)
    return Scale(low * math.exp(-room), high * math.exp(room), start, end, log=True)


# ---------------------------------------------------------------- figures


def dots(rows: Sequence[Row], *, name: str, title: str, told: str, axis: str, width: float, most: float = 0) -> Markup:
    """A point and its interval for each row, from zero; `most` is what the scale has to hold at least."""
    page = _Rows(rows, name, title, told, width)
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    across = linear([*ends, most], page.left, page.right)
    page.axis(across, axis)
    for row, y in page.placed():
        _whisker(page.svg, across, row, y)
        _mark(page.svg, row.sort, across(row.value), y, row.shown, strong=row.strong, hollow=row.predicted)
    return page.markup()


def waterfall(
    rows: Sequence[Row], *, name: str, title: str, told: str, axis: str, width: float, holds: Sequence[float] = ()
) -> Markup:
    """Each row a bar from `begin` to `value` on a scale of ratios: equal factors are equally long. The scale has room
    for what it `holds` besides.
    """
    page = _Rows(rows, name, title, told, width)
    ends = [end for row in rows for end in (row.value, row.begin, row.low, row.high) if end is not None]
    across = logarithmic([1.0, *ends, *holds], page.left, page.right)
    page.axis(across, axis, form=lambda tick: f"{tick:g}×")
    before: tuple[float, float] | None = None
    for row, y in page.placed():
        x = across(row.value)
        if before is not None:
            _line(page.svg, "join", before[0], before[1], before[0], y - 8)
        if row.begin is None:
            _mark(page.svg, row.sort, x, y, row.shown, strong=row.strong)
        else:
            begin = across(row.begin)
            kind = "gain" if x >= begin else "loss"
            _bar(page.svg, kind, min(begin, x), y - 7, abs(x - begin), 14, row.shown)
        _whisker(page.svg, across, row, y)
        before = x, y + 8
    return page.markup()


def bars(
    rows: Sequence[Row], *, name: str, title: str, told: str, axis: str, width: float, most: float = 100.0
) -> Markup:
    """A bar from zero for each row, with a part of it (`inner`) set off by being darker and lower."""
    page = _Rows(rows, name, title, told, width)
    across = Scale(0.0, most, page.left, page.right)
    page.axis(across, axis)
    for row, y in page.placed():
        _bar(page.svg, "whole", page.left, y - 6, across(row.value) - page.left, 12, row.shown)
        if row.inner is not None:
            _bar(page.svg, "part", page.left, y - 3, across(row.inner) - page.left, 6, None)
    return page.markup()


def plot(
    series: Sequence[Series],
    *,
    name: str,
    title: str,
    told: str,
    x_axis: str,
    y_axis: str,
    width: float,
    log_x: bool = False,
    whole_x: bool = False,
    reference: Limit | None = None,
    limit: Limit | None = None,
    x_holds: Sequence[float] = (),
    y_holds: Sequence[float] = (),
) -> Markup:
    """Points over a plane, from y = 0, some joined; `reference` lies across, `limit` stands upright.

    `x_holds` and `y_holds` are further values that the scales have room for: the same for figures to be compared.
    """
    points = [point for one in series for point in one.points]
    legend = [
        (one, line, number)
        for one in series
        for number, line in enumerate(_wrapped(one.label, (width - 40) / CHARACTER))
    ]
    top = LINE * len(legend) + 22
    left, right, bottom = 58.0, width - 22, top + (250 if width < WIDE else 300)
    svg = _svg(name, title, told, width, bottom + 46)
    for index, (one, line, number) in enumerate(legend):
        y = 10 + LINE * index
        if number == 0:
            if one.line:
                _line(svg, f"curve d{one.dash % 4} {one.sort}", 2, y, 30, y)
            _mark(svg, one.sort, 16, y, None, faint=one.faint)
        _text(svg, [line], 38, y + 4)
    xs = [*(point.x for point in points), *x_holds, *([limit.at] if limit else [])]
    ys = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    ys += [*y_holds, *([reference.at] if reference else [])]
    if whole_x:
        across = Scale(0.5, max(xs, default=1) + 0.5, left, right)
    else:
        across = logarithmic(xs, left, right) if log_x else linear(xs, left, right)
    up = linear(ys, bottom, top)
    for tick in up.ticks():
        _line(svg, "grid", left, up(tick), right, up(tick))
        _text(svg, [f"{tick:,.6g}"], left - 6, up(tick) + 4, "tick end")
    last = int(across.high)
    whole = [float(n) for n in range(1, last + 1, max(1, last // 12))]
    for tick in whole if whole_x else across.ticks(5 if width >= WIDE else 4):
        _line(svg, "tick", across(tick), bottom, across(tick), bottom + 4)
        _text(svg, [f"{tick:,.6g}"], across(tick), bottom + 18, "tick middle")
    _line(svg, "axis", left, bottom, right, bottom)
    _text(svg, [x_axis], (left + right) / 2, bottom + 38, "label middle")
    _text(svg, [y_axis], 2, top - 10, "label")
    if reference is not None:
        _line(svg, "reference", left, up(reference.at), right, up(reference.at))
        _text(svg, reference.text, right, up(reference.at) - 5, "label end")
    if limit is not None:
        x, leftwards = across(limit.at), across(limit.at) > (left + right) / 2
        _line(svg, "limit", x, top, x, bottom)
        _text(svg, limit.text, x + (-5 if leftwards else 5), top + 12, "limit" + (" end" if leftwards else ""))
    for one in series:
        _series(svg, one, across, up)
    for number, one in enumerate(series):
        _notes(svg, one, across, up, below=number % 2 == 1)
    return _markup(svg)


def _series(svg: Element, one: Series, across: Scale, up: Scale) -> None:
    path = " ".join(f"{across(one.points[n].x):.1f},{up(one.points[n].y):.1f}" for n in one.line)
    if len(one.line) > 1:
        ElementTree.SubElement(svg, "polyline", {"class": f"curve d{one.dash % 4} {one.sort}", "points": path})
    for point in one.points:
        x, y = across(point.x), up(point.y)
        if point.low is not None and point.high is not None:
            low, high = up(point.low), up(point.high)
            for ends in ((x, low, x, high), (x - 4, low, x + 4, low), (x - 4, high, x + 4, high)):
                _line(svg, "whisker", *ends)
        _mark(svg, one.sort, x, y, point.shown, faint=one.faint, hollow=point.predicted)


def _notes(svg: Element, one: Series, across: Scale, up: Scale, *, below: bool) -> None:
    """Last of all, so that no mark hides them; left of a mark only where there is room for it."""
    for point in one.points:
        x, y = across(point.x), up(point.y)
        leftwards = not below and x > across.start + 30
        _text(svg, point.note, x + (-9 if leftwards else 9), y + (15 if below else -5), "note" + " end" * leftwards)


# ---------------------------------------------------------------- rows


class _Rows:
    """A drawing of labelled rows: name and number beside each other, or above the track where that is too narrow."""

    def __init__(self, rows: Sequence[Row], name: str, title: str, told: str, width: float) -> None:
        beside = width >= WIDE
        self.rows, self.beside, self.width = rows, beside, width
        self.left, self.right = (232.0, width - 194) if beside else (6.0, width - 10)
        room = (self.left - 18 if beside else width - 8) / CHARACTER
        self.labels = [_wrapped(row.label, room) for row in rows]
        self.heights = [
            max(LINE * len(lines), 26.0) + 4 if beside else LINE * len(lines) + (LINE if row.text else 0) + 24
            for row, lines in zip(rows, self.labels, strict=True)
        ]
        self.bottom = 8 + sum(self.heights)
        self.svg = _svg(name, title, told, width, self.bottom + 44)

    def axis(self, across: Scale, text: str, form: object = None) -> None:
        """Ticks below the rows, and what they count."""
        for tick in across.ticks(5 if self.beside else 4):
            x = across(tick)
            _line(self.svg, "grid", x, 4, x, self.bottom)
            said = form(tick) if callable(form) else f"{tick:,.6g}"
            _text(self.svg, [said], x, self.bottom + 16, "tick middle")
        _line(self.svg, "axis", self.left, self.bottom, self.right, self.bottom)
        _text(self.svg, [text], (self.left + self.right) / 2, self.bottom + 36, "label middle")

    def placed(self) -> Iterable[tuple[Row, float]]:
        """Each row with the height of its track; its texts are written on the way."""
        top = 8.0
        for row, lines, height in zip(self.rows, self.labels, self.heights, strict=True):
            strong = " strong" if row.strong else ""
            if self.beside:
                middle = top + height / 2
                first = middle - LINE * (len(lines) - 1) / 2 + 4
                _text(self.svg, row.text, self.right + 10, middle + 4, f"value{strong}")
            else:
                first, middle = top + 12, top + height - 14
                _text(self.svg, row.text, 4, first + LINE * len(lines), f"value{strong}")
            for number, line in enumerate(lines):
                _text(self.svg, [line], 4, first + LINE * number, f"name{strong}")
            yield row, middle
            top += height

    def markup(self) -> Markup:
        return _markup(self.svg)


def _whisker(svg: Element, across: Scale, row: Row, y: float) -> None:
    if row.low is None or row.high is None:
        return
    low, high = across(row.low), across(row.high)
    for ends in ((low, y, high, y), (low, y - 4, low, y + 4), (high, y - 4, high, y + 4)):
        _line(svg, "whisker", *ends)


# ---------------------------------------------------------------- SVG


def _svg(name: str, title: str, told: str, width: float, height: float) -> Element:
    kind = "wide" if width >= WIDE else "narrow"
    ids = f"{name}-{kind}-title", f"{name}-{kind}-desc"
    svg = ElementTree.Element(
        "svg",
        {
            "class": f"drawing {kind}",
            "viewBox": f"0 0 {width:.0f} {height:.0f}",
            "role": "img",
            "aria-labelledby": " ".join(ids),
        },
    )
    for tag, identity, text in (("title", ids[0], title), ("desc", ids[1], told)):
        ElementTree.SubElement(svg, tag, {"id": identity}).text = clean(text)
    return svg


def _markup(svg: Element) -> Markup:
    # Written by an XML library from plain text: everything in it is escaped.
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _line(svg: Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    places = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    ElementTree.SubElement(svg, "line", {"class": kind, **places})


def _text(svg: Element, pieces: Text, x: float, y: float, kind: str = "") -> None:
    if not pieces:
        return
    text = ElementTree.SubElement(svg, "text", {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}"})
    last: Element | None = None
    for piece in pieces:
        if isinstance(piece, Number):
            last = ElementTree.SubElement(text, "tspan", piece.attributes())
            last.text = piece.text
        elif last is None:
            text.text = (text.text or "") + printable(piece)
        else:
            last.tail = (last.tail or "") + printable(piece)


def _bar(svg: Element, kind: str, x: float, y: float, width: float, height: float, shown: Number | None) -> None:
    places = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{max(width, 0):.1f}", "height": f"{height:.1f}"}
    ElementTree.SubElement(svg, "rect", {"class": f"bar {kind}", **places, **_attributes(shown)})


def _mark(
    svg: Element,
    sort: Sort,
    x: float,
    y: float,
    shown: Number | None,
    *,
    strong: bool = False,
    faint: bool = False,
    hollow: bool = False,
) -> None:
    """A diamond for one engine, a square for several, a circle under MPS, a triangle with thread percentages."""
    size = 4.0 if faint else 7.0 if strong else 5.5
    shapes = {
        "single": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
        "several": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "percentages": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
    }
    kind = f"mark {sort}" + " faint" * faint + " hollow" * hollow
    if sort == "mps":
        places = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{size:.1f}"}
        ElementTree.SubElement(svg, "circle", {"class": kind, **places, **_attributes(shown)})
        return
    corners = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in shapes[sort])
    ElementTree.SubElement(svg, "polygon", {"class": kind, "points": corners, **_attributes(shown)})


def _attributes(shown: Number | None) -> dict[str, str]:
    return {} if shown is None else shown.attributes()


def _wrapped(text: str, characters: float) -> list[str]:
    """Lines of whole words, of about so many characters; a longer word is cut, so that nothing leaves the drawing."""
    return textwrap.wrap(clean(text), max(8, int(characters))) or [""]
