"""CPU seconds of the processes that take part in a window."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import psutil

from advisor.core.records import CpuUse
from advisor.shell.engines import Engines


def cpu_times(engines: Engines, load_pids: Sequence[int], servers: Sequence[int]) -> list[CpuUse]:
    """CPU seconds so far of every process that takes part; `servers` are those of MPS."""
    rows = []
    for index, (front, core) in enumerate(zip(engines.front_pids(), engines.core_pids, strict=True)):
        rows += [_cpu_time("api_server", index, pid) for pid in front]
        if core is not None:
            rows.append(_cpu_time("engine_core", index, core))
    rows += [_cpu_time("load", None, pid) for pid in load_pids]
    rows.append(_cpu_time("advisor", None, psutil.Process().pid))
    rows += [_cpu_time("mps_server", None, pid) for pid in servers]
    return [row for row in rows if row is not None]


def _cpu_time(role: str, engine: int | None, pid: int) -> CpuUse | None:
    """CPU seconds of one process until now, None when it is gone; `contention.by_thread` adds those of its threads."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return CpuUse(
        role=role,  # type: ignore[arg-type]  # only the literals above are passed
        engine=engine,
        pid=pid,
        cpu_s=times.user + times.system,
        main_thread_s=None,
    )


def cpu_use(start: Sequence[CpuUse], end: Sequence[CpuUse]) -> list[CpuUse]:
    """Differences between two readings, for processes that are in both."""
    before = {one.pid: one.cpu_s for one in start}
    return [
        msgspec.structs.replace(one, cpu_s=max(0.0, one.cpu_s - before[one.pid])) for one in end if one.pid in before
    ]
