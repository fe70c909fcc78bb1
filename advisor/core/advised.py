"""What a report advises: the candidate behind its recommendation, and a candidate's name in a few words. Pure."""

from __future__ import annotations

from advisor.core.records import Candidate, Recommendation, Report


def advised(report: Report) -> Candidate | None:
    """The candidate that is recommended, None without a recommendation."""
    advice = report.recommendation
    if advice.status != "recommend":
        return None
    same = [
        one
        for one in report.candidates
        if one.outcome == "ok"
        and one.engines == advice.engines
        and one.mps == bool(advice.mps)
        and (one.thread_percentages or None) == (advice.thread_percentages or None)
    ]
    return next((one for one in same if one.settings == advice.settings), same[0] if same else None)


def named(one: Candidate | Recommendation) -> str:
    """“4 engines under MPS at 50 %”."""
    name = f"{one.engines} engine" + ("s" if (one.engines or 0) > 1 else "")
    if one.thread_percentages:
        shares = "/".join(map(str, sorted(set(one.thread_percentages))))
        return f"{name} under MPS at {shares} %"
    if one.mps:
        return f"{name} under MPS"
    return f"{name} without MPS" if (one.engines or 0) > 1 else name
