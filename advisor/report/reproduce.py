"""How to get the same again: commands, environment, software and machine, and how trials were run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

import msgspec

from advisor.core.records import Recommendation
from advisor.report import tables
from advisor.report.formats import gib, minutes, percent
from advisor.report.sheet import Sheet, count
from advisor.report.tables import Cell, Table


def exports(advice: Recommendation) -> list[str]:
    """Settings of the environment that no command has in itself."""
    written = "\n".join(advice.commands)
    settings = [f"{name}={shlex.quote(value)}" for name, value in advice.environment.items()]
    return [f"export {one}" for one in settings if one not in written]


def again(sheet: Sheet, source: str, replay: str) -> Iterator[tuple[str, str]]:
    yield "Measure again on such a machine", " ".join(_question(sheet))
    if replay:
        yield "Judge the recorded evidence again, on any machine", f"mps-advisor profile --replay {shlex.quote(replay)}"
    else:
        run = "mps-advisor profile --replay RUN"
        yield "Judge the evidence again, on any machine; RUN is the folder that the run was recorded in (--out)", run
    yield "Make this page again", f"mps-advisor report {shlex.quote(source)} --html page.html"


def _question(sheet: Sheet) -> Iterator[str]:
    """The command that asks the same question; what is as by default is left out."""
    report, asked = sheet.report, sheet.report.question
    load, model = asked.workload, report.model
    yield f"mps-advisor profile --model {shlex.quote(model.name)}"
    yield f"--ctx {_ends(load.isl_range) or load.isl}"
    if load.kind != "prefill":
        yield f"--osl {_ends(load.osl_range) or load.osl}"
    yield f"--workload {load.kind} --concurrency {'auto' if asked.concurrency_auto else load.concurrency}"
    yield f"--max-engines {asked.max_engines}"
    if asked.thread_percentages != "auto":
        told = asked.thread_percentages
        yield f"--thread-percentages {told if isinstance(told, str) else ','.join(map(str, told))}"
    yield f"--min-gain {asked.min_gain * 100:g}%"
    if asked.slo:
        yield f"--slo {','.join(f'{name}={limit:g}ms' for name, limit in asked.slo.items())}"
    if report.protocol.quick:
        yield "--protocol fast"
    yield f"--dtype {shlex.quote(model.dtype)}"
    if model.quantization:
        yield f"--quantization {shlex.quote(model.quantization)}"
    if model.kv_cache_dtype != "auto":
        yield f"--kv-cache-dtype {shlex.quote(model.kv_cache_dtype)}"
    if model.weights == "dummy":
        yield "--weights dummy"


def _ends(ends: tuple[int, int] | None) -> str:
    return f"{ends[0]}:{ends[1]}" if ends else ""


def machine(sheet: Sheet) -> Table:
    report, number = sheet.report, sheet.fields.number
    gpu, host, software = report.gpu, report.host, report.software
    rows: list[Sequence[Cell]] = [
        ("mps-advisor", software.advisor),
        ("vLLM", software.vllm),
        ("PyTorch", software.torch),
        ("Python", software.python),
        ("driver", gpu.driver),
        ("CUDA", gpu.cuda),
        ("GPU", gpu.name),
        ("SMs of the GPU", number("gpu", "sms", form=count)),
        ("memory of the GPU", number("gpu", "memory_total_bytes", form=gib)),
        ("power limit", number("gpu", "power_limit_w", form=_watts)),
        ("compute mode", gpu.compute_mode),
        ("processor", host.cpu),
        ("cores", ", ".join(map(str, host.cores))),
        ("memory of the host", number("host", "memory_bytes", form=gib)),
        ("kernel", host.kernel),
        ("fixed piece of work on a core", number("core_s", form=_ms_of_s)),
        ("probes of a core that were slowed", number("cores_slowed_pct", form=percent)),
        ("weights", report.model.weights),
        *(
            (("all trials took", number("timeline", len(report.timeline) - 1, "end_s", form=minutes)),)
            if report.timeline
            else ()
        ),
        ("report", f"{'replayed' if report.replayed else 'measured'} {report.created}"),
    ]
    return tables.of(f"{sheet.prefix}machine", "Software and machine", ("", "value"), rows, figures=9)


def _watts(value: float) -> str:
    return f"{value:,.0f} W"


def _ms_of_s(value: float) -> str:
    return f"{value * 1000:.1f} ms"


def environment(sheet: Sheet) -> Table | None:
    report = sheet.report
    rows: list[Sequence[Cell]] = [
        (name, value, "advised") for name, value in sorted(report.recommendation.environment.items())
    ]
    rows += [(name, value, "measured with") for name, value in sorted(report.software.environment.items())]
    headers = ("variable", "value", "")
    return tables.of(f"{sheet.prefix}environment", "Environment", headers, rows, figures=9) if rows else None


def protocol(sheet: Sheet) -> Table:
    told = msgspec.to_builtins(sheet.report.protocol)
    rows: list[Sequence[Cell]] = []
    for key, value in told.items():
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        shown = sheet.fields.number("protocol", key, form=_plain) if numeric else _said(value)
        rows.append((key.replace("_", " "), shown))
    return tables.of(f"{sheet.prefix}protocol", "How trials were run (s: seconds)", ("", "value"), rows)


def _plain(value: float) -> str:
    return f"{value:g}"


def _said(value: object) -> str | None:
    if isinstance(value, list):
        return ", ".join(f"{one:g}" for one in value) or "none"
    return None if value is None else "yes" if value else "no"
