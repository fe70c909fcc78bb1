"""The command line: parse, choose a Runner, call the flow, render, exit with the contract's code.

Heavy imports wait inside the commands, so that `--help` stays fast.
"""

from __future__ import annotations

import errno
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from advisor import __version__, cli_deploy, cli_gate, cli_plan, cli_report
from advisor.core.errors import AdvisorError, BadQuestion
from advisor.options import Format, FormatOption
from advisor.options import objectives as _objectives
from advisor.options import share as _share
from advisor.options import stdout as _stdout
from advisor.shell.interrupts import ignore_signals, stop_on_signals

if TYPE_CHECKING:
    from rich.console import Console

    from advisor.core.records import Report

# Typer carries Click under a name of its own in recent versions; both raise this for a malformed command line.
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

EXIT_UNFIT = 3
# What a machine's disks and limits answer, wherever that is met: no bug of ours, and nothing that a traceback explains.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EMFILE, errno.ENFILE)
EXIT_INTERRUPTED = 130
# What memory is first planned for; the largest batch that fits is looked for then.
ABLATED_BATCH = 256

app = typer.Typer(
    name="mps-advisor",
    help="How many vLLM engines should share one NVIDIA GPU under CUDA MPS? Measured, not guessed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class WorkloadName(StrEnum):
    serve = "serve"
    prefill = "prefill"
    decode = "decode"


class PromptsName(StrEnum):
    text = "text"
    token_ids = "token_ids"


class ProtocolName(StrEnum):
    fast = "fast"
    full = "full"


class Weights(StrEnum):
    auto = "auto"
    dummy = "dummy"


ModelOption = Annotated[
    str | None, typer.Option(help="Hugging Face id, folder with config.json, or a shipped model name.", metavar="M")
]
DtypeOption = Annotated[str, typer.Option(help="auto, bfloat16 or float16.")]
GpuOption = Annotated[str | None, typer.Option(help="GPU by index or UUID.", metavar="INDEX|UUID")]
WeightsOption = Annotated[Weights, typer.Option(help="auto: real weights if they are on this machine; dummy: never.")]
OutOption = Annotated[Path | None, typer.Option(help="Run folder for the raw evidence.", metavar="DIR")]
VllmOption = Annotated[str | None, typer.Option(help="How to start vLLM, if not by this Python.", metavar="COMMAND")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mps-advisor {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Example: mps-advisor doctor --gpu 0",
)
def doctor(
    gpu: GpuOption = None,
    format: FormatOption = Format.table,
) -> None:
    """Is this machine fit for a live run?

    One line per finding, with the remedy. Exit 0 fit, 3 unfit.
    """
    import json

    from advisor.core import doctor as judge
    from advisor.report import doctor as text
    from advisor.shell.inspect import inspect

    checks = judge.judge(inspect(gpu))
    fit = judge.fit(checks)
    if format is Format.json:
        typer.echo(json.dumps(text.as_json(checks, fit), indent=2, ensure_ascii=False))
    else:
        _stdout().print(text.table(checks, fit))
    raise typer.Exit(0 if fit else EXIT_UNFIT)


@app.command(
    epilog="Example: mps-advisor profile --model Qwen/Qwen2.5-0.5B --ctx 1024 (without a GPU: add --replay auto)",
)
def profile(
    model: ModelOption = None,
    ctx: Annotated[
        str | None, typer.Option(help="Prompt length in tokens (ISL); 256:2048 for mixed lengths.", metavar="N|A:B")
    ] = None,
    osl: Annotated[
        str, typer.Option(help="Output length in tokens; 64:256 for mixed lengths.", metavar="N|A:B")
    ] = "128",
    workload: Annotated[WorkloadName, typer.Option(help="What the requests look like.")] = WorkloadName.serve,
    prompts: Annotated[
        PromptsName, typer.Option(help="Whether engines have to tokenise their prompts, or are sent token ids.")
    ] = PromptsName.text,
    concurrency: Annotated[
        str,
        typer.Option(
            help="Requests in flight in total, equal for all candidates; auto: as many as the tuned engine grows with.",
            metavar="N|auto",
        ),
    ] = "256",
    max_engines: Annotated[
        int | None, typer.Option(min=1, help="Never try more engines than this. [default: 8]")
    ] = None,
    thread_percentages: Annotated[
        str, typer.Option(help="auto (100/N, 150/N, 200/N), none, or a list like 40,60.", metavar="auto|none|LIST")
    ] = "auto",
    min_gain: Annotated[
        str | None,
        typer.Option(
            help="What MPS has to bring over the best without it, lower bound included. "
            "[default: 10%; in a replay what was recorded]",
            metavar="PCT",
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            help="Latency to keep to: ttft, itl or e2e with p50, p95 or p99, like ttft_p95=200ms,itl_p95=30ms. The "
            "verdict is the highest throughput that does.",
            metavar="LIST",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    quantization: Annotated[str | None, typer.Option(help="vLLM's --quantization, fp8 for example.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="vLLM's --kv-cache-dtype.")] = "auto",
    gpu: GpuOption = None,
    weights: WeightsOption = Weights.auto,
    out: OutOption = None,
    vllm: VllmOption = None,
    resume: ResumeOption = False,
    protocol: Annotated[
        ProtocolName | None,
        typer.Option(
            help="fast: an answer in minutes from single starts; full: what decides is started again. "
            "[default: full; in a replay what was recorded]",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, the memory and the minutes; touch no GPU.")
    ] = False,
    replay: Annotated[
        str | None, typer.Option(help="Replay a recorded run instead of measuring.", metavar="auto|DIR")
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """Measure on this GPU and decide: how many engines.

    With MPS or without, at which thread percentages and with which settings.
    """
    from advisor import profiling

    asked = profiling.Asked(
        model=model,
        ctx=None if ctx is None else _lengths(ctx, "--ctx"),
        osl=_lengths(osl, "--osl"),
        workload=workload.value,
        concurrency=_concurrency(concurrency),
        max_engines=max_engines,
        thread_percentages=_percentages(thread_percentages),
        min_gain=None if min_gain is None else _share(min_gain, "--min-gain"),
        slo=None if slo is None else _objectives(slo),
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        gpu=gpu,
        weights=weights.value,
        out=out,
        resume=resume,
        vllm=vllm,
        protocol=None if protocol is None else protocol.value,
        prompts=prompts.value,
    )
    if dry_run:
        typer.echo(profiling.plan(asked, as_json=format is Format.json), nl=False)
        return
    if replay is not None:
        report = profiling.replayed(asked, replay, lambda text: typer.echo(text, err=True))
    else:
        report = profiling.live(asked, _stderr())
    _print(report, format)
    raise typer.Exit(0 if report.recommendation.status == "recommend" else 4)


@app.command(
    epilog="Example: mps-advisor ablate --model Qwen/Qwen2.5-3B --ctx 128,1024",
)
def ablate(
    model: ModelOption = None,
    ctx: Annotated[
        str | None, typer.Option(help="Context in tokens, or several: 128,512,1024.", metavar="N[,N…]")
    ] = None,
    async_scheduling: Annotated[
        str | None,
        typer.Option(
            help="Also turn asynchronous scheduling off and on under these loads: requests in flight, like 64,256. "
            "[default: not]",
            metavar="N[,N…]",
        ),
    ] = None,
    parts: Annotated[
        bool, typer.Option("--parts/--no-parts", help="Take the model apart, or only turn scheduling off and on.")
    ] = True,
    osl: Annotated[int, typer.Option(min=1, help="Output length in tokens under load.")] = 128,
    dtype: DtypeOption = "auto",
    gpu: GpuOption = None,
    weights: WeightsOption = Weights.auto,
    out: OutOption = None,
    vllm: VllmOption = None,
    resume: ResumeOption = False,
    replay: Annotated[
        str | None, typer.Option(help="Replay a recorded ablation instead of measuring.", metavar="auto|DIR")
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """What attention alone and MLPs alone gain from two engines.

    By the GPU's work alone, of the model without the other part, and what that lets expect of the whole model.
    """
    from advisor import ablating, profiling

    contexts = None if ctx is None else _numbers(ctx, "--ctx", 2)
    loads = [] if async_scheduling is None else _numbers(async_scheduling, "--async-scheduling", 1)
    if not parts and not loads:
        raise BadQuestion("--no-parts leaves nothing to measure; say the loads, for example --async-scheduling 64,256")
    if replay is not None:
        profiling.refuse_measuring(resume, out, gpu)
        report = ablating.replayed(model, contexts, replay, lambda text: typer.echo(text, err=True))
    else:
        if contexts is None:
            raise BadQuestion("--ctx is missing; give the context in tokens, for example --ctx 1024")
        asked = profiling.Asked(
            model=model,
            ctx=(max(contexts), None),
            osl=(osl, None),
            workload="serve",
            concurrency=ABLATED_BATCH,
            max_engines=ablating.ENGINES,
            thread_percentages="none",
            min_gain=None,
            slo=None,
            dtype=dtype,
            quantization=None,
            kv_cache_dtype="auto",
            gpu=gpu,
            weights=weights.value,
            out=out,
            resume=resume,
            vllm=vllm,
        )
        report = ablating.live(asked, contexts, loads, _stderr(), parts=parts)
    if format is Format.json:
        from advisor.report.as_json import dumps

        typer.echo(dumps(report))
    else:
        from advisor.report.ablation import render

        render(report, _stdout())
    taken_apart = any(one.expected_over_whole is not None for one in report.steps)
    turned = not report.ablation.parts and any(one.gain is not None for one in report.scheduling)
    raise typer.Exit(0 if taken_apart or turned else 4)


app.command(epilog=cli_deploy.EPILOG)(cli_deploy.deploy)
app.command(epilog=cli_gate.EPILOG)(cli_gate.gate)
app.command(epilog=cli_plan.EPILOG)(cli_plan.plan)
app.command(epilog=cli_report.EPILOG)(cli_report.report)


def _numbers(text: str, option: str, least: int) -> list[int]:
    """Whole numbers, ascending. (A context of a single token has no prompt to read.)"""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) >= least for word in words):
        raise BadQuestion(f"{option} is “{text}”; whole numbers from {least} on, like 128,1024, are expected")
    return sorted({int(word) for word in words})


def _print(report: Report, format: Format) -> None:
    if format is Format.json:
        from advisor.report.as_json import dumps

        typer.echo(dumps(report))
        return
    from advisor.report.terminal import render

    render(report, _stdout())


def _percentages(text: str) -> Literal["auto", "none"] | list[int]:
    match text:
        case "auto":
            return "auto"
        case "none":
            return "none"
    try:
        wanted = [int(word.strip().removesuffix("%").strip()) for word in text.split(",")]
    except ValueError:
        raise BadQuestion(
            f"--thread-percentages is “{text}”; auto, none or whole numbers like 40,60 are expected"
        ) from None
    if not all(1 <= percentage <= 100 for percentage in wanted):
        raise BadQuestion(f"--thread-percentages is “{text}”; each has to be from 1 to 100")
    return wanted


def _lengths(text: str, option: str) -> tuple[int, tuple[int, int] | None]:
    """A length in tokens, or the mean of a range and the range."""
    from advisor.core.workload import mean_and_range

    try:
        return mean_and_range(text)
    except ValueError as error:
        raise BadQuestion(f"{option}: {error}") from None


def _concurrency(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise BadQuestion(f"--concurrency is “{text}”; a whole number from 1 on, or auto, is expected")
    return int(text)


def _stderr() -> Console:
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            """Go on when nobody reads it any more: the library would exit here, in the middle of cleaning up."""

    return Patient(stderr=True, highlight=False)


def main() -> None:
    """Run the command line; every failure that a user can act on is one line on stderr."""
    stop_on_signals()
    try:
        code = app(standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # Typer answers an interrupt by itself, without a word
            raise KeyboardInterrupt
    except AdvisorError as error:
        with suppress(OSError):
            typer.echo(f"mps-advisor: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        ignore_signals()
        with suppress(OSError):  # the terminal may have been closed
            typer.echo("mps-advisor: interrupted; what was measured is kept, go on with --resume", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except _USAGE_ERROR as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; say nothing more
        sys.exit(1)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        with suppress(OSError):
            typer.echo(
                f"mps-advisor: {where}{error.strerror}; see that this can be written and has room, or choose other "
                "directories (--out, TMPDIR); what was measured is kept, go on with --resume",
                err=True,
            )
        sys.exit(EXIT_UNFIT)
    sys.exit(code if isinstance(code, int) else 0)
