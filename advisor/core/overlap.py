"""How much the kernels of several engines overlap: fixed steps on all engines at once against one engine alone. Pure.

gain of N engines = overlap × host. The overlap is what the GPU alone gives, measured by steps that never wait for
Python; what a gain under load has beyond that is the host's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from advisor.core.intervals import LogMean, Variance, add, log_ratio, mean_of_logs, value_of
from advisor.core.records import RawTrial, Record, Value, Workload
from advisor.core.workload import output_tokens, prompt_tokens

# A block needs several marks: between two of them steps are taken to be done evenly.
BLOCKS_MAX, MARKS_PER_BLOCK = 8, 3
FEWEST_MARKS = 12


class StepRate(Record, frozen=True):
    """One fixed step on all engines of a trial: tokens per second together, and the mean time of a step in ms."""

    tok_per_s: Value
    step_ms: float
    mean: LogMean


def step_rate(raw: RawTrial, step: int) -> StepRate | str:
    """What the `step`-th of a trial's steps gave while all engines were at it; a text says why there is no rate."""
    rows = [row for row in raw.steps if row.step == step]
    if len(rows) != raw.spec.engines:
        return f"{len(rows)} of {raw.spec.engines} engines ran it"
    if refused := next((row.refused for row in rows if row.refused), ""):
        return refused
    if any(len(row.marks) < FEWEST_MARKS for row in rows):
        return "it was not repeated often enough"
    # Then it is not the GPU alone that is measured.
    if waited := next((row for row in rows if not row.graphed), None):
        return f"the GPU waited for Python: {waited.detail or 'it was launched kernel by kernel'}"
    low = max(row.marks[1][0] for row in rows)
    high = min(row.marks[-1][0] for row in rows)
    if high <= low:
        return "the engines did not run it at the same time"
    count = min(BLOCKS_MAX, min(len(row.marks) - 1 for row in rows) // MARKS_PER_BLOCK)
    edges = [low + (high - low) * index / count for index in range(count + 1)]
    done = [[_done(row.marks, edge) for edge in edges] for row in rows]
    seconds = (high - low) / count
    blocks = [
        sum(row.tokens * (after - before) for row, (before, after) in zip(rows, spans, strict=True)) / seconds
        for spans in zip(*(pairwise(counts) for counts in done), strict=True)
    ]
    if min(blocks) <= 0:
        return "an engine stood still"
    mean = mean_of_logs(blocks)
    steps = sum(counts[-1] - counts[0] for counts in done)
    return StepRate(
        tok_per_s=value_of(*mean),
        step_ms=(high - low) * len(rows) / steps * 1000,
        mean=mean,
    )


def rate_alone(raw: RawTrial, workload: Workload) -> LogMean | str:
    """Output tokens per second of the workload if the GPU did nothing but these steps, on logarithms; a text says why
    that is not known.

    A request takes isl / p + (osl - 1) / d seconds of the GPU, with p and d the tokens per second of the prefill and
    of the decode step: its first token comes with its prompt, and a decode workload has no prompt to read. The error is
    that of the two rates, each by its share of the time.
    """
    parts: list[tuple[float, LogMean]] = []  # seconds a request, and the rate that they hang on
    for index, step in enumerate(raw.spec.steps):
        seen = step_rate(raw, index)
        if isinstance(seen, str):
            return seen
        if step.prefill:
            tokens = prompt_tokens(workload)
        else:
            tokens = output_tokens(workload) - (1 if workload.kind == "serve" else 0)
        parts.append((tokens / seen.tok_per_s.value, seen.mean))
    total = sum(seconds for seconds, _ in parts)
    if total <= 0:
        return "no step was asked for"
    variance, dof = add([Variance((mean.log_se * seconds / total) ** 2, mean.dof) for seconds, mean in parts])
    return LogMean(math.log(output_tokens(workload) / total), math.sqrt(variance), dof)


def overlap(several: StepRate, one: StepRate) -> Value:
    """How many times one engine's tokens per second several engines reach together, with its 90 % interval."""
    return value_of(*log_ratio(several.mean, one.mean))


def _done(marks: Sequence[tuple[float, int]], at: float) -> float:
    """Steps done at a time within the marks, between two of them in proportion."""
    index = min(max(bisect_right(marks, at, key=lambda mark: mark[0]), 1), len(marks) - 1)
    (left, before), (right, after) = marks[index - 1], marks[index]
    return before + (after - before) * (at - left) / (right - left)
