"""Asynchronous scheduling off and on, under load: what it brings one engine, and several without it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from advisor.core import specs, tuning
from advisor.core.estimate import ratio_of_windows
from advisor.core.records import Manifest, Scheduled, TrialSpec
from advisor.core.stall import cpu_stall_pct
from advisor.core.tried import Tried, key, slug
from advisor.core.wording import times


def trials(manifest: Manifest) -> list[TrialSpec]:
    """One engine and several under MPS, with and without it, the largest load first: all loads share a start."""
    asked = manifest.ablation
    if asked is None or not asked.loads:
        return []
    return list(_trials(manifest, asked.engines, sorted(asked.loads, reverse=True)))


def _trials(manifest: Manifest, several: int, loads: Sequence[int]) -> Iterator[TrialSpec]:
    # Memory and graphs for the largest load, so that all loads are served by the same engines.
    roomy = specs.asking(manifest, loads[0])
    base = tuning.for_batch(manifest.settings, loads[0])
    for asynchronous in (True, False):
        told = msgspec.structs.replace(base, async_scheduling=asynchronous)
        for engines, mps in ((1, False), (several, True)):
            one = specs.load_spec(roomy, engines, mps=mps, base=told)
            one = msgspec.structs.replace(one, label="async" if asynchronous else "no-async")
            for load in loads:
                if load >= engines:
                    yield specs.at_load(one, load)


def scheduled(manifest: Manifest, tried: Sequence[Tried]) -> list[Scheduled]:
    """What came of `trials`, by load."""
    known = {key(one.spec): one for one in tried}
    wanted = trials(manifest)
    found = [_told(spec, known.get(key(spec)), known, wanted) for spec in wanted]
    return sorted(found, key=lambda one: (one.concurrency, one.engines, one.async_scheduling))


def sentence(found: Sequence[Scheduled]) -> str:
    """What asynchronous scheduling alone and several engines without it bring, at the largest load at which both are
    known; empty where they are not.
    """
    for load in sorted({one.concurrency for one in found}, reverse=True):
        here = [one for one in found if one.concurrency == load and one.gain is not None]
        alone = next((one for one in here if one.engines == 1 and one.async_scheduling), None)
        several = next((one for one in here if one.engines > 1 and not one.async_scheduling), None)
        if alone is not None and several is not None:
            return (
                f"At {load:,} requests in flight asynchronous scheduling alone brings one engine {times(alone.gain)}; "
                f"without it, {several.engines} engines under MPS bring {times(several.gain)}."
            )
    return ""


def _told(spec: TrialSpec, one: Tried | None, known: dict[str, Tried], wanted: Sequence[TrialSpec]) -> Scheduled:
    assert spec.settings is not None and spec.workload is not None
    blank = Scheduled(
        engines=spec.engines,
        mps=spec.mps,
        async_scheduling=spec.settings.async_scheduling,
        concurrency=spec.workload.concurrency,
        trial=slug(spec),
    )
    if one is None or one.measurement is None:
        return msgspec.structs.replace(blank, why=one.why or one.outcome if one else "it was not measured")
    base = known.get(next((key(other) for other in wanted if _is_base(other, spec)), ""))
    seen = one.measurement
    return msgspec.structs.replace(
        blank,
        throughput_tok_per_s=seen.throughput_tok_per_s,
        gain=ratio_of_windows(seen, base.measurement) if base and base.measurement and base is not one else None,
        e2e_ms=seen.e2e_ms,
        gpu_idle_pct=seen.gpu_idle_pct,
        cpu_stall_pct=cpu_stall_pct(one.raw, seen),
    )


def _is_base(other: TrialSpec, spec: TrialSpec) -> bool:
    """Whether it is one engine without asynchronous scheduling at the same load."""
    assert other.settings is not None
    return other.engines == 1 and not other.settings.async_scheduling and other.workload == spec.workload
