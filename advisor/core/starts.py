"""Which trials can share one start of the engines."""

from __future__ import annotations

from advisor.core.records import TrialSpec


def same_start(one: TrialSpec, other: TrialSpec) -> bool:
    """Whether two load trials want exactly the same engines, started with the same flags on the same cores.

    What the engines are asked may differ: requests in flight, lengths, windows, and how many of them get requests; the
    cores are dealt to those. A repeat is there to see what another start brings, so trials of different repeats never
    share one.
    """
    if one.kind != "load" or other.kind != "load" or _engines(one) != _engines(other):
        return False
    return one.engines != other.engines or one.engine_cores == other.engine_cores


def _engines(spec: TrialSpec) -> tuple[object, ...]:
    # Engines that have their KV cache filled by a stand-in for prefill get another flag: the kind of the workload.
    kind = None if spec.workload is None else spec.workload.kind
    started = spec.engines + spec.idle_engines
    return (started, spec.mps, spec.thread_percentage, spec.settings, spec.split_cores, spec.repeat, kind)
