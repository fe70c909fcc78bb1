"""The verb `plan`: reports and a demand in, GPUs and money out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from advisor.core.errors import BadQuestion
from advisor.options import Format, FormatOption, objectives, part, shown, stdout

if TYPE_CHECKING:
    from advisor.core.capacity import Demand

EPILOG = "Example: mps-advisor plan report.json --rate 400/s --gpu-hour 3.50 (docs/plan.md works it by hand)"

T = TypeVar("T")


def plan(
    reports: Annotated[
        list[Path],
        typer.Argument(help="What profile --format json wrote, or run folders; each is one service.", metavar="REPORT"),
    ],
    rate: Annotated[
        list[str] | None,
        typer.Option(
            help="Requests per second, like 400/s: once for each report alike, or once per report in their order.",
            metavar="N/s",
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead: output tokens, like 2e9/day (s, min, h, day); as often as --rate.", metavar="N/day"
        ),
    ] = None,
    gpu_hour: Annotated[
        list[str] | None,
        typer.Option(help="What a GPU costs an hour, in any currency; as often as --rate.", metavar="PRICE"),
    ] = None,
    headroom: Annotated[
        str, typer.Option(help="What stays free: 30% loads GPUs to 70 % of what was measured.", metavar="PCT")
    ] = "30%",
    slo: Annotated[
        str | None,
        typer.Option(
            help="Count on the highest measured throughput that keeps to this, like ttft_p95=200ms. "
            "[default: what the report was asked for]",
            metavar="LIST",
        ),
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """GPUs for a demand, with the advice and without it.

    And what they cost, a month and a million tokens, and the energy that these take. Exit 4 where a report recommends
    nothing, or nothing that keeps to the objectives.
    """
    from advisor.core import capacity as core
    from advisor.report import capacity as text
    from advisor.shell.reports import read_report

    count = len(reports)
    demands = _each(_demands(rate or [], tokens or []), count, "--rate" if rate else "--tokens")
    try:
        prices = _each([core.read_price(one) for one in gpu_hour], count, "--gpu-hour") if gpu_hour else [None] * count
    except ValueError as error:
        raise BadQuestion(f"--gpu-hour: {error}") from None
    free, wanted = part(headroom, "--headroom"), {} if slo is None else objectives(slo)
    asked = [
        core.Asked(source=shown(path), report=read_report(path), demand=demand, gpu_hour=price)
        for path, demand, price in zip(reports, demands, prices, strict=True)
    ]
    found = core.plan(asked, free, wanted)
    if format is Format.json:
        typer.echo(text.as_json(found).encode())  # JSON is UTF-8, whatever the terminal's encoding
        return
    from advisor.report.terminal import emit, width_of

    console = stdout()
    emit(text.lines(found, width_of(console)), console)


def _demands(rate: list[str], tokens: list[str]) -> list[Demand]:
    from advisor.core.capacity import read_demand

    if bool(rate) == bool(tokens):
        raise BadQuestion(
            "the demand is expected as either --rate, like --rate 400/s, or --tokens, like --tokens 2e9/day"
        )
    option = "--rate" if rate else "--tokens"
    try:
        return [read_demand(one, "requests" if rate else "tokens") for one in rate or tokens]
    except ValueError as error:
        raise BadQuestion(f"{option}: {error}") from None


def _each(values: list[T], count: int, option: str) -> list[T]:
    """One for all, or one for each report."""
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise BadQuestion(
            f"{option} is given {len(values)} times for {count} reports; once for all or once per report is expected"
        )
    return values
