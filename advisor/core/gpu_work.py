"""What the GPU does when nothing keeps it waiting, and how a gain divides into its part and the host's. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from advisor.core.busy import busy
from advisor.core.candidates import Field
from advisor.core.contenders import Contender
from advisor.core.estimate import log_gain
from advisor.core.intervals import LogMean, figure_of, log_ratio
from advisor.core.overlap import rate_alone, step_rate
from advisor.core.records import EngineSettings, Figure, KernelPart, Overlap, Source, Step, StepProfile, Workload
from advisor.core.saturation import saturation
from advisor.core.tried import Tried, slug
from advisor.core.tuning import bare


class GpuWork(NamedTuple):
    """What the steps trials of a run say; empty where there were none."""

    throughput: Figure | None = None
    decode: StepProfile | None = None
    prefill: StepProfile | None = None
    overlaps: Sequence[Overlap] = ()


def gpu_work(field: Field, steps: Sequence[Tried], unit: str) -> GpuWork:
    """`steps` are the run's judged steps trials; `unit` is what throughput counts."""
    workload = msgspec.structs.replace(field.manifest.question.workload, concurrency=field.outline.concurrency)
    single = next((one for one in steps if one.ok and one.spec.engines == 1 and not one.spec.mps), None)
    if single is None:
        return GpuWork()
    alone = rate_alone(single.raw, workload)
    decode, prefill = (_step_profile(field, single, kind) for kind in ("decode", "prefill"))
    if isinstance(alone, str):
        return GpuWork(None, decode, prefill)
    several = [one for one in steps if one.ok and one.spec.engines > 1]
    found = (_overlap(field, one, alone, workload) for one in several)
    return GpuWork(figure_of(alone, unit), decode, prefill, [one for one in found if one is not None])


def _overlap(field: Field, several: Tried, alone: LogMean, workload: Workload) -> Overlap | None:
    together = rate_alone(several.raw, workload)
    if isinstance(together, str):
        return None
    shared = log_ratio(together, alone)
    spec = several.spec
    base, loaded = field.tuned or field.default, _under_load(field, several)
    host = longer = rest = None
    if base is not None and loaded is not None and base.estimate is not None and loaded.estimate is not None:
        host = figure_of(log_ratio(log_gain(loaded.estimate, base.estimate), shared), "×")
        now, before = (busy(one, field.all) for one in (loaded, base))
        if now is not None and before is not None:
            longer = figure_of(log_ratio(now.share, before.share), "×")
            rest = figure_of(log_ratio(log_ratio(now.gives, before.gives), shared), "×")
    return Overlap(
        engines=spec.engines,
        mps=spec.mps,
        thread_percentage=spec.thread_percentage,
        overlap=figure_of(shared, "×"),
        host=host,
        busy=longer,
        rest=rest,
        trial=slug(spec),
    )


def _under_load(field: Field, several: Tried) -> Contender | None:
    """These engines under the load that the steps are of; of several with other front ends the one that was started
    most often.
    """
    spec = several.spec
    found = [
        one
        for one in field.all
        if (one.engines, one.mps, one.percentage) == (spec.engines, spec.mps, spec.thread_percentage)
        and one.estimate is not None
        and one.at_full_load
        and _same_back_end(one, spec.settings)
    ]
    return max(found, key=lambda one: len(one.starts), default=None)


def _same_back_end(one: Contender, settings: EngineSettings | None) -> bool:
    def back(told: EngineSettings) -> EngineSettings:
        return msgspec.structs.replace(bare(told), api_server_count=1, stream_interval=1, rust_front_end=False)

    return one.settings is not None and settings is not None and back(one.settings) == back(settings)


def _step_profile(field: Field, single: Tried, kind: str) -> StepProfile | None:
    for index, step in enumerate(single.spec.steps):
        if (step.decode > 0) != (kind == "decode"):
            continue
        seen = step_rate(single.raw, index)
        if isinstance(seen, str):
            return None
        kernels, why = _kernels(field, single, index, step)
        time = Figure(value=seen.step_ms, unit="ms", source="measured")
        return StepProfile(step=step, step_ms=time, kernels=kernels, why=why, trial=slug(single.spec))
    return None


def _kernels(field: Field, single: Tried, index: int, step: Step) -> tuple[dict[str, KernelPart], str | None]:
    manifest = field.manifest
    trace = next((one for one in single.raw.traces if one.step == index), None)
    if trace is None:
        return {}, "its kernels were not traced"
    found = saturation(trace, step, manifest.model, manifest.gpu.sms, manifest.ceilings)
    if isinstance(found, str):
        return {}, found
    # How near to its roofline a part comes is as true as the ceilings are.
    ceilings: Source = (
        "vendor" if manifest.ceilings is not None and manifest.ceilings.source == "vendor" else "measured"
    )
    parts: dict[str, KernelPart] = {
        part.label: KernelPart(
            share=Figure(value=part.share * 100, unit="%", source="measured"),
            of_roofline=_percent(part.achieved, ceilings),
            sms=_percent(part.sms_covered, "measured"),
        )
        for part in sorted(found.parts, key=lambda part: -part.share)
    }
    return parts, found.why_unlabelled or None


def _percent(share: float | None, source: Source) -> Figure | None:
    return None if share is None else Figure(value=share * 100, unit="%", source=source)
