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
    yield from _scheduling(report)
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


def _scheduling(report: AblationReport) -> Iterator[Line]:
    if not report.scheduling:
        return
    yield "", ""
    yield "Asynchronous scheduling off and on, under load:", "bold"
    head = ("in flight", "engines", "async", "tok/s", "vs one without", "GPU idle", "stall", "E2E p50")
    yield _load_row(*head), "dim"
    for one in report.scheduling:
        rate = MISSING if one.throughput_tok_per_s is None else f"{one.throughput_tok_per_s.value:,.0f}"
        idle, stall = (
            MISSING if value is None else f"{value:.0f} %" for value in (one.gpu_idle_pct, one.cpu_stall_pct)
        )
        e2e = MISSING if one.e2e_ms is None else f"{one.e2e_ms.p50:,.0f} ms"
        gain = MISSING if one.gain is None else _ratio(one.gain.value, one.gain.low, one.gain.high)
        engines = f"{one.engines}{' MPS' if one.mps else ''}"
        yield (
            _load_row(
                f"{one.concurrency:,}", engines, "on" if one.async_scheduling else "off", rate, gain, idle, stall, e2e
            ),
            "",
        )
        if one.why:
            yield from ((line, "") for line in wrap(f"    {clean(one.why)}", 76, "    "))


def _load_row(*cells: str) -> str:
    return "  " + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (9, 9, 6, 9, 16, 10, 7, 12), strict=True))


def _row(kind: str, context: str, *cells: str) -> str:
    return f"  {kind:8}{context:>8}" + "".join(f"{cell:>15}" for cell in cells)


def _gain(part: Variant) -> str:
    return _times(part.gain)


def _times(figure: Figure | None) -> str:
    if figure is None:
        return MISSING
    return _ratio(figure.value, figure.low, figure.high)


def _ratio(value: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{value:.2f}×"
    return f"{value:.2f}× ±{(high - low) / 2 / value * 100:.0f}%"


def _time(part: Variant) -> str:
    return MISSING if part.step_ms is None else f"{part.step_ms.value:.2f} ms"
