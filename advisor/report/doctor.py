"""`doctor` as text: one line per check with its remedy below, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from advisor.core.doctor import Check
from advisor.report.terminal import NARROWEST, wrap

# Word, its style, what introduces the remedy. The words carry the meaning; colour only repeats it.
_WORDS = {"ok": ("ok", "green", ""), "warn": ("warn", "yellow", "note"), "fail": ("FAIL", "bold red", "fix")}


def table(checks: Sequence[Check], fit: bool) -> RenderableType:
    """The checks and a closing sentence. Wraps at any width; nothing is cut off."""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(max_width=16)
    grid.add_column(overflow="fold")
    for check in checks:
        word, style, label = _WORDS[check.state]
        # Text, not str: a str would lose "[gpu]" to rich's markup.
        what = Text(check.found)
        if check.remedy:
            what.append(f"\n{label}: {check.remedy}", style="bold")
        grid.add_row(Text(word, style=style), Text(check.name), what)
    return Group(grid, Text(""), Text("\n".join(wrap(_closing(checks, fit), NARROWEST))))


def as_json(checks: Sequence[Check], fit: bool) -> dict[str, Any]:
    """{"fit": bool, "checks": [{"name", "state", "found", "remedy"}, …]}."""
    return {"fit": fit, "checks": msgspec.to_builtins(list(checks))}


def _closing(checks: Sequence[Check], fit: bool) -> str:
    warnings = sum(check.state == "warn" for check in checks)
    failures = sum(check.state == "fail" for check in checks)
    if fit:
        return "This machine is fit for a live run" + (f" ({_count(warnings, 'warning')})." if warnings else ".")
    return (
        f"This machine is not fit for a live run ({_count(failures, 'failure')}); "
        "add --replay auto to a profile to see a recorded run."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
