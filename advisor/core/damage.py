"""What cannot be true of any record: numbers that are no numbers, times that run backwards, totals that disagree.

Evidence may be bad and true: an engine that died, clients that were not attached. `validity` judges that. What stands
here was never measured: a file was damaged, edited or mixed up with another run's, and no verdict may rest on it. A
value that could have been measured (one bin with a few tokens more) cannot be told from one that was.

Every finding names the field, as a path from the record's root.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec

from advisor.core.histogram import empty
from advisor.core.records import (
    EngineSettings,
    GpuSamples,
    LogHistogram,
    Manifest,
    Protocol,
    RawEngine,
    RawLoad,
    RawTrial,
    Record,
    ServerCounters,
    TrialSpec,
    Workload,
)

_SAME_S = 1e-3  # two clocks' readings that differ by less are the same moment
# The generators' own count of tokens against its bins. One bin more or less is a measurement; a tenfold one is not.
_TOKENS_APART = 0.05
# By a field's unit, what nothing that runs for minutes on one machine exceeds. Far beyond what can be measured, so that
# only damage is refused: a GPU has 1e12 bytes at most, the largest product's error is recorded as 1e30.
_MOST_BY_UNIT = {"_s": 1e7, "_bytes": 1e15, "_pct": 150.0, "_w": 1e5, "_mhz": 1e5, "_j": 1e14}
_MOST_BY_NAME = {"worst_error": 1e30, "port": 65535.0, "throttle_reasons": 2.0**64}  # a set of 64 bits
_MOST = 1e12
_MOST_PID = 2.0**22  # Linux, PID_MAX_LIMIT
_PIDS = ("pid", "_pid", "_pids", "servers_start", "servers_end", "clients_start", "clients_end")
# A token's likelihood is at most 1; this much rounding is left to sums of float32.
_LOGPROB_MOST = 1e-3
# What a trial of today differs by in its protocol from its run's: how long a window of its kind lasts, and how long a
# start of tuned settings may take.
_OF_ONE_TRIAL = ("precision", "precise_max_s", "measure_min_s", "engine_start_timeout_s")
_AT_LEAST_1 = {
    "model": (
        "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size", "max_context",
    ),
    "gpu": ("sms", "memory_total_bytes"),
    "host": ("threads_per_core", "memory_bytes"),
    "question": ("max_engines",),
    "protocol": ("starts",),
    "ceilings": ("copy_bytes_per_s", "bf16_flops_per_s"),
}  # fmt: skip


def of_trial(raw: RawTrial) -> Iterator[str]:
    """Everything that cannot be true of this trial, whatever was measured and however it ended."""
    yield from _impossible(raw)
    # A wave of answers that ends while the window is opened leaves one of no length, or of less.
    if raw.spec.workload is None or raw.spec.workload.kind != "decode":
        yield from _bad_window(raw)
    yield from _walk(raw.spec, "spec")
    yield from _bad_spec(raw.spec)
    yield from _bad_timeline(raw)
    for number, load in enumerate(raw.loads):
        if raw.spec.protocol is not None and load.bin_s != raw.spec.protocol.bin_s:
            yield f"loads[{number}].bin_s is {load.bin_s}, but {raw.spec.protocol.bin_s} was asked for"
        yield from _bad_load(load, f"loads[{number}]")
    for number, engine in enumerate(raw.engines):
        yield from _bad_engine(engine, f"engines[{number}]", raw.window)
    if raw.gpu is not None:
        yield from _bad_samples(raw.gpu)
    for number, use in enumerate(raw.cpu):
        if use.main_thread_s is not None and use.main_thread_s > 1.1 * use.cpu_s + 1.0:
            yield f"cpu[{number}].main_thread_s is {use.main_thread_s}, more than all of its process ({use.cpu_s})"
    for number, step in enumerate(raw.steps):
        if any(later[0] < one[0] or later[1] < one[1] for one, later in pairwise(step.marks)):
            yield f"steps[{number}].marks run backwards"
    for number, trace in enumerate(raw.traces):
        if any(kernel.name >= len(trace.names) for kernel in trace.kernels):
            yield f"traces[{number}].kernels name kernels that are not among its names"


def impossible(raw: RawTrial) -> Iterator[str]:
    """Numbers that are no numbers, negative counts, lists out of step: nothing could even be computed from them."""
    yield from _impossible(raw)
    yield from _bad_window(raw)


def kept(raw: RawTrial) -> RawTrial:
    """A fresh trial as it may be put on record: itself, or without its evidence where that cannot be true.

    A driver or a server may have answered nonsense. On record it would make the whole run one that is refused; and
    what is no number has no place in JSON.
    """
    problems = list(of_trial(raw))
    if not problems:
        return raw
    told = f"the evidence cannot be true: {'; '.join(problems[:3])}"
    ended = {"ended": "refused", "detail": told} if raw.ended == "completed" else {}
    engines = [
        msgspec.structs.replace(one, counters_start=None, counters_end=None, prompt_logprobs=[]) for one in raw.engines
    ]
    nothing = {"window": None, "steal_s": None, "gpu": None, "numerics": None}
    none: dict[str, list[object]] = {
        "loads": [],
        "cpu": [],
        "strangers": [],
        "core_speeds": [],
        "steps": [],
        "traces": [],
    }
    bare = msgspec.structs.replace(raw, engines=engines, **ended, **nothing, **none)
    if any(of_trial(bare)):
        bare = msgspec.structs.replace(bare, engines=[], mps=None, foreign_pids=[], teardown=None, timeline=[])
    return bare


def _bad_window(raw: RawTrial) -> Iterator[str]:
    if raw.window is not None and not raw.window[0] < raw.window[1]:
        yield f"window: it ends at {raw.window[1]} s but starts at {raw.window[0]} s"


def _impossible(raw: RawTrial) -> Iterator[str]:
    for name in raw.__struct_fields__:
        if name != "spec":
            yield from _walk(getattr(raw, name), name)
    for number, load in enumerate(raw.loads):
        if not load.bin_s > 0:
            yield f"loads[{number}].bin_s is {load.bin_s}"
        if not len(load.tokens) == len(load.first_tokens) == len(load.completions):
            yield f"loads[{number}]: its lists of bins differ in length"
    for name in ("ttft", "itl", "e2e"):
        if len({(getattr(load, name).floor_s, getattr(load, name).ratio) for load in raw.loads}) > 1:
            yield f"loads: their {name} histograms have different bins"
    if raw.gpu is not None:
        gpu = raw.gpu
        samples = (gpu.at_s, gpu.power_w, gpu.sm_clock_mhz, gpu.memory_used_bytes, gpu.throttle_reasons)
        activity = (gpu.graphics_active_pct, gpu.sm_active_pct, gpu.sm_occupancy_pct, gpu.tensor_active_pct)
        if len({len(column) for column in samples}) > 1:
            yield "gpu: its lists of samples differ in length"
        if len({len(column) for column in (gpu.gpm_at_s, gpu.gpm_interval_s, gpu.dram_active_pct, *activity)}) > 1:
            yield "gpu: its lists of GPM rows differ in length"
    for number, engine in enumerate(raw.engines):
        before, after = engine.counters_start, engine.counters_end
        if before is not None and after is not None and not _counters_advance(before, after):
            yield f"engines[{number}].counters_end: its counters run backwards"


def of_manifest(manifest: Manifest) -> Iterator[str]:
    """Everything that cannot be true of a run's head."""
    for name in manifest.__struct_fields__:
        yield from _walk(getattr(manifest, name), name)
    for part, names in _AT_LEAST_1.items():
        if (record := getattr(manifest, part)) is not None:
            yield from _below_1(record, names, part)
    if manifest.gpu.power_limit_w == 0:
        yield "gpu.power_limit_w is 0"
    if not manifest.host.cores:
        yield "host.cores is empty; a run has cores"
    yield from _bad_workload(manifest.question.workload, "question.workload")
    yield from _bad_protocol(manifest.protocol, "protocol")
    yield from _bad_settings(manifest.settings, "settings")
    percentages = manifest.question.thread_percentages
    if isinstance(percentages, list) and not all(1 <= one <= 100 for one in percentages):
        yield f"question.thread_percentages is {percentages}; each has to be from 1 to 100"
    asked = manifest.ablation
    if asked is not None:
        if not asked.contexts or min([*asked.contexts, *asked.batches, *asked.loads]) < 1:
            yield "ablation has to name contexts, and batches and loads from 1 on"
        if len(asked.batches) != (len(asked.contexts) if asked.parts else 0):
            yield "ablation.batches: one for each context, and none where no part is taken out"
        if not asked.parts and not asked.loads:
            yield "ablation has neither parts nor loads"


def of_member(raw: RawTrial, manifest: Manifest) -> Iterator[str]:
    """What a sound trial says that cannot be of this run: of another machine, or of another way to measure."""
    if raw.gpu_uuid != manifest.gpu.uuid:
        yield f"gpu_uuid is {raw.gpu_uuid}, but the run was recorded on {manifest.gpu.uuid}"
    used = {core for cores in [*raw.spec.engine_cores, raw.spec.load_cores] for core in cores}
    if strange := used - set(manifest.host.cores):
        yield f"spec.engine_cores and load_cores name cores that the run's machine has not ({min(strange)})"
    if raw.numerics is not None and any(one.sms > manifest.gpu.sms for one in raw.numerics.results):
        yield f"numerics.results: more SMs than the run's GPU has ({manifest.gpu.sms})"
    held = [] if raw.gpu is None else [held for held in raw.gpu.memory_used_bytes if held is not None]
    if max(held, default=0) > manifest.gpu.memory_total_bytes:
        yield f"gpu.memory_used_bytes: more than the run's GPU has ({manifest.gpu.memory_total_bytes})"
    if raw.spec.protocol is not None:
        for name in raw.spec.protocol.__struct_fields__:
            told, wanted = getattr(raw.spec.protocol, name), getattr(manifest.protocol, name)
            if name not in _OF_ONE_TRIAL and told != wanted:
                yield f"spec.protocol.{name} is {told}, in the run's manifest {wanted}"


# ---------------------------------------------------------------- single numbers


def _walk(item: object, path: str, name: str = "") -> Iterator[str]:
    """Every number in `item` that is not finite, negative, or beyond what its unit allows."""
    if isinstance(item, bool | str) or item is None:
        return
    if isinstance(item, int | float):
        if not math.isfinite(item) or item < 0:
            yield f"{path} is {item}"
        elif item > _most(name):
            yield f"{path} is {item:.4g}, beyond anything that can be measured"
    elif isinstance(item, LogHistogram):
        yield from _walk(item.floor_s, f"{path}.floor_s", "floor_s")
        yield from _walk(list(item.counts.values()), f"{path}.counts", "counts")
        if not (item.floor_s > 0 and item.ratio > 1):
            yield f"{path} has bins from {item.floor_s} s in steps of {item.ratio}"
    elif isinstance(item, RawEngine):
        for field in item.__struct_fields__:
            # A process that a signal ended has a negative exit code, and a log-probability is negative.
            if field == "prompt_logprobs":
                if not all(math.isfinite(p) for prompt in item.prompt_logprobs for p in prompt):
                    yield f"{path}.{field} holds a number that is not finite"
            elif field != "exit_code":
                yield from _walk(getattr(item, field), f"{path}.{field}", field)
    elif isinstance(item, Record):
        for field in item.__struct_fields__:
            if field != "config":  # a model's config.json is a quotation
                yield from _walk(getattr(item, field), f"{path}.{field}", field)
    elif isinstance(item, dict):
        for key, each in item.items():
            yield from _walk(each, f"{path}.{key}", name)
    elif isinstance(item, list | tuple):
        if _all_plain(item, _most(name)):
            return
        for index, each in enumerate(item):
            yield from _walk(each, f"{path}[{index}]", name)


def _all_plain(items: Sequence[object], most: float) -> bool:
    """Whether these are numbers, or None, and nothing is wrong with any: the quick answer for long lists."""
    numbers = [one for one in items if isinstance(one, int | float)]
    if len(numbers) + sum(1 for one in items if one is None) < len(items):
        return False
    return not numbers or (min(numbers) >= 0 and max(numbers) <= most and math.isfinite(sum(numbers)))


def _most(name: str) -> float:
    """The largest value that a field of this name can have."""
    if name in _MOST_BY_NAME:
        return _MOST_BY_NAME[name]
    if name.endswith(_PIDS):
        return _MOST_PID
    unit = name[name.rfind("_") :] if "_" in name else ""
    return _MOST_BY_UNIT.get(unit, _MOST) if not name.endswith("_per_s") else 1e18


def _counters_advance(before: ServerCounters, after: ServerCounters) -> bool:
    return (
        before.at_s < after.at_s
        and before.generation_tokens <= after.generation_tokens
        and before.prompt_tokens <= after.prompt_tokens
        and before.prefix_cache_hits <= after.prefix_cache_hits
        and before.preemptions <= after.preemptions
        and all(steps <= after.steps_by_tokens.get(bound, 0.0) for bound, steps in before.steps_by_tokens.items())
    )


# ---------------------------------------------------------------- what a trial was asked


def _bad_spec(spec: TrialSpec) -> Iterator[str]:
    if spec.kind != "numerics" and spec.engines < 1:
        yield f"spec.engines is {spec.engines}; a trial of kind {spec.kind} has one or more"
    for percentage in [*spec.percentages, *([] if spec.thread_percentage is None else [spec.thread_percentage])]:
        if not 1 <= percentage <= 100:
            yield f"spec: a thread percentage of {percentage}; each has to be from 1 to 100"
    if spec.thread_percentage is not None and not spec.mps:
        yield "spec.thread_percentage is given, but spec.mps is false: only MPS has any"
    if spec.workload is not None:
        yield from _bad_workload(spec.workload, "spec.workload")
    if spec.protocol is not None:
        yield from _bad_protocol(spec.protocol, "spec.protocol")
    if spec.settings is not None:
        yield from _bad_settings(spec.settings, "spec.settings")


def _bad_workload(workload: Workload, path: str) -> Iterator[str]:
    yield from _below_1(workload, ("isl", "osl", "concurrency"), path)
    for name in ("isl_range", "osl_range"):
        between = getattr(workload, name)
        if between is not None and not 1 <= between[0] <= between[1]:
            yield f"{path}.{name} is {between}; from the least to the most, from 1 on, is expected"
    if workload.osl_spread >= workload.osl:
        yield f"{path}.osl_spread is {workload.osl_spread}, no less than osl ({workload.osl})"


def _bad_protocol(protocol: Protocol, path: str) -> Iterator[str]:
    for name in ("bin_s", "gpm_interval_s", "nvml_interval_s", "window_max_s", "measure_turnovers", "unsteady_log"):
        if not getattr(protocol, name) > 0:
            yield f"{path}.{name} is {getattr(protocol, name)}; more than 0 is expected"
    if not all(0 < share <= 1 for share in protocol.curve):
        yield f"{path}.curve is {protocol.curve}; shares of the load are expected"


def _bad_settings(settings: EngineSettings, path: str) -> Iterator[str]:
    names = ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "api_server_count", "stream_interval")
    yield from _below_1(settings, names, path)


def _below_1(record: Record, names: Sequence[str], path: str) -> Iterator[str]:
    for name in names:
        if getattr(record, name) < 1:
            yield f"{path}.{name} is {getattr(record, name)}; 1 or more is expected"


# ---------------------------------------------------------------- evidence that contradicts itself


def _bad_timeline(raw: RawTrial) -> Iterator[str]:
    for number, stage in enumerate(raw.timeline):
        if stage.end_s < stage.start_s:
            yield f"timeline[{number}] ({stage.name}) ends at {stage.end_s} s but starts at {stage.start_s} s"
    for number, (one, later) in enumerate(pairwise(raw.timeline), 1):
        if later.start_s < one.end_s - _SAME_S:
            yield f"timeline[{number}] ({later.name}) starts at {later.start_s} s, before {one.name} ended"
    named = "steps" if raw.spec.kind == "steps" else "window"
    measured = [stage for stage in raw.timeline if stage.name == named]
    if raw.window is not None and measured and raw.window[0] <= raw.window[1]:
        start, end = measured[0].start_s, measured[-1].end_s
        if raw.window[0] < start - _SAME_S or raw.window[1] > end + _SAME_S:
            yield f"window is {raw.window}, outside its stage of the timeline ({start} to {end} s)"


def _bad_load(load: RawLoad, path: str) -> Iterator[str]:
    began = sum(load.first_tokens)
    if sum(load.completions) != load.completed:
        yield f"{path}.completed is {load.completed}, its bins hold {sum(load.completions)}"
    if began > load.sent or load.completed + load.failed > load.sent:
        yield (
            f"{path}: {load.sent} requests were sent, {began} gave a first token, {load.completed} were completed and "
            f"{load.failed} failed"
        )
    counted = math.fsum(load.tokens)
    # The bins also hold what came of answers that failed or were cut off at the end; the total is of whole ones.
    more = counted - load.output_tokens if load.completed == load.sent else 0.0
    if max(more, load.output_tokens - counted) > _TOKENS_APART * max(counted, load.output_tokens):
        yield f"{path}.output_tokens is {load.output_tokens}, its bins hold {counted:.0f}"
    bins = empty()
    for name, most in (("ttft", began), ("e2e", load.completed), ("itl", load.chunks)):
        histogram = getattr(load, name)
        if (histogram.floor_s, histogram.ratio) != (bins.floor_s, bins.ratio):
            yield f"{path}.{name} has other bins than this program records"
        elif sum(histogram.counts.values()) > most:
            yield f"{path}.{name} holds {sum(histogram.counts.values())} durations, {most} are possible"
        elif any(not 0 <= number <= 2000 for number in histogram.counts):  # 1.02 ** 2000 * 1e-5 s: 50,000 years
            yield f"{path}.{name}.counts has a bin that no duration falls into"
    shortest, longest = load.prompt_tokens_min, load.prompt_tokens_max
    if (shortest is None) != (longest is None) or (shortest or 0) > (longest or 0):
        yield f"{path}.prompt_tokens_min is {shortest}, prompt_tokens_max {longest}"


def _bad_engine(engine: RawEngine, path: str, window: tuple[float, float] | None) -> Iterator[str]:
    if any(p > _LOGPROB_MOST for prompt in engine.prompt_logprobs for p in prompt):
        yield f"{path}.prompt_logprobs holds a log-probability above 0"
    for name in ("counters_start", "counters_end"):
        counters = getattr(engine, name)
        if counters is not None:
            yield from _bad_counters(counters, f"{path}.{name}")
    if window is not None:
        before, after = engine.counters_start, engine.counters_end
        # An engine that answered only once may have been asked at the window's end.
        if before is not None and after is not None and before.at_s > window[0] + _SAME_S:
            yield f"{path}.counters_start.at_s is {before.at_s}, after the window began ({window[0]})"
        if after is not None and after.at_s < window[1] - _SAME_S:
            yield f"{path}.counters_end.at_s is {after.at_s}, before the window ended ({window[1]})"


def _bad_counters(counters: ServerCounters, path: str) -> Iterator[str]:
    steps = list(counters.steps_by_tokens.values())
    if any(later < one for one, later in pairwise(steps)):
        yield f"{path}.steps_by_tokens falls, but each bound counts all below it"
    elif steps and steps[-1] > 1.01 * counters.engine_steps + 10:  # several API servers' sums are not of one moment
        yield f"{path}.engine_steps is {counters.engine_steps}, its buckets hold {steps[-1]}"


def _bad_samples(gpu: GpuSamples) -> Iterator[str]:
    for name in ("at_s", "gpm_at_s"):
        for number, (one, later) in enumerate(pairwise(getattr(gpu, name)), 1):
            if later < one:
                yield f"gpu.{name}[{number}] is {later}, before the sample that it follows"
    if any(interval <= 0 for interval in gpu.gpm_interval_s):
        yield "gpu.gpm_interval_s holds an interval of no length"
    if gpu.energy_start_j is not None and gpu.energy_end_j is not None and gpu.energy_end_j < gpu.energy_start_j:
        yield f"gpu.energy_end_j is {gpu.energy_end_j}, less than at the start ({gpu.energy_start_j})"
