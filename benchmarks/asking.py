"""How the benchmarks use `profile`'s own machinery: its options, its care for the machine, and a story of their own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from advisor import flow, profiling
from advisor.core.records import Manifest, WorkloadKind
from advisor.shell.interrupts import stop_on_signals


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of them have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True)
    made.add_argument("--out", required=True, type=Path)
    made.add_argument("--gpu")
    made.add_argument("--vllm")
    return made


def run(
    options: argparse.Namespace,
    story: Callable[[Manifest, flow.Runner], None],
    *,
    ctx: int,
    concurrency: int,
    workload: WorkloadKind = "serve",
) -> None:
    """Prepare the machine as `profile` does, and let `story` ask the runner for its trials. Concludes nothing."""

    stop_on_signals()
    asked = profiling.Asked(
        model=options.model, ctx=(ctx, None), osl=(128, None), workload=workload, concurrency=concurrency,
        max_engines=8, thread_percentages="none", min_gain=None, slo=None, dtype="auto", quantization=None,
        kv_cache_dtype="auto", gpu=options.gpu, weights="auto", out=options.out, resume=False, vllm=options.vllm,
    )  # fmt: skip
    with profiling.bench(asked, Console(stderr=True, highlight=False)) as bench:
        story(bench.manifest, bench.runner)
