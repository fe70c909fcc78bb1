"""Several reports beside each other: what they say, and in what their machines, software and questions differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from advisor.core.advised import advised
from advisor.core.records import Candidate, Report
from advisor.report import charts, naming
from advisor.report.fields import Interval
from advisor.report.formats import gib, milliseconds, percent, rate
from advisor.report.sheet import Sheet, full_name
from advisor.report.tables import Cell, Line, Table

# What may differ, in the order in which it is told, and the parts of it that say nothing of the machine or question.
PARTS = {
    "model": ("config",),
    "gpu": ("index",),
    "host": (),
    "software": (),
    "workload": (),
    "question": ("workload",),
    "protocol": (),
}
NAMES = {"gpu": "GPU", "host": "host", "question": "asked", "protocol": "protocol"}


def verdicts(sheets: Sequence[Sheet], letters: Sequence[str]) -> Table:
    """One column for each report."""
    rows: list[tuple[str, list[Cell]]] = [
        ("status", [STATUS_IN_WORDS[sheet.report.recommendation.status] for sheet in sheets]),
        ("verdict", [sheet.report.recommendation.sentence for sheet in sheets]),
        ("advised", [_name(sheet, _advised(sheet)) for sheet in sheets]),
        ("over the default engine", [_gain(sheet, "gain_vs_default") for sheet in sheets]),
        ("over the tuned engine", [_gain(sheet, "gain_vs_tuned") for sheet in sheets]),
        ("over the best without MPS", [_gain(sheet, "gain_vs_best_without_mps") for sheet in sheets]),
        ("what is advised gives", [_rate(sheet, _advised(sheet)) for sheet in sheets]),
        ("the default engine gives", [_rate(sheet, _default(sheet)) for sheet in sheets]),
        ("best without MPS", [_name(sheet, _without(sheet)) for sheet in sheets]),
        ("it gives", [_rate(sheet, _without(sheet)) for sheet in sheets]),
        ("best under MPS", [_name(sheet, _under(sheet)) for sheet in sheets]),
        ("it gives", [_rate(sheet, _under(sheet)) for sheet in sheets]),
        ("TTFT p95 of what is advised", [_latency(sheet, "ttft_ms") for sheet in sheets]),
        ("ITL p95 of what is advised", [_latency(sheet, "itl_ms") for sheet in sheets]),
        ("GPU idle with the default engine", [_idle(sheet, _default(sheet)) for sheet in sheets]),
        ("GPU idle with what is advised", [_idle(sheet, _advised(sheet)) for sheet in sheets]),
        ("recorded", [_origin(sheet.report) for sheet in sheets]),
    ]
    lines = [Line((label, *cells)) for label, cells in rows]
    return Table("compared", "The verdicts; brackets are 90 % intervals", ("", *letters), lines, figures=99)


STATUS_IN_WORDS = {
    "recommend": "recommended",
    "inconclusive": "inconclusive",
    "infeasible": "infeasible",
    "no_slo": "no SLO met",
}


def differences(reports: Sequence[Report], letters: Sequence[str]) -> Table:
    """Every fact of machine, software, model and question in which the reports are not all the same."""
    facts = [dict(_facts(report)) for report in reports]
    # Part by part: older reports lack some keys, which others then add at the end.
    parts = [NAMES.get(part, part) for part in PARTS]
    keys = sorted(dict.fromkeys(key for one in facts for key in one), key=lambda key: parts.index(key.split(":")[0]))
    lines = []
    for key in keys:
        values = [one.get(key) for one in facts]
        if any(value != values[0] for value in values):
            lines.append(Line((key, *(_shown(key, value) for value in values))))
    return Table("differences", "Where the reports differ", ("", *letters), lines, figures=99)


def parts_of(table: Table) -> str:
    """The parts in which reports differ and what of each, in words; empty where they do in none."""
    parts: dict[str, list[str]] = {}
    for line in table.lines:
        part, _, what = str(line.cells[0]).partition(": ")
        parts.setdefault(part, []).append(what)
    # Another model has another shape, another protocol many other values: the table has them.
    whole = [part for part, what in parts.items() if part == "protocol" or "name" in what]
    told = [part if part in whole else f"{part} ({', '.join(what)})" for part, what in parts.items()]
    return f"{', '.join(told[:-1])} and {told[-1]}" if len(told) > 1 else "".join(told)


def _facts(report: Report) -> Iterator[tuple[str, object]]:
    data: dict[str, Any] = msgspec.to_builtins(report)
    for part, left_out in PARTS.items():
        for key, value in data[part].items():
            if key in left_out:
                continue
            label = f"{NAMES.get(part, part)}: {key.replace('_', ' ')}"
            if isinstance(value, dict):
                yield from ((f"{label} {inner}", one) for inner, one in sorted(value.items()))
            else:
                yield label, value


def _shown(key: str, value: object) -> str:
    match value:
        case None:
            return naming.MISSING
        case bool():
            return "yes" if value else "no"
        case [int(first), *_, int(last)] if value == list(range(first, last + 1)):
            return f"{first}–{last}"
        case list() | tuple():
            return ", ".join(_shown("", one) for one in value) or "none"
        case int() if key.endswith(" bytes"):
            return f"{gib(value)} ({value})"
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def _advised(sheet: Sheet) -> Candidate | None:
    return advised(sheet.report)


def _default(sheet: Sheet) -> Candidate | None:
    return sheet.report.candidates[0] if sheet.report.candidates else None


def _without(sheet: Sheet) -> Candidate | None:
    """What MPS is compared with: its gain over the best without MPS is 1 by definition, its bounds included."""
    for one in sheet.report.candidates:
        gain = one.gain_vs_best_without_mps
        if gain is not None and not one.mps and gain.value == gain.low == gain.high == 1.0:
            return one
    return None


def _under(sheet: Sheet) -> Candidate | None:
    """What the credit leads to: what is advised under MPS, or the best that MPS gives."""
    found = charts.reached(sheet)
    return found[0] if found else None


def _name(sheet: Sheet, one: Candidate | None) -> str | None:
    return None if one is None else full_name(sheet.report, one)


def _index(sheet: Sheet, wanted: Candidate) -> int:
    return next(index for index, one in enumerate(sheet.report.candidates) if one is wanted)


def _gain(sheet: Sheet, key: str) -> Interval | None:
    against = 1 + sheet.report.question.min_gain if key == "gain_vs_best_without_mps" else None
    one = _advised(sheet)
    return sheet.gain("recommendation", key, source=one.source if one else None, against=against)


def _rate(sheet: Sheet, one: Candidate | None) -> Cell:
    if one is None:
        return None
    place = ("candidates", _index(sheet, one), "throughput_tok_per_s")
    return sheet.fields.interval(*place, form=rate, source=one.source)


def _latency(sheet: Sheet, key: str) -> Cell:
    one = _advised(sheet)
    return None if one is None else sheet.fields.number("candidates", _index(sheet, one), key, "p95", form=milliseconds)


def _idle(sheet: Sheet, one: Candidate | None) -> Cell:
    return None if one is None else sheet.fields.number("candidates", _index(sheet, one), "gpu_idle_pct", form=percent)


def _origin(report: Report) -> str:
    return f"replayed {report.created}" if report.replayed else f"measured {report.created}"
