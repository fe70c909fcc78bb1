"""An ablation on a screen: what several engines gain of the whole model and of its parts."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from advisor.core.records import AblatedStep, AblationReport, Figure, Variant
from advisor.report.formats import clean
from advisor.report.naming import MISSING
from advisor.report.terminal import Line, emit, warnings, width_of, wrap

_PARTS = ("whole", "attention", "MLP", "neither")


def render(report: AblationReport, console: Console) -> None:
    """Print the whole report."""
    emit(_lines(report, width_of(console)), console)


def _lines(report: AblationReport, width: int) -> Iterator[Line]:
    asked = report.ablation
    how = "taken apart on" if asked.parts else "with and without asynchronous scheduling on"
    parts = [" ".join([report.model.name, how, report.gpu.name]), f"vLLM {report.software.vllm or 'unknown'}"]
    parts += [] if asked.parts else [f"context {max(asked.contexts):,}"]
    yield from ((line, "bold") for line in wrap(" · ".join(parts), width))
    yield "", ""
    yield from ((line, "bold") for line in wrap(clean(report.sentence), width))
    if asked.parts:
        yield from _taken_apart(report, width)
    yield from _scheduling(report)
    yield from warnings(report.warnings, width)
    yield "", ""
    notes = []
    if asked.parts:
        notes.append(
            "attention: the model without its MLPs, so with projections and norms; MLP: without its attention; "
            "neither: embedding, norms, output head and sampling, which all of them have."
        )
        notes.append("expected: predicted, from the times of the parts added up.")
    notes.append("± are 90 % intervals within one start.")
    if report.replayed:
        notes.append("This report was replayed from a recorded run: nothing was measured now.")
    for note in notes:
        yield from ((line, "dim") for line in wrap(note, width, "  "))


def _taken_apart(report: AblationReport, width: int) -> Iterator[Line]:
    asked = report.ablation
    yield "", ""
    yield f"{asked.engines} engines under MPS against one, each with its share of the batch:", "bold"
    yield _row("step", "context", "batch", *_PARTS, "expected"), "dim"
    for one in report.steps:
        yield _row(*_step(one), *(_times(part.gain) for part in _parts(one)), _times(one.expected)), ""
    yield "", ""
    yield "The same against one engine with such a share: 1 where kernels only take turns:", "bold"
    yield _row("step", "context", "batch", *_PARTS), "dim"
    for one in report.steps:
        if one.kind == "decode":
            yield _row(*_step(one), *(_times(part.overlap) for part in _parts(one))), ""
    yield "", ""
    yield "A step of one engine, and the parts' sum over the whole:", "bold"
    yield _row("step", "context", "batch", *_PARTS, "sum"), "dim"
    for one in report.steps:
        closure = MISSING if one.closure is None else f"{one.closure.value:.2f}"
        yield _row(*_step(one), *(_time(part) for part in _parts(one)), closure), ""
    for why in {why: None for one in report.steps for part in _parts(one) if (why := part.why)}:
        yield from ((line, "") for line in wrap(f"  · {clean(why)}", width, "    "))


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


def _step(one: AblatedStep) -> tuple[str, str, str]:
    return one.kind, f"{one.context:,}", f"{one.sequences:,}"


def _row(kind: str, context: str, batch: str, *cells: str) -> str:
    return f"  {kind:8}{context:>7}{batch:>7}" + "".join(f"{cell:>11}" for cell in cells)


def _parts(one: AblatedStep) -> tuple[Variant, ...]:
    return one.whole, one.attention_only, one.mlp_only, one.rest_only


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
