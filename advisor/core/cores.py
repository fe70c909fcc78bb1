"""Which CPU cores each engine and the load generator get, so that neither takes time from the other."""

from __future__ import annotations

from msgspec import Struct

from advisor.core.errors import Unfit

CORES_PER_ENGINE = 2  # an engine is two busy processes: the HTTP front end and the engine core
FEWEST_CORES = 3
_MOST_LOAD_CORES = 4


class CorePlan(Struct, frozen=True):
    """Logical CPU numbers: one list per engine, all of one size, and those of the load generator and the advisor."""

    engine_cores: list[list[int]]
    load_cores: list[int]


def plan(cores: list[int], engines: int) -> CorePlan | None:
    """Deals `cores` (one logical CPU per physical core) to `engines` engines; None when they get under two each.

    The load generator takes a quarter, at least one and at most four, from the end of the list: the same cores
    whatever the number of engines, so that it is no reason for a difference. The rest is dealt in equal
    contiguous shares; what does not divide is left unused. Raises Unfit with under three cores.
    """
    if engines < 1:
        raise ValueError(f"at least one engine, not {engines}")
    for_engines, load_cores = _split(cores)
    share = len(for_engines) // engines
    if share < CORES_PER_ENGINE:
        return None
    return CorePlan([for_engines[i * share : (i + 1) * share] for i in range(engines)], load_cores)


def most_engines(cores: list[int]) -> int:
    """The largest number of engines for which `plan` finds cores. Raises Unfit with under three cores."""
    return len(_split(cores)[0]) // CORES_PER_ENGINE


def _split(cores: list[int]) -> tuple[list[int], list[int]]:
    if len(cores) < FEWEST_CORES:
        raise Unfit(
            f"{len(cores)} CPU cores are not enough: an engine needs {CORES_PER_ENGINE} and the load generator 1; "
            f"allow this process at least {FEWEST_CORES} physical cores"
        )
    load = max(1, min(_MOST_LOAD_CORES, len(cores) // 4))
    return cores[:-load], cores[-load:]
