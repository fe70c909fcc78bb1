"""Options that several verbs read alike, and where they print."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advisor.core.errors import BadQuestion

if TYPE_CHECKING:
    from rich.console import Console


class Format(StrEnum):
    table = "table"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="What to print on stdout; progress goes to stderr.")]


def share(text: str, option: str) -> float:
    """“10%” and “0.1” are the same share."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 <= value < (10 if text.endswith("%") else 1):
        raise BadQuestion(f"{option} is “{text}”; a share like 10% or 0.1 is expected")
    return value


def part(text: str, option: str) -> float:
    """A share of something that exists: less than all of it."""
    value = share(text, option)
    if value >= 1:
        raise BadQuestion(f"{option} is “{text}”; a share below 100%, like 10% or 0.1, is expected")
    return value


def shown(path: Path) -> str:
    """A path as text that can be printed, also where its name is no text at all."""
    return str(path).encode(errors="replace").decode()


def objectives(text: str) -> dict[str, float]:
    """“ttft_p95=200ms” and the like, in milliseconds."""
    from advisor.core.slo import parse

    try:
        return parse(text)
    except ValueError as error:
        raise BadQuestion(f"--slo: {error}") from None


def stdout() -> Console:
    """Standard output for text. When piped, lines are never cut or wrapped at the width of a terminal that is not
    there.
    """
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 80)
