"""What the page's tables are made of. A cell is text, a number with its place in the report, or nothing known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from advisor.report.fields import Interval, Number

Cell = str | Number | Interval | None


class Line(NamedTuple):
    """One row. The first cell names it; `rest`, if there is any, fills the columns that `cells` leave."""

    cells: Sequence[Cell]
    rest: str = ""
    kind: str = ""  # "chosen" or "failed"; the words say it as well


class Table(NamedTuple):
    """`name` is unique on the page. Columns from `figures` on hold numbers, but for the last `texts` of them."""

    name: str
    caption: str
    headers: Sequence[str]
    lines: Sequence[Line]
    figures: int = 1
    texts: int = 0


def of(
    name: str, caption: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]], figures: int = 1, texts: int = 0
) -> Table:
    """A table whose rows are plain."""
    return Table(name, caption, headers, [Line(row) for row in rows], figures, texts)
