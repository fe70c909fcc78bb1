"""The report on a screen: the verdict, the table of what was tried, and how to run what won.

Every line is laid out here and printed whole, so that a pipe receives the same text as an 80-column terminal.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from advisor.core.advised import advised, named
from advisor.core.records import Candidate, Caution, KernelPart, Percentiles, Report, Value
from advisor.core.wording import rate, times
from advisor.report import formats, naming
from advisor.report.formats import clean, milliseconds, percent, printable
from advisor.report.naming import KERNELS_IN_WORDS, LIMIT_IN_WORDS, MISSING, OUTCOME_IN_WORDS

NARROWEST, WIDEST = 80, 100

# Header and whether its cells stand to the right. The first three say what was tried, the rest what came of it.
COLUMNS = (
    (" engines", False),
    ("MPS", False),
    ("SMs each", True),
    ("tok/s", True),
    ("vs one", True),
    ("TTFT p95", True),
    ("ITL p95", True),
    ("SM active", True),
    ("GPU idle", True),
)
WHAT = 3

_WORD = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""")
_ASCII = str.maketrans({"–": "-", "►": ">", "×": "x", "±": "+-", "·": "|", "→": "->"})

Line = tuple[str, str]  # text, style


def render(report: Report, console: Console) -> None:
    """Print the whole report. Colour only underlines what the words already say."""
    emit(_lines(report, width_of(console)), console)


def width_of(console: Console) -> int:
    """Columns to lay text out for: what the console has, within what can hold the table and what reads well."""
    return min(max(console.width, NARROWEST), WIDEST)


def emit(lines: Iterable[Line], console: Console) -> None:
    """Print every line whole, neither wrapped nor cut, with stand-ins for what the encoding cannot show."""
    for text, style in lines:
        console.print(Text(_encodable(text, console.encoding), style=style), soft_wrap=True)


def _lines(report: Report, width: int) -> Iterator[Line]:
    verdict = list(_verdict(report, width))
    decided = report.recommendation.status == "recommend"
    yield from ((line, "bold") for line in _title(report, width))
    if not decided:
        yield from verdict
        yield "", ""
    yield from _table(report, width)
    if decided:
        yield from verdict
    yield from _where_from(report, width)
    yield from _over_loads(report, width)
    yield from _gpu_time(report)
    yield from _bullets("What limits them", _limits(report), width)
    yield from _bullets("What MPS costs", _cost(report), width)
    yield from _bullets("Why not the others", _why_not(report), width)
    yield from _how_to_run(report, width)
    yield from warnings(report.warnings, width)
    yield "", ""
    for note in _notes(report):
        yield from ((line, "dim") for line in wrap(note, width, "  "))


# ---------------------------------------------------------------- what was asked


def _title(report: Report, width: int) -> list[str]:
    parts = [clean(part) for part in naming.question(report)]
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]} · {part}"
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


# ---------------------------------------------------------------- the table


def _table(report: Report, width: int) -> Iterator[Line]:
    candidates = sorted(report.candidates, key=naming.simplicity)
    chosen = advised(report)
    marks, by_load = naming.marks(report), bool(report.question.slo)
    cells = [
        _cells(one, report.gpu.sms, marks.get(naming.changes(report, one), ""), one is chosen, by_load)
        for one in candidates
    ]
    done = [row for row, one in zip(cells, candidates, strict=True) if one.outcome == "ok"]
    headers = _headers(report)
    widths = [
        max(len(header), *(len(row[index]) for row in (cells if index < WHAT else done)), 0)
        for index, header in enumerate(headers)
    ]
    # Two spaces between columns as far as the width goes, from the left; never less than one.
    spare = width - sum(widths) - (len(COLUMNS) - 1)

    def join(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(wide) if right else cell.ljust(wide)
            for cell, wide, (_, right) in zip(row, widths, COLUMNS, strict=False)
        ]
        return "".join(f"{cell}{'  ' if index < spare else ' '}" for index, cell in enumerate(padded)).rstrip()

    yield join(headers), "dim"
    for one, row in zip(candidates, cells, strict=True):
        if one.outcome == "ok":
            yield join(row), "bold green" if one is chosen else ""
            continue
        what = join(row[:WHAT]) + "    "
        style = "red" if one.outcome == "wrong_results" else "dim"
        yield from ((line, style) for line in wrap(what + _failure(one), width, " " * len(what)))
    for change, mark in marks.items():
        yield from ((line, "dim") for line in wrap(f" [{mark}] {change}", width, "     "))


def _headers(report: Report) -> list[str]:
    names = {
        "tok/s": "prompts/s" if report.workload.kind == "prefill" else "tok/s",
        # Under objectives each candidate shows the load at which it keeps to them.
        "SM active": "in flight" if report.question.slo else "SM active",
    }
    return [names.get(header, header) for header, _ in COLUMNS]


def _cells(one: Candidate, all_sms: int, mark: str, chosen: bool, by_load: bool) -> list[str]:
    return [
        ("►" if chosen else " ") + str(one.engines) + (f" [{mark}]" if mark else ""),
        "yes" if one.mps else "no" if one.engines > 1 else MISSING,
        _sms(one, all_sms),
        _rate(one.throughput_tok_per_s),
        MISSING if one.gain_vs_default is None else f"{one.gain_vs_default.value:.2f}×",
        _p95(one.ttft_ms),
        _p95(one.itl_ms),
        str(one.concurrency or MISSING) if by_load else _percent(one.sm_active_pct),
        _percent(one.gpu_idle_pct),
    ]


def _sms(one: Candidate, all_sms: int) -> str:
    """SMs that each engine sees; without a thread percentage all of them; the percentage where they are unknown."""
    if one.sms_each is not None:
        return str(one.sms_each)
    if not one.thread_percentages:
        return str(all_sms)
    return "/".join(map(str, sorted(set(one.thread_percentages)))) + " %"


def _rate(rate: Value | None) -> str:
    if rate is None:
        return MISSING
    text = formats.rate(rate.value)
    if rate.low is None or rate.high is None or rate.value <= 0:
        return text
    half = (rate.high - rate.low) / 2 / rate.value * 100
    return f"{text} ±{half:.0f}%" if half >= 0.5 else f"{text} ±<1%"


def _p95(times: Percentiles | None) -> str:
    return MISSING if times is None else milliseconds(times.p95)


def _percent(share: float | None) -> str:
    return MISSING if share is None else percent(share)


def _failure(one: Candidate) -> str:
    words = OUTCOME_IN_WORDS[one.outcome]
    # What an engine said last is in the JSON; here the fact is enough.
    reason = clean(one.why_not or "")
    if one.outcome in ("crash", "timeout"):
        reason = reason.split("; ")[0]
    if not reason or reason.lower().startswith(words):
        return reason or words
    return f"{words} ({reason})"


# ---------------------------------------------------------------- the verdict and its reasons


def _verdict(report: Report, width: int) -> Iterator[Line]:
    advice = report.recommendation
    sentence = clean(advice.sentence)
    words = {"recommend": "", "inconclusive": "Inconclusive. ", "infeasible": "Infeasible. ", "no_slo": "No SLO met. "}
    style = "bold" if advice.status == "recommend" else "bold yellow"
    yield from ((line, style) for line in wrap(words[advice.status] + sentence, width))
    for reason in advice.because:
        yield from ((line, "") for line in wrap(f"  · {clean(reason)}", width, "    "))


def _cost(report: Report) -> list[str]:
    return report.recommendation.cost_of_mps if report.recommendation.mps else []


def _limits(report: Report) -> list[str]:
    """Of the default engine and of what is advised, or of the fastest where nothing is."""
    measured = [one for one in report.candidates if one.limited_by and one.limit_evidence]
    chosen = advised(report) or max(measured, key=rate, default=None)
    shown = [one for one in measured if one is report.candidates[0] or one is chosen]
    return [
        f"{naming.marked_name(report, one)}: {LIMIT_IN_WORDS[one.limited_by or '']} ({one.limit_evidence})"
        for one in shown
    ]


def _why_not(report: Report) -> list[str]:
    """Candidates that worked and lost, those with the same reason together; what failed says why in the table."""
    reasons: dict[str, list[str]] = {}
    for one in sorted(report.candidates, key=naming.simplicity):
        if one.outcome == "ok" and one.why_not:
            reasons.setdefault(one.why_not, []).append(naming.marked_name(report, one))
    return [f"{', '.join(who)}: {why}" for why, who in reasons.items()]


def _where_from(report: Report, width: int) -> Iterator[Line]:
    """The waterfall: what each change brought by itself, and the product."""
    steps = report.waterfall
    if not steps:
        return
    yield "", ""
    yield "Where the gain comes from:" if report.recommendation.mps else "What each step brings:", "bold"
    whole = 1.0
    for step in steps:
        whole *= step.factor.value
        yield from ((line, "") for line in wrap(f"  {times(step.factor):<22}{clean(step.change)}", width, " " * 24))
    advised = "" if report.recommendation.mps else "; the last steps are not advised"
    yield f"  {whole:.2f}× together, over the default engine{advised}", ""


def _over_loads(report: Report, width: int) -> Iterator[Line]:
    """Throughput and latency at each load of the candidates that were measured at several."""
    curves = [one for one in report.candidates if len(one.curve) > 1]
    if not curves:
        return
    rows = [("", "in flight", "tok/s", "TTFT p95", "ITL p95", "E2E p95")]
    for one in curves:
        for index, point in enumerate(one.curve):
            who = "" if index else naming.marked_name(report, one)
            latencies = (_p95(point.ttft_ms), _p95(point.itl_ms), _p95(point.e2e_ms))
            rows.append((who, str(point.concurrency), _rate(point.throughput_tok_per_s), *latencies))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    between = "  " if 2 * len(widths) + sum(widths) <= width else " "
    yield "", ""
    yield "Over the load:", "bold"
    for index, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(wide) for cell, wide in zip(row[1:], widths[1:], strict=True))]
        yield "  " + between.join(cells).rstrip(), "dim" if index == 0 else ""


def _bullets(heading: str, points: Sequence[str], width: int) -> Iterator[Line]:
    if points:
        yield "", ""
        yield f"{heading}:", "bold"
    for point in points:
        yield from ((line, "") for line in wrap(f"  · {clean(point)}", width, "    "))


# ---------------------------------------------------------------- how to run it


def _how_to_run(report: Report, width: int) -> Iterator[Line]:
    advice = report.recommendation
    written = "\n".join(advice.commands)
    settings = [f"{name}={shlex.quote(value)}" for name, value in advice.environment.items()]
    missing = [one for one in settings if one not in written]
    if not missing and not advice.commands:
        return
    yield "", ""
    yield "To run it:", "bold"
    for one in missing:
        yield f"  export {printable(one)}", ""
    first: list[str] = []
    for command in advice.commands:
        words = _WORD.findall(printable(command))
        other = _difference(first, words)
        if other:
            yield from ((line, "") for line in wrap(f"  and once more with {' '.join(other)}", width, "      "))
        else:
            yield from ((line, "") for line in _shell_lines(printable(command), words, width))
            first = words


def _difference(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The options in which two long commands differ, empty unless they are the same but for a few values."""
    if len(first) < 8 or len(first) != len(second):
        return []
    where = [index for index, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
    if not 1 <= len(where) <= 3:
        return []
    changed = []
    for index in where:
        word, option = second[index], second[index - 1] if index else ""
        if option.startswith("-") and "=" not in option and not word.startswith("-"):
            changed.append(f"{option} {word}")
        elif "=" in word:
            changed.append(word)
        else:
            return []
    return changed


def _shell_lines(command: str, words: Sequence[str], width: int) -> Iterator[str]:
    """A command on one line where it fits, else one option with its values a line, as a shell accepts it."""
    understood = " ".join(words) == command and not any(word.startswith("#") for word in words)
    if len(command) + 2 <= width or not understood:
        yield from (f"  {line}" for line in command.splitlines())
        return
    groups: list[list[str]] = [[]]
    program_seen = False
    for word in words:
        # Variables that are set for the command stand before its name.
        full = len(" ".join([*groups[-1], word])) > width - 8  # room for the indent and the backslash
        if groups[-1] and (not program_seen or word.startswith("--") or full):
            groups.append([])
        program_seen = program_seen or re.match(r"\w+=", word) is None
        groups[-1].append(word)
    for index, group in enumerate(groups):
        yield "      " * (index > 0) + "  " * (index == 0) + " ".join(group) + " \\" * (index < len(groups) - 1)


# ---------------------------------------------------------------- the GPU's work alone


def _gpu_time(report: Report) -> Iterator[Line]:
    """Where the time of a step goes when the GPU never waits, and how near to its ceilings that is."""
    profile = report.profile
    steps = [one for one in (profile.decode, profile.prefill) if one is not None] if profile else []
    if not steps:
        return
    yield "", ""
    yield "Where the GPU's time goes, with one engine that never waits:", "bold"
    heads = [
        f"{one.step.decode} decode at {one.step.decode_context:,}"
        if one.step.decode
        else f"{one.step.prefill} prompt{'s' * (one.step.prefill > 1)} of {one.step.prefill_tokens:,}"
        for one in steps
    ]
    yield _row("", heads), "dim"
    yield _row("a step", [f"{one.step_ms.value:.2f} ms" for one in steps]), ""
    for label, said in KERNELS_IN_WORDS.items():
        parts = [one.kernels.get(label) for one in steps]
        if any(part is not None and part.share.value >= 1 for part in parts):
            yield _row(said, [_part(part) for part in parts]), ""


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:18}" + "".join(f"{cell:>29}" for cell in cells)


def _part(part: KernelPart | None) -> str:
    if part is None:
        return MISSING
    near = f" ({part.of_roofline.value:.0f} % of its roofline)" if part.of_roofline else ""
    return f"{part.share.value:.0f} %{near}"


def warnings(told: Iterable[Caution], width: int) -> Iterator[Line]:
    """Each caution with its remedy."""
    for caution in told:
        yield "", ""
        yield from ((line, "yellow") for line in wrap(f"Warning: {clean(caution.text)}", width, "  "))
        if caution.remedy:
            yield from ((line, "") for line in wrap(f"  → {clean(caution.remedy)}", width, "    "))


# ---------------------------------------------------------------- notes


def _notes(report: Report) -> Iterator[str]:
    values = (value for one in report.candidates for value in (one.throughput_tok_per_s, one.gain_vs_default))
    if any(value is not None and value.low is not None for value in values):
        yield "± and the ranges in brackets are 90 % intervals."
    if report.protocol.starts > 1:
        yield "What was started again is quoted from its later starts; progress lines show every start."
    for one in report.candidates:
        if one.outcome == "ok" and one.source not in ("measured", None):
            yield f"{named(one)}: {one.source}, not measured."
    if report.workload.kind == "prefill":
        yield f"Each output token stands for a prompt of {report.workload.isl:,} tokens."
    if report.profile is not None and (bound := report.profile.throughput_bound) is not None:
        rates = [one.throughput_tok_per_s.value for one in report.candidates if one.throughput_tok_per_s]
        reached = f"; the best here reached {max(rates) / bound.value * 100:.0f} % of that" if rates else ""
        vendor = report.profile.ceilings is not None and report.profile.ceilings.source == "vendor"
        whose = ", as its vendor gives them," if vendor else ""
        most = f"{float(f'{bound.value:.2g}'):,.0f} {bound.unit}"
        yield f"By the GPU's ceilings{whose} no number of engines exceeds {most} under this load{reached}."
    if report.core_s is not None:
        slowed = report.cores_slowed_pct or 0.0
        yield (
            f"A verdict holds for cores as fast as these: {report.core_s * 1000:.1f} ms for a fixed piece of work"
            + (f"; in {slowed:.0f} % of the probes half as long again or more." if slowed >= 1 else ".")
        )
    if report.replayed:
        yield "This report was replayed from a recorded run: nothing was measured now."
        if report.recommendation.commands:
            yield "GPU and cores in the commands are those of the recorded machine."
    if report.model.weights == "dummy" and all(one.code != "dummy_weights" for one in report.warnings):
        yield "The weights are dummies of the right shape: the speed is measured, the generated text means nothing."


# ---------------------------------------------------------------- text


def wrap(text: str, width: int, hang: str = "") -> list[str]:
    """Whole words only: a path or an address stays in one piece, even where it is wider."""
    return textwrap.wrap(text, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)


def _encodable(text: str, encoding: str) -> str:
    if encoding.lower().startswith("utf"):
        return text
    return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
