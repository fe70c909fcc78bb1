"""The plan of a profile before it runs (`--dry-run`), as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec
from rich.console import Console

from advisor.core.plan import PlannedTrial, total_s
from advisor.report.formats import clean
from advisor.report.naming import MISSING
from advisor.report.terminal import Line, emit, width_of, wrap

ESTIMATES = "All times are estimates from one H200 with vLLM 0.26; nothing was run and no GPU was touched."
_HEADER = ("engines", "MPS", "threads", "minutes", "")


def render(plan: Sequence[PlannedTrial], memory: Sequence[str], console: Console) -> None:
    """Print the trials with what each is for, the memory sums (`memory`, one line each) and the total time."""
    emit(_lines(plan, memory, width_of(console)), console)


def as_dict(plan: Sequence[PlannedTrial], memory: Sequence[str]) -> dict[str, Any]:
    """The same as plain data for JSON; seconds and minutes are estimates."""
    least, most = _counts(plan)
    shortest, longest = _minutes(plan)
    return {
        "trials": [msgspec.to_builtins(trial) for trial in plan],
        "memory": list(memory),
        "trials_least": least,
        "trials_most": most,
        "estimated_minutes_low": shortest,
        "estimated_minutes_high": longest,
        "note": ESTIMATES,
    }


def _lines(plan: Sequence[PlannedTrial], memory: Sequence[str], width: int) -> Iterator[Line]:
    least, most = _counts(plan)
    shortest, longest = _minutes(plan)
    if plan:
        count = f"{least}" if least == most else f"{least} to {most}"
        yield f"{count} trials, about {shortest:.0f} to {longest:.0f} minutes in all:", "bold"
        yield from _table(plan, width)
    else:
        yield "Nothing to run: not even one engine can be placed.", "bold yellow"
    if memory:
        yield "", ""
        yield "Memory:", "bold"
    for line in memory:
        yield from ((text, "") for text in wrap(f"  · {clean(line)}", width, "    "))
    yield "", ""
    yield from ((text, "dim") for text in wrap(ESTIMATES, width))


def _table(plan: Sequence[PlannedTrial], width: int) -> Iterator[Line]:
    # Trials that are alike stand in one row.
    alike = [list(group) for _, group in groupby(plan)]
    rows = [_HEADER, *(_cells(group[0], len(group)) for group in alike)]
    widths = [max(len(row[index]) for row in rows) for index in range(4)]
    for index, row in enumerate(rows):
        what = "  ".join(
            [row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), row[3].rjust(widths[3])]
        )
        style = "dim" if index == 0 or not alike[index - 1][0].certain else ""
        yield from ((text, style) for text in wrap(f" {what}  {row[4]}", width, " " * (len(what) + 3)))


def _cells(trial: PlannedTrial, times: int) -> tuple[str, ...]:
    threads = MISSING if trial.thread_percentage is None else f"{trial.thread_percentage} %"
    low, high = trial.estimated_s_low / 60, trial.estimated_s_high / 60
    minutes = f"{low:.1f}–{high:.1f}"
    if trial.kind == "numerics":
        return "check", "yes", threads, minutes, trial.purpose
    mps = "yes" if trial.mps else MISSING if trial.engines == 1 else "no"
    each = f" ({times} times, minutes each)" if times > 1 else ""
    return "N" if trial.engines is None else str(trial.engines), mps, threads, minutes, f"{trial.purpose}{each}"


def _counts(plan: Sequence[PlannedTrial]) -> tuple[int, int]:
    return sum(trial.certain for trial in plan), len(plan)


def _minutes(plan: Sequence[PlannedTrial]) -> tuple[float, float]:
    low_s, high_s = total_s(plan)
    return round(low_s / 60, 1), round(high_s / 60, 1)
