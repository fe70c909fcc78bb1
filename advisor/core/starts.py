"""Which trials can share one start of the engines."""

from __future__ import annotations

from advisor.core.records import TrialSpec


def same_start(one: TrialSpec, other: TrialSpec) -> bool:
    """Whether two load trials want exactly the same engines, started with the same flags on the same cores.

    What the engines are asked may differ: requests in flight, lengths, windows. A repeat is there to see what another
    start brings, so trials of different repeats never share one.
    """
    return one.kind == other.kind == "load" and _engines(one) == _engines(other)


def _engines(spec: TrialSpec) -> tuple[object, ...]:
    # Engines that have their KV cache filled by a stand-in for prefill get another flag: the kind of the workload.
    kind = None if spec.workload is None else spec.workload.kind
    placed = (spec.engine_cores, spec.split_cores)
    return (spec.engines, spec.mps, spec.thread_percentage, spec.settings, placed, spec.repeat, kind)
