"""Where the GPU's time goes: sorts of kernels in a step that never waits, and how long it idles under load."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.core.records import Report, StepProfile
from advisor.report import figures, naming, tables
from advisor.report.figures import Piece, Row
from advisor.report.formats import percent
from advisor.report.sheet import Drawn, Sheet, drawn, full_name, ordered
from advisor.report.tables import Cell


def kernels(sheet: Sheet, which: str) -> Drawn:
    """How the time of one engine's fixed step divides among sorts of kernels; `which` is decode or prefill."""
    report, name = sheet.report, f"{sheet.prefix}kernels-{which}"
    title = f"Where a {which} step's GPU time goes"
    step: StepProfile | None = getattr(report.profile, which) if report.profile else None
    if step is None:
        return Drawn(name, title, (), missing=f"Not known: {why_no_profile(report, which)}.")
    takes = sheet.fields.interval("profile", which, "step_ms", form=two_digits)
    rows: list[Row] = []
    lines: list[Sequence[Cell]] = []
    for label, part in sorted(step.kernels.items(), key=lambda pair: -pair[1].share.value):
        place = ("profile", which, "kernels", label)
        share, near, sms = (sheet.fields.interval(*place, key, form=percent) for key in ("share", "of_roofline", "sms"))
        assert share is not None
        said = naming.KERNELS_IN_WORDS.get(label, label)
        text: list[Piece] = [share.middle]
        if near is not None:
            text += [" · ", near.middle, " of roofline"]
        rows.append(Row(said, text, part.share.value, share.middle))
        source = str(part.share.source)
        if near is not None and near.source != source:
            source += f", roofline {near.source}"
        lines.append((said, share.middle, near and near.middle, sms and sms.middle, source))
    if not rows:
        return Drawn(name, title, (), missing=f"Kernels are not known: {step.why or 'none was traced'}.")
    told = f"Shares of the time in which any kernel ran, for {step_in_words(step)}. The table has the numbers."
    drawings = drawn(
        figures.bars,
        rows,
        name,
        title,
        told,
        axis="% of the step's GPU time",
        most=max(10.0, min(sheet.shared.share * 1.05, 1e6)),
    )
    table = tables.of(
        f"{name}-data",
        "Kernels behind the figure; shares come without an interval",
        ("kernels", "share of the time", "of the roofline", "SMs with a block", "source"),
        lines,
        texts=1,
    )
    caption: list[Piece] = [f"One engine that never waits: {step_in_words(step)}."]
    if takes is not None:
        caption += [" A step takes ", *takes.pieces(), "."]
    if step.why:
        caption.append(f" Some could not be told: {step.why}.")
    return Drawn(name, title, caption, drawings, table)


def two_digits(value: float) -> str:
    return f"{value:,.2f} ms"


def step_in_words(one: StepProfile) -> str:
    step = one.step
    if step.decode:
        return f"{step.decode} requests decode one token each, at a context of {step.decode_context:,}"
    return f"{step.prefill} prompt{'s' * (step.prefill != 1)} of {step.prefill_tokens:,} tokens"


def idle(sheet: Sheet) -> Drawn:
    """How long the GPU idles under load with each candidate, and for how much of that the host works."""
    report, name, title = sheet.report, f"{sheet.prefix}idle", "How long the GPU idles under load"
    rows: list[Row] = []
    lines: list[Sequence[Cell]] = []
    for index, one in ordered(report):
        waits = sheet.fields.number("candidates", index, "gpu_idle_pct", form=percent)
        stall = sheet.fields.number("candidates", index, "cpu_stall_pct", form=percent)
        if waits is None:
            continue
        label = full_name(report, one)
        text: list[Piece] = [waits, " idle"]
        if stall is not None:
            text += [", ", stall, " host"]
        rows.append(Row(label, text, waits.value, waits, inner=None if stall is None else stall.value))
        active = sheet.fields.number("candidates", index, "sm_active_pct", form=percent)
        lines.append((label, waits, stall, active, one.source))
    if not rows:
        why = "this GPU does not show it (GPM needs Hopper or newer)" if not report.gpu.gpm else "it was not recorded"
        return Drawn(name, title, (), missing=f"Not known: {why}.")
    told = (
        "For each candidate the share of the window in which no kernel ran, and of that the part in which one of the "
    )
    told += "host's threads is shown to work. The table after the figure has the numbers."
    drawings = drawn(figures.bars, rows, name, title, told, axis="% of the window")
    caption = "The whole bar: no kernel on the GPU. The thin bar inside it: at least so long one of the host's threads "
    caption += "worked meanwhile."
    table = tables.of(
        f"{name}-data",
        "Idle time behind the figure; shares come without an interval",
        ("candidate", "GPU idle", "of it host at work, at least", "SMs active", "source"),
        lines,
        texts=1,
    )
    return Drawn(name, title, [caption], drawings, table)


def why_no_profile(report: Report, key: str) -> str:
    """Why a key of the profile is null, as far as the report tells."""
    if report.profile is None:
        return "the report has no profile"
    alone = ("decode", "prefill", "attention", "mlp", "gpu_throughput", "overlap", "host", "overlaps")
    kinds = {"serve": (), "prefill": ("decode",), "decode": ("prefill",)}[report.workload.kind]
    if key in kinds:
        return f"a {report.workload.kind} workload has no {key} step"
    if key in alone and not report.protocol.gpu_alone:
        return "this run did not repeat fixed steps on the GPU alone"
    if key in ("gpu_idle_pct", "cpu_stall_pct"):
        return "this GPU does not show it (GPM needs Hopper or newer)" if not report.gpu.gpm else "it was not recorded"
    if key in ("ceilings", "throughput_bound") and report.profile.ceilings is None:
        return "the ceilings of this GPU were neither measured nor given by its vendor"
    if key == "throughput_bound":
        eight_bits = report.model.quantization is not None or report.model.kv_cache_dtype.startswith("fp8")
        if eight_bits:
            return "eight-bit products are faster than the ceilings say"
        return "a candidate was faster than the ceilings allow, so that they are not those of this GPU"
    if key in ("attention", "mlp"):
        told = [step.why for step in (report.profile.decode, report.profile.prefill) if step is not None and step.why]
        return told[0] if told else "no step was traced"
    if key in ("overlap", "host", "overlaps"):
        return "no several engines under MPS were measured on the GPU alone"
    return "the steps on the GPU alone gave no rate"
