"""The verb `report`: reports in, one page or what `profile` prints out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from advisor.options import Format, shown, stdout

EPILOG = "Example: mps-advisor report report.json --html report.html"


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Reports (files that profile --format json wrote) or run folders, which are replayed.",
            metavar="RUN_OR_REPORT",
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="Write one page that works offline; a file of that name is replaced.", metavar="FILE"),
    ] = None,
    format: Annotated[
        Format, typer.Option("--format", help="What to print on stdout; with --html nothing but JSON.")
    ] = Format.table,
) -> None:
    """Show a report, or several beside each other, on one page.

    Without --html on the terminal, as profile does. Exit 0 whatever the reports say.
    """
    from advisor import reporting

    if html is not None:
        reporting.refuse_place(html, sources)
    read = [reporting.read(where) for where in sources]
    if html is not None:
        reporting.write_page(read, html)
        typer.echo(f"wrote {shown(html)}", err=True)
    if format is Format.json:
        typer.echo(reporting.as_json(read))
    elif html is None:
        from advisor.report.terminal import render

        for number, one in enumerate(read):
            if number:
                typer.echo()
            render(one.report, stdout())
