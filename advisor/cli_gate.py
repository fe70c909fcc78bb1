"""The verb `gate`: options in, a verdict and its exit code out."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from advisor.core.errors import BadQuestion
from advisor.options import objectives, part, share, shown, stdout

EPILOG = (
    "Example: mps-advisor gate report.json --baseline main.json --max-regression 5% --expect engines=4,mps=true "
    "(docs/ci.md has a workflow)"
)

T = TypeVar("T")
R = TypeVar("R")


class GateFormat(StrEnum):
    table = "table"
    json = "json"
    junit = "junit"
    github = "github"


def gate(
    report: Annotated[
        Path, typer.Argument(help="What profile --format json wrote, or a run folder.", metavar="REPORT")
    ],
    baseline: Annotated[Path | None, typer.Option(help="An earlier report to compare with.", metavar="REPORT")] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            help="What has to be advised: engines=N, mps=true|false, thread_percentage=N|none.", metavar="LIST"
        ),
    ] = None,
    min_gain: Annotated[
        str | None,
        typer.Option(
            help="What MPS has to bring over the best without it, lower bound included, where it is advised.",
            metavar="PCT",
        ),
    ] = None,
    max_regression: Annotated[
        str | None,
        typer.Option(
            help="Throughput that may be lost against the baseline. An interval that straddles this is undecided, "
            "exit 4. [default: 5%]",
            metavar="PCT",
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            help="Latencies that what is advised has to keep to, like ttft_p95=200ms,itl_p95=30ms.", metavar="LIST"
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare although this differs: model, gpu, driver, vllm, precision, workload or slo. Several with "
            "commas, or given again.",
            metavar="NAME",
        ),
    ] = None,
    format: Annotated[
        GateFormat, typer.Option("--format", help="What to print on stdout: github gives annotations.")
    ] = GateFormat.table,
) -> None:
    """May this report pass?

    Exit 0 passed, 1 failed, 3 not comparable with the baseline, 4 it cannot be told.
    """
    from advisor.core import gate as core
    from advisor.core import slo as latencies
    from advisor.report import gate as text
    from advisor.shell.reports import read_report

    if baseline is None and (max_regression is not None or allow):
        option = "--allow" if allow else "--max-regression"
        raise BadQuestion(f"{option} compares with an earlier report; give it with --baseline")
    expected = {} if expect is None else _read(core.read_expected, expect, "--expect")
    allowed = _read(core.read_allowed, allow or [], "--allow")
    asked = core.Asked(
        expect=expected,
        min_gain=None if min_gain is None else share(min_gain, "--min-gain"),
        max_regression=core.DEFAULT_MAX_REGRESSION
        if max_regression is None
        else part(max_regression, "--max-regression"),
        slo={} if slo is None else objectives(slo),
        allow=allowed,
    )
    new = read_report(report)
    old = None if baseline is None else read_report(baseline)
    if name := latencies.unseen(asked.slo, new.workload.kind):
        raise BadQuestion(f"--slo: requests of a {new.workload.kind} report show no {name}; leave it out")
    found = core.judge(new, old, asked)
    names = shown(report), None if baseline is None else shown(baseline)
    if format is GateFormat.table:
        from advisor.report.terminal import emit, width_of

        console = stdout()
        emit(text.lines(found, *names, width_of(console)), console)
    else:
        write = {"json": text.as_json, "junit": text.as_junit, "github": text.as_annotations}[format.value]
        # Bytes: XML says that it is UTF-8, and JSON is, whatever the terminal's encoding.
        typer.echo(write(found, *names).encode())
        typer.echo(f"mps-advisor: {text.summary(found, *names)}", err=True)
    raise typer.Exit(found.exit_code)


def _read(reader: Callable[[T], R], given: T, option: str) -> R:
    """What `reader` makes of an option; its ValueError is the user's."""
    try:
        return reader(given)
    except ValueError as error:
        raise BadQuestion(f"{option}: {error}") from None
