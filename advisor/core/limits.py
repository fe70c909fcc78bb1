"""What kept a trial from being faster, as far as its evidence tells. Pure.

Thresholds are shares that leave no room for doubt rather than tuned values: a thread that computes 85 % of the time
cannot give much more, a GPU that is idle 10 % of the time cannot either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from advisor.core.cautions import LOAD_BUSY_PCT
from advisor.core.contention import WAITED_SHARE_MAX, longest_wait
from advisor.core.records import Measurement, RawEngine, RawTrial, Workload
from advisor.core.workload import output_tokens, prompt_tokens

What = Literal["load_generator", "gpu", "engine_core", "api_server", "token_budget", "kv_cache", "unattributed"]

GPU_IDLE_MAX_PCT = 10.0
THREAD_FULL_PCT = 85.0
# Of a Python process, whose threads share one interpreter lock and leave it only inside C code.
API_PROCESS_FULL_PCT = 130.0
BUDGET_STEPS_MIN = 0.5
SPIN_NOTE = "such a thread may also spin while it waits for the GPU, so the GPU was looked at first"


class Limit(NamedTuple):
    """What limited a trial, and the figures that say so, for a reader."""

    what: What
    evidence: str


class StepShares(NamedTuple):
    """Engine steps of a window by size: `graphed` and `ungraphed` are shares that add up to 1.

    `graphed`: steps of at most `bound_tokens` tokens, the largest bucket bound within max_cudagraph_capture_size, which
    can run as a captured graph; steps between that bound and the capture size are in the other share. `mean_tokens` is
    prompt and output tokens per step.
    """

    steps: float
    bound_tokens: int
    graphed: float
    ungraphed: float
    mean_tokens: float


class _Busy(NamedTuple):
    """The fullest thread of an engine's core, and the fullest thread and process of its API servers; % of a core."""

    engine: int
    core_pct: float | None
    thread_pct: float | None
    process_pct: float | None

    @property
    def core_fullness(self) -> float:
        return (self.core_pct or 0.0) / THREAD_FULL_PCT

    @property
    def api_fullness(self) -> float:
        return max((self.thread_pct or 0.0) / THREAD_FULL_PCT, (self.process_pct or 0.0) / API_PROCESS_FULL_PCT)

    @property
    def fullness(self) -> float:
        return max(self.core_fullness, self.api_fullness)


def limited_by(raw: RawTrial, measurement: Measurement) -> Limit | None:
    """What limited a load trial that may count; None for a trial without a window. The first rule that holds wins:

    1. `load_generator`: a load generator used at least 70 % of its core.
    2. `gpu`: the GPU was idle (no kernel running) at most 10 % of the window.
    3. `unattributed` when the GPU's activity was not recorded: the rules below need an idle GPU.
    4. `kv_cache`: an engine had requests waiting when the window ended, and preempted some in it or had no room for
       one more prompt: running requests hold on average their prompt and half of their answer.
    5. `engine_core`, `api_server`: of the busiest engine, the core's fullest thread at 85 % of a core or more; the API
       server's fullest thread at 85 % or its fullest process at 130 %. Of both, the one further above its threshold.
    6. `token_budget`: at least half of all engine steps computed more tokens than the largest bound of vLLM's
       histogram that is below max_num_batched_tokens. vLLM counts a prompt in the step that finishes it.
    7. `unattributed`.
    """
    if raw.window is None or raw.spec.workload is None:
        return None
    busy = _busiest(raw, raw.window[1] - raw.window[0])
    idle_pct = measurement.gpu_idle_pct
    processes = _processes(raw, busy)
    gpu = "GPU activity not recorded" if idle_pct is None else f"GPU idle {idle_pct:.0f} %"
    load_pct = measurement.load_cpu_pct
    if load_pct is not None and load_pct >= LOAD_BUSY_PCT:
        return Limit("load_generator", _told(f"load generator {load_pct:.0f} % of a core", processes, gpu))
    if idle_pct is not None and idle_pct <= GPU_IDLE_MAX_PCT:
        return Limit("gpu", _told(gpu, processes))
    if idle_pct is None:
        return Limit("unattributed", _told(processes, gpu))
    if cache := _full_cache(raw, raw.spec.workload):
        return Limit("kv_cache", _told(cache, processes, gpu))
    if busy is not None and busy.fullness >= 1:
        if busy.core_fullness >= busy.api_fullness:
            return Limit("engine_core", f"{_told(processes, gpu)}; {SPIN_NOTE}")
        return Limit("api_server", _told(processes, gpu))
    steps = _at_budget(raw)
    if steps is not None and steps[1] >= BUDGET_STEPS_MIN:
        told = f"{steps[1] * 100:.0f} % of the engine steps computed more than {steps[0]} tokens"
        return Limit("token_budget", _told(told, processes, gpu))
    return Limit("unattributed", _told(processes, gpu))


def api_fullness(raw: RawTrial) -> float | None:
    """How near the busiest API server is to what one process can do: from 1 on it is the limit. None if not seen."""
    if raw.window is None:
        return None
    busy = _busiest(raw, raw.window[1] - raw.window[0])
    return None if busy is None or busy.process_pct is None else busy.api_fullness


def step_shares(raw: RawTrial) -> StepShares | None:
    """Engine steps of the window, over all engines, by whether they can run as a captured CUDA graph.

    None where the front end has no such histogram, or no step or bound is there to tell. Whether a step ran as a full
    graph or in pieces cannot be told: vLLM 0.26 has no metric of it per step for dense models (its table of
    --cudagraph-metrics is filled by the older model runner only).
    """
    steps = _steps(raw)
    settings = raw.spec.settings
    if steps is None or settings is None:
        return None
    bounds = [bound for bound in steps if bound <= settings.max_cudagraph_capture_size]
    if not bounds:
        return None
    total, bound = steps[float("inf")], max(bounds)
    tokens = sum(
        after.generation_tokens + after.prompt_tokens - before.generation_tokens - before.prompt_tokens
        for engine in raw.engines
        if (before := engine.counters_start) is not None and (after := engine.counters_end) is not None
    )
    graphed = steps[bound] / total
    return StepShares(total, int(bound), graphed, 1 - graphed, tokens / total)


# ---------------------------------------------------------------- processes


def _busiest(raw: RawTrial, length_s: float) -> _Busy | None:
    """The engine that is nearest to the end of what one of its processes can do."""

    def most(values: Sequence[float | None]) -> float | None:
        return max((value / length_s * 100 for value in values if value is not None), default=None)

    engines = []
    for number in sorted({use.engine for use in raw.cpu if use.engine is not None}):
        cores = [use for use in raw.cpu if use.engine == number and use.role == "engine_core"]
        fronts = [use for use in raw.cpu if use.engine == number and use.role == "api_server"]
        engines.append(
            _Busy(
                number,
                most([use.main_thread_s for use in cores]),
                most([use.main_thread_s for use in fronts]),
                most([use.cpu_s for use in fronts]),
            )
        )
    return max((one for one in engines if one.core_pct or one.process_pct), key=lambda one: one.fullness, default=None)


def _processes(raw: RawTrial, busy: _Busy | None) -> str:
    if busy is None:
        return "CPU use of the engines not recorded"
    told = []
    if busy.core_pct is not None:
        told.append(f"engine core thread {busy.core_pct:.0f} % of a core")
    if busy.process_pct is not None:
        thread = "" if busy.thread_pct is None else f" thread {busy.thread_pct:.0f} %, process"
        told.append(f"API server{thread} {busy.process_pct:.0f} %")
    wait = longest_wait(raw, [busy.engine])
    if wait is not None and wait.share > WAITED_SHARE_MAX:
        told.append(f"{wait.who} waited {wait.share * 100:.0f} % of the window for a core")
    which = f" (engine {busy.engine}, the busiest of {raw.spec.engines})" if raw.spec.engines > 1 else ""
    return ", ".join(told) + which


def _told(*parts: str) -> str:
    return ", ".join(parts)


# ---------------------------------------------------------------- the KV cache


def _full_cache(raw: RawTrial, workload: Workload) -> str | None:
    for engine in raw.engines:
        before, after = engine.counters_start, engine.counters_end
        if before is None or after is None or after.waiting <= 0:
            continue
        preempted = after.preemptions - before.preemptions
        full = _has_no_room(engine, workload, after.running)
        if preempted > 0 or full:
            whose = f" of engine {engine.engine}" if raw.spec.engines > 1 else ""
            why = f"{preempted:.0f} preempted" if preempted > 0 else f"KV cache full at {after.running:.0f} requests"
            return f"{after.waiting:.0f} requests{whose} waiting at the window's end, {why}"
    return None


def _has_no_room(engine: RawEngine, workload: Workload, running: float) -> bool:
    if engine.kv_cache_tokens is None:
        return False
    prompt = prompt_tokens(workload)
    return running * (prompt + output_tokens(workload) / 2) + prompt > engine.kv_cache_tokens


# ---------------------------------------------------------------- steps


def _steps(raw: RawTrial) -> dict[float, float] | None:
    """Upper bound of tokens -> steps of at most so many inside the window, over all engines; with the bound infinity.

    None where an engine has no such counts, or none made a step.
    """
    total: dict[float, float] = {}
    for engine in raw.engines:
        before, after = engine.counters_start, engine.counters_end
        if before is None or after is None or "inf" not in after.steps_by_tokens:
            return None
        for bound, count in after.steps_by_tokens.items():
            more = count - before.steps_by_tokens.get(bound, 0.0)
            total[float(bound)] = total.get(float(bound), 0.0) + more
    return total if total.get(float("inf"), 0.0) > 0 else None


def _at_budget(raw: RawTrial) -> tuple[int, float] | None:
    """The largest bound below the token budget, and the share of steps that computed more than that."""
    steps = _steps(raw)
    if steps is None or raw.spec.settings is None:
        return None
    bounds = [bound for bound in steps if bound < raw.spec.settings.max_num_batched_tokens]
    if not bounds:
        return None
    bound = max(bounds)
    return int(bound), 1 - steps[bound] / steps[float("inf")]
