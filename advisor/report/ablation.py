"""An ablation on a screen: what several engines gain of the whole model and of its parts."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from advisor.core.records import AblationReport, Figure, Variant
from advisor.report.terminal import MISSING, Line, clean, emit, width_of, wrap

_HEADER = ("step", "context", "whole", "attention only", "MLP only", "expected")


def render(report: AblationReport, console: Console) -> None:
    """Print the whole report."""
    emit(_lines(report, width_of(console)), console)


def _lines(report: AblationReport, width: int) -> Iterator[Line]:
    asked = report.ablation
    title = [report.model.name, "taken apart on", report.gpu.name]
    parts = [" ".join(title), f"vLLM {report.software.vllm or 'unknown'}", f"{asked.batch:,} sequences in all"]
    yield from ((line, "bold") for line in wrap(" · ".join(parts), width))
    yield "", ""
    yield from ((line, "bold") for line in wrap(clean(report.sentence), width))
    yield "", ""
    yield f"{asked.engines} engines under MPS against one, by the GPU's work alone:", "bold"
    yield _row(*_HEADER), "dim"
    for one in report.steps:
        gains = [_gain(part) for part in (one.whole, one.attention_only, one.mlp_only)]
        yield _row(one.kind, f"{one.context:,}", *gains, _times(one.expected)), ""
    yield "", ""
    yield "A step of one engine:", "bold"
    yield _row("step", "context", "whole", "attention only", "MLP only", "attention"), "dim"
    for one in report.steps:
        times = [_time(part) for part in (one.whole, one.attention_only, one.mlp_only)]
        share = MISSING if one.attention_share is None else f"{one.attention_share.value:.0f} %"
        yield _row(one.kind, f"{one.context:,}", *times, share), ""
    whys = {why: None for one in report.steps for part in (one.whole, one.attention_only, one.mlp_only)
            if (why := part.why)}  # fmt: skip
    for why in whys:
        yield from ((line, "") for line in wrap(f"  · {clean(why)}", width, "    "))
    for told in report.warnings:
        yield "", ""
        yield from ((line, "yellow") for line in wrap(f"Warning: {clean(told.text)}", width, "  "))
        if told.remedy:
            yield from ((line, "") for line in wrap(f"  → {clean(told.remedy)}", width, "    "))
    yield "", ""
    notes = ["± are 90 % intervals. Expected: the mean of the parts' gains, by their share of the time; predicted."]
    if report.replayed:
        notes.append("This report was replayed from a recorded run: nothing was measured now.")
    for note in notes:
        yield from ((line, "dim") for line in wrap(note, width, "  "))


def _row(kind: str, context: str, *cells: str) -> str:
    return f"  {kind:8}{context:>8}" + "".join(f"{cell:>15}" for cell in cells)


def _gain(part: Variant) -> str:
    return _times(part.gain)


def _times(figure: Figure | None) -> str:
    if figure is None:
        return MISSING
    if figure.low is None or figure.high is None:
        return f"{figure.value:.2f}×"
    return f"{figure.value:.2f}× ±{(figure.high - figure.low) / 2 / figure.value * 100:.0f}%"


def _time(part: Variant) -> str:
    return MISSING if part.step_ms is None else f"{part.step_ms.value:.2f} ms"
