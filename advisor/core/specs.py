"""What a candidate's trial is told: its engines' settings, memory, cores and load. Pure."""

from __future__ import annotations

import msgspec

from advisor.core import cores, memory, settings, tuning
from advisor.core.records import EngineSettings, Manifest, Step, TrialSpec, Workload
from advisor.core.workload import as_served, output_tokens


def percentages(manifest: Manifest, engines: int) -> list[int]:
    """The thread percentages worth trying for this many engines; 100 is the same as none and left out."""
    wanted = manifest.question.thread_percentages
    if wanted == "none":
        return []
    if wanted == "auto":
        wanted = [100 // engines, 150 // engines, 200 // engines]
    return sorted({p for p in wanted if 0 < p < 100})


def memory_plan(manifest: Manifest, engines: int, base: EngineSettings | None = None) -> memory.MemoryPlan:
    """How this many engines with the settings `base` (or the default engine's) share the GPU's memory."""
    told = base or manifest.settings
    return memory.plan(
        manifest.gpu,
        manifest.model,
        max_num_batched_tokens=told.max_num_batched_tokens,
        max_num_seqs=told.max_num_seqs,
        workload=as_served(manifest.question.workload),
        engines=engines,
    )


def engine_settings(manifest: Manifest, engines: int, base: EngineSettings | None = None) -> EngineSettings:
    """The settings `base` (or the default engine's) with this many engines' share of the memory."""
    kv_bytes = memory_plan(manifest, engines, base).kv_bytes
    if kv_bytes is None:
        raise ValueError(f"{engines} engines do not fit; ask whether they can be tried first")
    told = msgspec.structs.replace(base or manifest.settings, max_model_len=manifest.settings.max_model_len)
    return settings.with_kv_bytes(told, manifest.model, kv_bytes)


def load_spec(
    manifest: Manifest,
    engines: int,
    *,
    mps: bool,
    percentage: int | None = None,
    base: EngineSettings | None = None,
) -> TrialSpec:
    """The load trial of one candidate at the load that was asked for."""
    placed = cores.plan(manifest.host.cores, engines)
    if placed is None:
        raise ValueError(f"{engines} engines cannot be placed; ask whether they can be tried first")
    return TrialSpec(
        kind="load",
        engines=engines,
        mps=mps,
        thread_percentage=percentage,
        settings=engine_settings(manifest, engines, base),
        workload=manifest.question.workload,
        # What only chooses need not be known as well as what is quoted.
        protocol=msgspec.structs.replace(
            manifest.protocol,
            precision=manifest.protocol.first_precision,
            precise_max_s=manifest.protocol.first_max_s,
            measure_min_s=manifest.protocol.first_min_s or manifest.protocol.measure_min_s,
        ),
        engine_cores=placed.engine_cores,
        load_cores=placed.load_cores,
        label=tuning.label(base or manifest.settings, manifest.settings),
    )


def among(manifest: Manifest, spec: TrialSpec, working: int) -> TrialSpec:
    """The same engines, of which only the first `working` get requests and share all cores; the others rest."""
    placed = cores.plan(manifest.host.cores, working)
    if placed is None or not 0 < working <= spec.engines:
        raise ValueError(f"{working} of {spec.engines} engines cannot be placed; ask whether they can first")
    idle = spec.engines - working
    return msgspec.structs.replace(
        spec, engines=working, idle_engines=idle, engine_cores=[*placed.engine_cores, *([[]] * idle)]
    )


def at_load(spec: TrialSpec, concurrency: int, *, short: bool = False) -> TrialSpec:
    """The same engines with other requests in flight, in a `short` window if the point only belongs to a curve."""
    if spec.workload is None or spec.protocol is None:
        raise ValueError("only a load trial has a load")
    workload = msgspec.structs.replace(spec.workload, concurrency=concurrency)
    protocol = spec.protocol
    if short:
        protocol = msgspec.structs.replace(protocol, measure_min_s=protocol.curve_min_s, precision=0.0)
    kept = [part for part in spec.label.split("-") if part and not part.startswith("load")]
    label = "-".join([*kept, f"load{concurrency}"])
    return msgspec.structs.replace(spec, workload=workload, protocol=protocol, label=label)


def asking(manifest: Manifest, concurrency: int) -> Manifest:
    """The manifest as if this load had been asked for."""
    workload = msgspec.structs.replace(manifest.question.workload, concurrency=concurrency)
    return msgspec.structs.replace(manifest, question=msgspec.structs.replace(manifest.question, workload=workload))


# How long a fixed step is repeated, and how often it is traced on the first engine of one.
STEP_S, TRACED = 3.0, 3


def steps_spec(one: TrialSpec) -> TrialSpec:
    """The GPU's work alone for the engines of this load trial, one engine traced: what front ends do is left out."""
    if one.workload is None or one.settings is None:
        raise ValueError("only a load trial has steps")
    base = msgspec.structs.replace(one.settings, api_server_count=1, stream_interval=1, rust_front_end=False)
    return msgspec.structs.replace(
        one,
        kind="steps",
        settings=base,
        repeat=0,
        label="",
        steps=fixed_steps(one.workload, one.engines, base),
        step_s=STEP_S,
        traced=TRACED if one.engines == 1 else 0,
    )


def fixed_steps(workload: Workload, engines: int, base: EngineSettings) -> list[Step]:
    """What one of these engines repeats: a decode step of its share of the load, half-way through its outputs, and a
    step that reads prompts up to the token budget; of these what the workload consists of.
    """
    steps = []
    if workload.kind != "prefill":
        share = min(max(1, workload.concurrency // engines), base.max_num_seqs)
        grown = output_tokens(workload) // 2 if workload.kind == "serve" else 0
        steps.append(Step(decode=share, decode_context=workload.isl + grown))
    if workload.kind != "decode":
        steps.append(prompt_step(workload.isl, base))
    return steps


def prompt_step(context: int, base: EngineSettings) -> Step:
    """A step that reads whole prompts up to the token budget; of a longer one the piece in its middle."""
    budget = base.max_num_batched_tokens
    if context > budget:
        return Step(prefill=1, prefill_tokens=budget, prefill_context=(context - budget) // 2)
    return Step(prefill=max(1, min(budget // context, base.max_num_seqs)), prefill_tokens=context)


def numerics_spec(manifest: Manifest, wanted: list[int], base: EngineSettings) -> TrialSpec:
    """The check of the model's own matrix products at these percentages."""
    return TrialSpec(
        kind="numerics",
        mps=True,
        settings=base,
        percentages=wanted,
        batch_sizes=_checked_sizes(base),
    )


# Steps that mix prefill and decode run without a graph at any size up to the token budget. These are a sample.
_MIXED_SIZES = (520, 777, 1024, 1283, 1536, 2048, 2601, 3072, 4096, 5003, 6144, 7168, 7919)


def _checked_sizes(base: EngineSettings) -> list[int]:
    """Batch sizes at which products are checked: the captured ones, and a sample of those beyond them."""
    captured = settings.captured_batch_sizes(base.max_cudagraph_capture_size, base.max_num_batched_tokens)
    beyond = (*_MIXED_SIZES, *range(9001, base.max_num_batched_tokens, 2003))
    return captured + [n for n in beyond if base.max_cudagraph_capture_size < n < base.max_num_batched_tokens]
