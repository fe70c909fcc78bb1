"""One self-contained page of one or several reports: it loads nothing, runs nothing, and prints.

Text from reports (names of models, messages, logs) is not trusted: the templates escape whatever is not markup made
here, and the page's own policy forbids scripts and every load.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from advisor import __version__
from advisor.core.records import Report
from advisor.report import compare, naming
from advisor.report.as_json import dumps, loads
from advisor.report.fields import Fields, Number
from advisor.report.formats import clean, printable
from advisor.report.sections import section
from advisor.report.sheet import Sheet
from advisor.report.sheet import shared as shared_by


class Source(NamedTuple):
    """A report, what it was read from as the user named it, and its run folder if that is known."""

    report: Report
    name: str
    run: str = ""


def page(sources: Sequence[Source]) -> str:
    """The whole page as text. Raises ValueError where a report holds an infinity or not-a-number."""
    # As the JSON has them: then every number on the page is one of its numbers.
    reports = [loads(dumps(one.report), one.name) for one in sources]
    several = len(reports) > 1
    shared = shared_by(reports)
    letters = [_letter(index) for index in range(len(reports))]
    sheets = [
        Sheet(
            report,
            Fields(report, f"/{index}" if several else ""),
            f"{letters[index].lower()}-" if several else "",
            shared,
        )
        for index, report in enumerate(reports)
    ]
    columns = [f"{letter} · {report.model.name}" for letter, report in zip(letters, reports, strict=True)]
    differences = compare.differences(reports, columns) if several else None
    return _environment().get_template("page.html").render(
        title=" and ".join(dict.fromkeys(naming.question(report)[0] for report in reports)),
        sections=[
            section(sheet, letter, one.name, one.run)
            for sheet, letter, one in zip(sheets, letters, sources, strict=True)
        ],
        verdicts=compare.verdicts(sheets, columns) if several else None,
        differences=differences,
        named=compare.parts_of(differences) if differences else "",
        version=__version__,
    )  # fmt: skip


def _letter(index: int) -> str:
    """A, B … Z, A1, B1 …"""
    turn, letter = divmod(index, len(ascii_uppercase))
    return ascii_uppercase[letter] + (str(turn) if turn else "")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("advisor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(verbatim=_verbatim, words=_words)
    return environment


def _shown(value: object) -> object:
    """What an expression of a template puts on the page: nothing unprintable, and a dash for what is not known."""
    if value is None:
        return naming.MISSING
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return clean(value)
    return value


def _verbatim(piece: str | Number) -> Markup:
    """A text with its spaces as they are, as of a command that is to be typed, without what cannot be printed."""
    return escape(piece if isinstance(piece, Number) else printable(piece))


def _words(command: str) -> Markup:
    """A command of which no word is broken after a hyphen while it fits on a line."""
    return Markup(" ").join(Markup("<span>{}</span>").format(word) for word in printable(command).split(" "))
