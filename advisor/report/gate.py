"""A gate's verdict for whoever waits for it: a reader, a script, a test dashboard, a pull request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import msgspec

from advisor.core.gate import Check, Gate, State, Verdict
from advisor.report.formats import clean
from advisor.report.terminal import Line, wrap

HEADINGS: dict[Verdict, str] = {
    "passed": "Gate passed",
    "failed": "Gate failed",
    "undecided": "The gate cannot tell",
    "not_comparable": "Not comparable",
}
STATES: dict[State, str] = {"passed": "passed", "failed": "FAILED", "undecided": "cannot tell"}
STYLES: dict[State, str] = {"passed": "green", "failed": "bold red", "undecided": "bold yellow"}
SUITE = "mps-advisor gate"


def summary(gate: Gate, report: str, baseline: str | None) -> str:
    """One line: the verdict, of which reports, and what decided it."""
    against = f" against {clean(baseline)}" if baseline else ""
    told = f"{HEADINGS[gate.verdict]}: {clean(report)}{against}"
    names = _refused(gate) if gate.verdict == "not_comparable" else _bad(gate)
    return f"{told} ({', '.join(names)})" if names else told


def _refused(gate: Gate) -> list[str]:
    return [one.name for one in gate.differences if not one.allowed]


def _bad(gate: Gate) -> list[str]:
    """The checks that decided: those that failed, or else those that could not be decided."""
    for state in ("failed", "undecided"):
        if found := [one.name for one in gate.checks if one.state == state]:
            return found
    return []


# ---------------------------------------------------------------- for a reader


def lines(gate: Gate, report: str, baseline: str | None, width: int) -> Iterator[Line]:
    """The verdict, every check with what was asked and seen, every difference, and the notes."""
    yield from ((line, "bold") for line in wrap(summary(gate, report, baseline), width, "  "))
    names = max(len(one.name) for one in gate.checks)
    words = max(map(len, STATES.values()))
    for check in gate.checks:
        start = f"  {STATES[check.state]:{words}}  {check.name:{names}}  "
        yield from ((line, STYLES[check.state]) for line in wrap(start + _short(check), width, " " * len(start)))
    if gate.differences:
        yield "", ""
        yield "What differs from the baseline:", "bold"
    for one in gate.differences:
        allowed = " (allowed)" if one.allowed else f" (--allow {one.name} compares all the same)"
        told = f"  {one.name}: {clean(one.report)}; the baseline: {clean(one.baseline)}{allowed}"
        yield from ((line, "" if one.allowed else "bold yellow") for line in wrap(told, width, "    "))
    if gate.notes:
        yield "", ""
    for note in gate.notes:
        yield from ((line, "dim") for line in wrap(f"  {clean(note)}", width, "  "))


def _short(check: Check) -> str:
    # The differences have a list of their own.
    return "no, see below" if check.name == "comparable" and check.state != "passed" else _told(check)


def _told(check: Check) -> str:
    return f"{clean(check.seen)} (asked: {clean(check.asked)})"


# ---------------------------------------------------------------- for a script


def as_dict(gate: Gate, report: str, baseline: str | None) -> dict[str, Any]:
    return {"report": report, "baseline": baseline, **msgspec.to_builtins(gate)}


def as_json(gate: Gate, report: str, baseline: str | None) -> str:
    return json.dumps(as_dict(gate, report, baseline), indent=2, ensure_ascii=False, allow_nan=False)


# ---------------------------------------------------------------- for a test dashboard


def as_junit(gate: Gate, report: str, baseline: str | None) -> str:
    """JUnit's XML as dashboards read it: a check is a test case, a failed one a failure, an undecided one an error.

    Nothing was timed, so no times are given.
    """
    failures, errors = (sum(one.state == state for one in gate.checks) for state in ("failed", "undecided"))
    counts = {"tests": str(len(gate.checks)), "failures": str(failures), "errors": str(errors), "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": SUITE, **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": SUITE, **counts})
    for check in gate.checks:
        case = ElementTree.SubElement(suite, "testcase", {"classname": clean(report), "name": check.name})
        if check.state == "passed":
            ElementTree.SubElement(case, "system-out").text = _told(check)
            continue
        kind = "failure" if check.state == "failed" else "error"
        told = {"message": clean(check.seen), "type": check.state}
        ElementTree.SubElement(case, kind, told).text = _told(check)
    notes = [summary(gate, report, baseline), *map(clean, gate.notes)]
    ElementTree.SubElement(suite, "system-out").text = "\n".join(notes)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode")


# ---------------------------------------------------------------- for a pull request


def as_annotations(gate: Gate, report: str, baseline: str | None) -> str:
    """GitHub's workflow commands, one a line: an error or a warning for each check that did not pass, and a notice for
    the notes and a gate that passed.

    An undecided check is an error where it decides, because the job fails by it, and else a warning.
    """
    told = []
    for check in gate.checks:
        if check.state == "passed":
            continue
        decides = check.state == "failed" or gate.verdict == "undecided" or check.name == "comparable"
        told.append(_annotation("error" if decides else "warning", f"{SUITE}: {check.name}", _told(check)))
    if gate.verdict == "passed":
        told.append(_annotation("notice", SUITE, summary(gate, report, baseline)))
    told += [_annotation("notice", SUITE, clean(note)) for note in gate.notes]
    return "\n".join(told)


def _annotation(level: str, title: str, message: str) -> str:
    """A workflow command. What would end a line, a property or the list of them is written as GitHub's documentation
    of workflow commands has it.
    """
    data = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    named = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{level} title={named.replace(':', '%3A').replace(',', '%2C')}::{data}"
