"""Numbers of a report together with their place in it, so that what a page shows can be checked against the JSON.

The place is a JSON pointer (RFC 6901) into what `report --format json` prints: the report, or the list of reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from markupsafe import Markup

from advisor.core.records import Figure, Report, Source, Value

Form = Callable[[float], str]
Key = str | int


class Number(NamedTuple):
    """A number as it stands in the report, where, and as it is shown."""

    value: float
    field: str
    text: str

    def attributes(self) -> dict[str, str]:
        return {"data-value": repr(self.value), "data-field": self.field}

    def __html__(self) -> Markup:
        return Markup('<data value="{}" data-field="{}">{}</data>').format(repr(self.value), self.field, self.text)


class Interval(NamedTuple):
    """A number with its 90 % interval, which may be unknown, and its source where that is not a measurement."""

    middle: Number
    low: Number | None
    high: Number | None
    source: Source | None = None

    def pieces(self) -> Iterator[str | Number]:
        """“1.19× (1.16 to 1.22)”, for a drawing."""
        yield self.middle
        if self.low is not None and self.high is not None:
            yield from (" (", self.low, " to ", self.high, ")")
        else:
            yield " (no interval)"
        if self.source not in (None, "measured"):
            yield f" {self.source}"

    def __html__(self) -> Markup:
        shown = self.middle.__html__()
        if self.low is not None and self.high is not None:
            shown += Markup(' <span class="interval">({} to {})</span>').format(self.low, self.high)
        else:
            shown += Markup(' <span class="interval">(no interval)</span>')
        if self.source not in (None, "measured"):
            shown += Markup(' <em class="source">{}</em>').format(self.source)
        return shown


class Fields:
    """The numbers of one report. `prefix` is the pointer to the report itself."""

    def __init__(self, report: Report, prefix: str = "") -> None:
        self.report, self.prefix = report, prefix

    def number(self, *path: Key, form: Form) -> Number | None:
        """The number at a path, None where there is none."""
        value = self._at(path)
        if value is None:
            return None
        if not isinstance(value, int | float):
            raise TypeError(f"{self._pointer(path)} is no number")
        return Number(value, self._pointer(path), form(value))

    def interval(self, *path: Key, form: Form, source: Source | None = None) -> Interval | None:
        """The `Value` or `Figure` at a path, None where there is none."""
        value = self._at(path)
        if value is None:
            return None
        assert isinstance(value, Value | Figure)
        middle = self.number(*path, "value", form=form)
        assert middle is not None
        low, high = (self.number(*path, end, form=form) for end in ("low", "high"))
        return Interval(middle, low, high, value.source if isinstance(value, Figure) else source)

    def _at(self, path: tuple[Key, ...]) -> object:
        value: object = self.report
        for key in path:
            if value is None:
                return None
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list):
                value = value[int(key)]
            else:
                value = getattr(value, str(key))
        return value

    def _pointer(self, path: tuple[Key, ...]) -> str:
        return self.prefix + "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in path)
