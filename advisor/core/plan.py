"""What `profile` may come to run, for `--dry-run`: the trials, and roughly how long each takes. Pure.

`search.Search` decides for real, from what has been measured. This lists every way it can go.
The seconds are estimates from one H200 with vLLM 0.26; another machine may be well outside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from advisor.core import tuning
from advisor.core.model import parameters
from advisor.core.quick import MOST_TOGETHER, PERCENTAGES_FROM
from advisor.core.records import EngineSettings, ModelFacts, Protocol, Question, Record, TrialKind, Workload
from advisor.core.search import LOADS, MPS_CLIENTS
from advisor.core.workload import prompt_tokens, turnover_tokens

Span = tuple[float, float]  # shortest, longest

# Observed: 79 to 117 s for the first engine on a bare machine; forked, with a warm compile cache, 14 to 45 s.
FIRST_START_S: Span = (60.0, 120.0)
LATER_START_S: Span = (14.0, 60.0)
TEARDOWN_S: Span = (1.0, 5.0)
NUMERICS_S: Span = (9.0, 120.0)
STEPS_S: Span = (8.0, 40.0)
# Prompt and output tokens per second, and those times the model's parameters. Observed in closed loops: 28,000
# (7B) and 81,000 (0.5B) with one engine, 268,000 (0.5B) with four; 0.4e14 to 2.2e14. With some room on both sides.
SLOW_TOK_PER_S, SLOW_PARAMETER_TOK_PER_S = 4e4, 1e14
FAST_TOK_PER_S, FAST_PARAMETER_TOK_PER_S = 6e5, 3e14


# What `tuning.rival` may try, in its order, after graphs up to the load.
TUNING = (
    "two API servers, if the GPU waits for the front end",
    "vLLM's Rust front end, if it still does",
    "8 tokens per streamed piece, if it still does",
    "twice the token budget, if the GPU is busy",
)


class PlannedTrial(Record, frozen=True):
    """One trial that may be run.

    `engines` None is the number that wins, not known yet; so is a `thread_percentage` that the purpose names.
    `certain`: it runs unless an earlier one fails; the others depend on what is measured.
    """

    kind: TrialKind
    engines: int | None
    mps: bool
    thread_percentage: int | None
    purpose: str
    certain: bool
    estimated_s_low: float
    estimated_s_high: float


def trial_plan(
    question: Question,
    model: ModelFacts,
    most_engines_by_memory: int,
    most_engines_by_cores: int,
    protocol: Protocol | None = None,
    default: EngineSettings | None = None,
) -> list[PlannedTrial]:
    """Every trial that `profile` may run, in order; empty when not even one engine can be placed.

    `most_engines_by_memory` and `most_engines_by_cores` are how many engines fit this GPU and this processor;
    `default` are the default engine's settings, which tell whether its graphs reach the load.
    """
    most = min(
        most_engines_by_memory,
        most_engines_by_cores,
        question.max_engines,
        question.workload.concurrency,
        MPS_CLIENTS,
    )
    protocol = protocol or Protocol()
    trial_s = _trial_s(question.workload, model, protocol)
    load = question.workload.concurrency
    larger = question.concurrency_auto or (default is not None and tuning.for_batch(default, load) != default)
    if most < 1:
        return []
    if protocol.quick:
        return list(_quick_trials(question, model, most, trial_s))
    return list(_trials(question, model, most, trial_s, protocol, larger))


def total_s(plan: Sequence[PlannedTrial]) -> Span:
    """Seconds of the whole profile: the certain trials at their shortest, all of them at their longest."""
    shortest = sum(trial.estimated_s_low for trial in plan if trial.certain)
    return shortest, sum(trial.estimated_s_high for trial in plan)


def _trials(
    question: Question, model: ModelFacts, most: int, trial_s: Span, protocol: Protocol, larger_graphs: bool
) -> Iterator[PlannedTrial]:
    # Under objectives two more loads are looked at where they are just missed.
    points = len(protocol.curve) + (2 if question.slo else 0)
    curve_s = points * (protocol.warmup_min_s + protocol.curve_min_s)

    def load(
        engines: int | None,
        purpose: str,
        *,
        mps: bool,
        percentage: int | None = None,
        certain: bool = False,
        start_s: Span = LATER_START_S,
        more_s: float = 0.0,
    ) -> PlannedTrial:
        # Smaller loads turn over faster or slower than the full one: the shortest windows, and twice that.
        span_s = _sum(start_s, trial_s, TEARDOWN_S, (more_s, 2 * more_s))
        return _planned("load", engines, mps, percentage, purpose, certain, span_s)

    first = "the default engine, which every gain is measured against"
    yield load(1, first, mps=False, certain=True, start_s=FIRST_START_S)
    if protocol.tune:
        if larger_graphs:
            yield load(1, "graphs up to the load", mps=False, certain=not question.concurrency_auto)
        for purpose in TUNING:
            yield load(1, purpose, mps=False)
        if protocol.confirm:
            yield load(1, "the default engine again, before a setting may beat it", mps=False)
    if question.concurrency_auto:
        for at in LOADS:
            yield load(1, f"the tuned engine at {at} in flight, until that brings under 5 %", mps=False)
        yield load(1, "the default and the tuned engine at the load that was found", mps=False, certain=True)
    if most >= 2:
        yield load(2, "what a second engine brings without MPS", mps=False, certain=True)
        yield load(2, "what MPS adds to that", mps=True, certain=True)
        if protocol.tune:
            yield load(2, "the same with default settings, if others were better for one engine", mps=True)
        for engines in range(3, most + 1):
            yield load(engines, f"only if engine {engines - 1} added 3 % or more", mps=True)
        winner = 2 if most == 2 else None
        if winner is None:
            yield load(None, "the winning number without MPS, if it is not 2", mps=False)
        if protocol.tune:
            yield load(winner, "the same with the settings that were not chosen, if there are two", mps=False)
            if protocol.other_settings and winner is None:
                yield load(None, "the winner with the settings that it does not have, tuned or default", mps=True)
        if protocol.equal_budget:
            yield load(winner, "one engine's token budget divided among them", mps=False, certain=True)
            yield load(winner, "the same under MPS", mps=True, certain=True)
        shares = _shares(question, model, winner)
        if shares:
            purpose = "are the model's matrix products right under the thread percentages"
            yield _planned("numerics", None, True, None, purpose, True, NUMERICS_S)
        for percentage, share in shares:
            purpose = f"{share} of the threads each, only if the products are right there"
            yield load(winner, purpose, mps=True, percentage=percentage)
    yield load(1, "what MPS itself costs", mps=True, certain=True)
    if protocol.starts > 1:
        again = "once more" if protocol.starts == 2 else f"{protocol.starts - 1} times more"
        also = ", and at smaller loads" if protocol.curve else ""
        if protocol.tune:
            yield load(1, f"the tuned engine {again}{also}", mps=False, more_s=curve_s)
        if most >= 2:
            yield load(None, f"the best without MPS {again}{also}", mps=False, certain=True, more_s=curve_s)
            yield load(None, f"the best under MPS {again}{also}", mps=True, certain=True, more_s=curve_s)
        yield load(1, f"the default engine {again}: does the machine drift", mps=False, certain=True)
        more = "another start of what is known too roughly, or may have been unlucky, with MPS or without"
        for _ in range(protocol.more_starts):
            yield load(None, more, mps=False)
    if protocol.gpu_alone and most >= 2:
        span_s = _sum(LATER_START_S, STEPS_S, TEARDOWN_S)
        yield _planned("steps", 1, False, None, "the tuned engine's GPU work alone: where its time goes", True, span_s)
        for mps in (False, True):
            purpose = f"the GPU's work alone of the best {'under' if mps else 'without'} MPS: do kernels overlap"
            yield _planned("steps", None, mps, None, purpose, True, span_s)


def _quick_trials(question: Question, model: ModelFacts, most: int, trial_s: Span) -> Iterator[PlannedTrial]:
    """What `quick.Quick` may run; how many engines there will be is read from the first window."""

    def load(engines: int | None, mps: bool, purpose: str, start_s: Span, *, certain: bool = True) -> PlannedTrial:
        return _planned("load", engines, mps, None, purpose, certain, _sum(start_s, trial_s, TEARDOWN_S))

    together = f", of {min(most, MOST_TOGETHER)} that are started together where memory allows" if most > 1 else ""
    yield load(1, False, f"the default engine{together}", FIRST_START_S)
    if most > 1:
        # From the same start where that has them all.
        yield load(None, False, "as many without MPS as its idle GPU asks for", (0.0, LATER_START_S[1]))
        if most >= PERCENTAGES_FROM and _shares(question, model, None):
            purpose = "are the model's matrix products right under the thread percentages"
            yield _planned("numerics", None, True, None, purpose, False, NUMERICS_S)
        yield load(None, True, "as many under MPS", LATER_START_S)
    yield load(1, False, "one setting that may help one engine", LATER_START_S, certain=False)


def _planned(
    kind: TrialKind, engines: int | None, mps: bool, percentage: int | None, purpose: str, certain: bool, span_s: Span
) -> PlannedTrial:
    return PlannedTrial(
        kind=kind,
        engines=engines,
        mps=mps,
        thread_percentage=percentage,
        purpose=purpose,
        certain=certain,
        estimated_s_low=span_s[0],
        estimated_s_high=span_s[1],
    )


def _shares(question: Question, model: ModelFacts, winner: int | None) -> list[tuple[int | None, str]]:
    """The thread percentages to come, in words too; None for one that depends on the winning number of engines."""
    wanted = question.thread_percentages
    # The numerics check covers unquantised products only, and unchecked percentages are not tried.
    if wanted == "none" or model.quantization is not None:
        return []
    if wanted == "auto":
        if winner is None:
            return [(None, f"{whole}/N %") for whole in (100, 150, 200)]
        wanted = [whole // winner for whole in (100, 150, 200)]
    return [(percentage, f"{percentage} %") for percentage in sorted(set(wanted)) if 0 < percentage < 100]


def _trial_s(workload: Workload, model: ModelFacts, protocol: Protocol) -> Span:
    """Seconds of warm-up and window, from the fastest and the slowest rate that is plausible for this model."""
    fast = min(FAST_TOK_PER_S, FAST_PARAMETER_TOK_PER_S / parameters(model))
    slow = min(SLOW_TOK_PER_S, SLOW_PARAMETER_TOK_PER_S / parameters(model))
    # A window that is not known well enough goes on.
    rough_s = max(0.0, protocol.precise_max_s - protocol.measure_min_s) if protocol.precision else 0.0
    return _trial_at_s(workload, protocol, fast), _trial_at_s(workload, protocol, slow) + rough_s


def _trial_at_s(workload: Workload, protocol: Protocol, tok_per_s: float) -> float:
    """Seconds of warm-up and window when prompt and output tokens together pass at `tok_per_s`."""
    prompts = workload.concurrency * prompt_tokens(workload)
    # Steady decode reads its prompts once, before the warm-up; the others read new ones with every turnover.
    once, per_turnover = (prompts, 0) if workload.kind == "decode" else (0, prompts)
    turnover_s = (per_turnover + turnover_tokens(workload)) / tok_per_s
    warmup_s = max(protocol.warmup_min_s, protocol.warmup_turnovers * turnover_s)
    window_s = max(protocol.measure_min_s, protocol.measure_turnovers * turnover_s)
    return once / tok_per_s + min(warmup_s, protocol.window_max_s) + min(window_s, protocol.window_max_s)


def _sum(*spans: Span) -> Span:
    return sum(span[0] for span in spans), sum(span[1] for span in spans)
