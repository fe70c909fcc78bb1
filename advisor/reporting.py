"""What stands between the command line and a page: read reports or replay runs, write the page whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from advisor.core.errors import BadQuestion, DamagedRecord, Unfit
from advisor.options import shown
from advisor.report.as_json import dumps
from advisor.report.html import Source, page
from advisor.shell.reports import read_report
from advisor.shell.store import write


def read(where: Path) -> Source:
    """A report that `profile --format json` wrote, or that of a run folder, which is replayed. Raises as `read_report`,
    and Unfit where the name itself is refused.
    """
    try:
        return Source(read_report(where), shown(where), shown(where) if where.is_dir() else "")
    except OSError as error:
        raise Unfit(f"{shown(where)} cannot be read: {error.strerror}") from error


def as_json(sources: Sequence[Source]) -> str:
    """One report as it is, several as a list."""
    texts = [dumps(one.report) for one in sources]
    return texts[0] if len(texts) == 1 else "[\n" + ",\n".join(texts) + "\n]"


def refuse_place(html: Path, sources: Sequence[Path]) -> None:
    """Raise BadQuestion where the page has no place, or would take the place of what it is made of."""
    try:
        _refuse_place(html, sources)
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise Unfit(_unwritable(html, error)) from error


def _refuse_place(html: Path, sources: Sequence[Path]) -> None:
    if html.is_dir():
        raise BadQuestion(
            f"--html is {shown(html)}, a folder; give the name of a file, for example {shown(html / 'report.html')}"
        )
    if not html.parent.is_dir():
        raise BadQuestion(f"--html is {shown(html)}, but the folder {shown(html.parent)} does not exist; make it first")
    # A device or a pipe would be replaced by a file, not written to.
    if html.exists() and not html.is_file():
        raise BadQuestion(f"--html is {shown(html)}, which is no ordinary file; give the name of one")
    if html.exists() and any(one.exists() and html.samefile(one) for one in sources):
        raise BadQuestion(f"--html is {shown(html)}, the report itself; choose another name for the page")


def write_page(sources: Sequence[Source], html: Path) -> None:
    """Write the page of these reports; what was there before stays until it is complete.

    Raises DamagedRecord for numbers that no machine has, Unfit where the page cannot be written.
    """
    try:
        write(html, page(sources).encode())
    except OverflowError as error:
        names = ", ".join(one.name for one in sources)
        raise DamagedRecord(f"{names}: {error}; take an undamaged copy or write it again") from error
    except OSError as error:
        raise Unfit(_unwritable(html, error)) from error


def _unwritable(html: Path, error: OSError) -> str:
    return f"{shown(html)} cannot be written: {error.strerror}; choose another place for --html"
