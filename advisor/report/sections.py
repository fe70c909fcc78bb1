"""What the page says of one report, section by section: records in, texts, tables and figures out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from advisor.core.advised import advised
from advisor.core.records import Candidate, Caution, Profile
from advisor.core.wording import rate as speed
from advisor.report import charts, gpu_time, latency, naming, reproduce, tables
from advisor.report.fields import Form, Interval
from advisor.report.formats import milliseconds, percent, rate, terabytes, teraflops
from advisor.report.sheet import Drawn, Sheet, count, full_name, latencies_seen, objectives, ordered, predicted, times
from advisor.report.tables import Cell, Line, Table

STATUS = {
    "recommend": ("✔", "Recommended"),
    "inconclusive": ("?", "Inconclusive"),
    "infeasible": ("✘", "Infeasible"),
    "no_slo": ("✘", "No SLO met"),
}


class Section(NamedTuple):
    """Everything that the page says of one report."""

    letter: str
    prefix: str
    source: str
    asked: Sequence[str]
    mark: str
    status: str
    decided: bool
    sentence: str
    because: Sequence[str]
    headline: Sequence[tuple[str, Interval]]
    costs: Sequence[str]
    notes: Sequence[str]
    candidates: Drawn
    tried: Table
    seen: Table | None
    why_not: Sequence[str]
    limits: Sequence[str]
    waterfall: Drawn
    gains: Drawn
    latencies: Sequence[Drawn]
    gpu: Sequence[Drawn]
    found_out: Table | None
    overlaps: Table | None
    failed: Table | None
    unknown: Table | None
    guessed: Sequence[str]
    warnings: Sequence[Caution]
    exports: Sequence[str]
    commands: Sequence[str]
    again: Sequence[tuple[str, str]]
    machine: Table
    environment: Table | None
    protocol: Table


def section(sheet: Sheet, letter: str, source: str, replay: str) -> Section:
    """`source` is what the report was read from, `replay` the run folder as a user names it, empty if not known."""
    report, advice = sheet.report, sheet.report.recommendation
    mark, status = STATUS[advice.status]
    return Section(
        letter=letter,
        prefix=sheet.prefix,
        source=source,
        asked=naming.question(report),
        mark=mark,
        status=status,
        decided=advice.status == "recommend",
        sentence=advice.sentence,
        because=advice.because,
        headline=list(_headline(sheet)),
        costs=advice.cost_of_mps if advice.mps else [],
        notes=list(_notes(sheet)),
        candidates=charts.candidates(sheet),
        tried=_tried(sheet),
        seen=_seen(sheet),
        why_not=_why_not(sheet),
        limits=_limits(sheet),
        waterfall=charts.waterfall(sheet),
        gains=charts.gains(sheet),
        latencies=latency.latencies(sheet),
        gpu=[gpu_time.kernels(sheet, "decode"), gpu_time.kernels(sheet, "prefill"), gpu_time.idle(sheet)],
        found_out=_found_out(sheet),
        overlaps=_overlaps(sheet),
        failed=_failed(sheet),
        unknown=_unknown(sheet),
        guessed=[
            f"{full_name(report, one)}: {one.source}, not measured."
            for _, one in ordered(report)
            if one.outcome == "ok" and predicted(one)
        ],
        warnings=report.warnings,
        exports=reproduce.exports(advice),
        commands=advice.commands,
        again=list(reproduce.again(sheet, source, replay)),
        machine=reproduce.machine(sheet),
        environment=reproduce.environment(sheet),
        protocol=reproduce.protocol(sheet),
    )


# ---------------------------------------------------------------- the verdict


def _headline(sheet: Sheet) -> Iterator[tuple[str, Interval]]:
    best = advised(sheet.report)
    source = best.source if best else None
    for index, one in enumerate(sheet.report.candidates):
        if one is best:
            seen = sheet.fields.interval("candidates", index, "throughput_tok_per_s", form=rate, source=one.source)
            if seen is not None:
                yield sheet.unit, seen
    against = 1 + sheet.report.question.min_gain
    for key, label, near in (
        ("gain_vs_default", "over the default engine", None),
        ("gain_vs_tuned", "over the tuned engine", None),
        ("gain_vs_best_without_mps", "over the best without MPS", against),
    ):
        gain = sheet.gain("recommendation", key, source=source, against=near)
        if gain is not None:
            yield label, gain


def _notes(sheet: Sheet) -> Iterator[str]:
    report = sheet.report
    if report.replayed:
        yield "Replayed from a recorded run: nothing was measured when this report was made."
    if report.protocol.starts > 1:
        yield "What was started again is quoted from its later starts."
    if report.workload.kind == "prefill":
        yield f"Each output token stands for a prompt of {report.workload.isl:,} tokens."
    if report.model.weights == "dummy" and all(one.code != "dummy_weights" for one in report.warnings):
        yield "The weights are dummies of the right shape: the speed is measured, the generated text means nothing."


# ---------------------------------------------------------------- candidates


def _tried(sheet: Sheet) -> Table:
    """Every candidate, also what did not work, with what it gained."""
    report, fields = sheet.report, sheet.fields
    headers = [
        "candidate", sheet.unit, "over the default", "over the best without MPS", "SMs each", "limited by", "source",
    ]  # fmt: skip
    lines = []
    against = 1 + report.question.min_gain
    for index, one in ordered(report):
        if one.outcome != "ok":
            lines.append(Line([_called(sheet, one)], what_failed(one), "failed"))
            continue
        place = ("candidates", index)
        cells: list[Cell] = [
            fields.interval(*place, "throughput_tok_per_s", form=rate, source=one.source),
            sheet.gain(*place, "gain_vs_default", source=one.source),
            sheet.gain(*place, "gain_vs_best_without_mps", source=one.source, against=against),
            fields.number(*place, "sms_each", form=count),
            None if one.limited_by is None else naming.LIMIT_IN_WORDS.get(one.limited_by, one.limited_by),
            one.source,
        ]
        lines.append(Line([_called(sheet, one), *cells], kind="chosen" if one is advised(report) else ""))
    caption = "Every candidate; brackets are 90 % intervals, – is not known"
    return Table(f"{sheet.prefix}tried", caption, headers, lines, texts=2)


def what_failed(one: Candidate) -> str:
    """The outcome in words, with the reason."""
    said = naming.OUTCOME_IN_WORDS[one.outcome]
    return f"{said}: {one.why_not}" if one.why_not else f"{said}; no reason is given"


def _seen(sheet: Sheet) -> Table | None:
    """Latency, activity and energy of the candidates that worked."""
    report, fields = sheet.report, sheet.fields
    headers = [
        "candidate", "in flight", "TTFT p95", "ITL p95", "E2E p95", "SMs active", "GPU idle",
        "tokens per joule", "starts", "source",
    ]  # fmt: skip
    lines = []
    for index, one in ordered(report):
        if one.outcome != "ok":
            continue
        place = ("candidates", index)
        cells: list[Cell] = [
            fields.number(*place, "concurrency", form=count),
            *(fields.number(*place, key, "p95", form=milliseconds) for key in ("ttft_ms", "itl_ms", "e2e_ms")),
            fields.number(*place, "sm_active_pct", form=percent),
            fields.number(*place, "gpu_idle_pct", form=percent),
            fields.number(*place, "tokens_per_joule", form=_one_digit),
            fields.number(*place, "starts", form=count),
            one.source,
        ]
        lines.append(Line([_called(sheet, one), *cells], kind="chosen" if one is advised(report) else ""))
    caption = "Latency, activity and energy of those that worked; they come without an interval, – is not known"
    return Table(f"{sheet.prefix}seen", caption, headers, lines, texts=1) if lines else None


def _called(sheet: Sheet, one: Candidate) -> str:
    """The full name, with a mark and a word at what is advised."""
    label = full_name(sheet.report, one)
    return f"► {label} (advised)" if one is advised(sheet.report) else label


def _one_digit(value: float) -> str:
    return f"{value:,.1f}"


def _why_not(sheet: Sheet) -> list[str]:
    """Candidates that worked and lost, those with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for _, one in ordered(sheet.report):
        if one.outcome == "ok" and one.why_not:
            reasons.setdefault(one.why_not, []).append(full_name(sheet.report, one))
    return [f"{'; '.join(who)}: {why}" for why, who in reasons.items()]


def _limits(sheet: Sheet) -> list[str]:
    """Of the default engine and of what is advised, or of the fastest where nothing is."""
    report = sheet.report
    known = [one for one in report.candidates if one.limited_by and one.limit_evidence]
    shown = advised(report) or max(known, key=speed, default=None)
    return [
        f"{full_name(report, one)}: {naming.LIMIT_IN_WORDS.get(one.limited_by or '', one.limited_by)} "
        f"({one.limit_evidence})"
        for one in known
        if one is report.candidates[0] or one is shown
    ]


# ---------------------------------------------------------------- the GPU


FOUND_OUT: dict[str, tuple[str, Form]] = {
    "throughput_bound": ("no number of engines exceeds", rate),
    "gpu_throughput": ("one engine, if the GPU never waited", rate),
    "gpu_idle_pct": ("GPU idle with the best single engine", percent),
    "cpu_stall_pct": ("of it the host is at work, at least", percent),
    "overlap": ("by the GPU alone the best several under MPS reach of one engine", times),
    "host": ("what their gain under load has beyond that", times),
}


def _found_out(sheet: Sheet) -> Table | None:
    rows: list[Sequence[Cell]] = []
    profile = sheet.report.profile
    for key, (said, form) in FOUND_OUT.items():
        figure = sheet.fields.interval("profile", key, form=form)
        if figure is not None and profile is not None:
            one = getattr(profile, key)
            said += "" if one.unit in ("%", "×") else f", in {one.unit}"
            rows.append((said, figure, one.source))
    if profile is not None and profile.ceilings is not None:
        for key, said in (
            ("copy_bytes_per_s", "device memory, read and written"),
            ("bf16_flops_per_s", "bf16 products"),
        ):
            form = terabytes if key == "copy_bytes_per_s" else teraflops
            ceiling = sheet.fields.number("profile", "ceilings", key, form=form)
            rows.append((f"the GPU's ceiling for {said}", ceiling, profile.ceilings.source))
    caption = "What else was found out of this model on this GPU, with 90 % intervals where there are any"
    return tables.of(f"{sheet.prefix}found", caption, ("", "value", "source"), rows, texts=1) if rows else None


def _overlaps(sheet: Sheet) -> Table | None:
    rows: list[Sequence[Cell]] = []
    for index, one in enumerate(sheet.report.profile.overlaps if sheet.report.profile else []):
        who = f"{one.engines} engines {'under' if one.mps else 'without'} MPS"
        who += f" at {one.thread_percentage} %" if one.thread_percentage is not None else ""
        parts = ("overlap", "host", "busy", "rest")
        cells = [sheet.gain("profile", "overlaps", index, key) for key in parts]
        rows.append((who, *cells, one.overlap.source))
    caption = "How gains over the tuned engine divide: overlap × host, and host = busy × rest, with 90 % intervals"
    headers = ("engines", "overlap of kernels", "host", "GPU busy longer", "neither", "source")
    return tables.of(f"{sheet.prefix}overlaps", caption, headers, rows, texts=1) if rows else None


# ---------------------------------------------------------------- what was not measured


def _failed(sheet: Sheet) -> Table | None:
    rows = [
        (full_name(sheet.report, one), naming.OUTCOME_IN_WORDS[one.outcome], one.why_not or "no reason is given")
        for _, one in ordered(sheet.report)
        if one.outcome != "ok"
    ]
    headers = ("candidate", "outcome", "reason")
    caption = "Candidates that have no measurement"
    return tables.of(f"{sheet.prefix}failed", caption, headers, rows, figures=9) if rows else None


UNKNOWN = {
    "ceilings": "the GPU's ceilings",
    "throughput_bound": "what no number of engines exceeds",
    "gpu_idle_pct": "how long the GPU idles with the best single engine",
    "cpu_stall_pct": "for how much of it the host works",
    "gpu_throughput": "what one engine gives if the GPU never waits",
    "attention": "attention's share of a step",
    "mlp": "the MLPs' share of a step",
    "decode": "where a decode step's time goes",
    "prefill": "where a prefill step's time goes",
    "overlap": "how much the kernels of several engines overlap",
    "host": "what several engines gain by the host",
    "overlaps": "how the gains divide",
}


def _unknown(sheet: Sheet) -> Table | None:
    report = sheet.report
    rows: list[Sequence[Cell]] = [
        (UNKNOWN.get(key, key), gpu_time.why_no_profile(report, key))
        for key in Profile.__struct_fields__
        if report.profile is None or getattr(report.profile, key) in (None, [])
    ]
    if sheet.report.waterfall is None:
        rows.append(("the waterfall of credit", charts.waterfall(sheet).missing.removeprefix("Not known: ")))
    if not any(len(one.curve) > 1 for one in report.candidates):
        why = "this run measured one load only" if not report.protocol.curve else "no candidate got that far"
        rows.append(("throughput and latency over the load", why))
    unseen = set(objectives(report)) - set(latencies_seen(report))
    rows += [(latency.in_words(metric), "no candidate shows it") for metric in sorted(unseen)]
    caption = "What this report does not know, and why"
    headers = ("not known", "why")
    return tables.of(f"{sheet.prefix}unknown", caption, headers, rows, figures=9) if rows else None
