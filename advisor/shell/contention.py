"""Who else ran on a trial's cores, and how long the trial's own threads waited for one. All of it from /proc.

The kernel counts per thread, in nanoseconds, the time on a core and the time that it was ready to run and had none
(proc(5) and the kernel's sched-stats document, /proc/PID/task/TID/schedstat). A container sees the processes of its
own PID namespace only: what others ran shows in the waiting alone.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from advisor.core.records import CpuUse, Stranger

PROC = Path("/proc")
STRANGERS_MOST = 10
STRANGER_SHARE_MIN = 0.02  # of one core over the window; a machine's own housekeeping stays below
NAME_WIDTH = 40


class Thread(NamedTuple):
    """One thread until now: seconds on a core, and seconds ready to run without one (None: the kernel does not say)."""

    cpu_s: float
    waited_s: float | None


class Process(NamedTuple):
    """One line of /proc/PID/stat. `core` is where its first thread ran last."""

    pid: int
    started_ticks: int
    name: str
    cpu_s: float
    core: int


class Reading(NamedTuple):
    """The machine at one moment: the threads of the trial's own processes, and every process there is."""

    threads: dict[int, dict[int, Thread]]
    processes: dict[int, Process]


def read(own: Collection[int], *, proc: Path = PROC) -> Reading:
    """Read /proc once; `own` are the PIDs whose threads are wanted. What ends or may not be read is left out."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    processes = (_process(_read(f"{proc}/{entry}/stat"), tick_s) for entry in _list(f"{proc}") if entry.isdecimal())
    return Reading(
        threads={pid: _threads(pid, proc, tick_s) for pid in own},
        processes={one.pid: one for one in processes if one is not None},
    )


def by_thread(rows: Sequence[CpuUse], start: Reading, end: Reading) -> list[CpuUse]:
    """The rows with the busiest thread's CPU time and the longest wait of one thread, both between the readings.

    A thread that began in between counts from its beginning; one that ended is not seen. A row whose process has no
    thread in `end` stays as it is.
    """
    return [_by_thread(row, start.threads.get(row.pid, {}), end.threads.get(row.pid, {})) for row in rows]


def _by_thread(row: CpuUse, start: Mapping[int, Thread], end: Mapping[int, Thread]) -> CpuUse:
    if not end:
        return row
    never = Thread(0.0, 0.0)
    cpu_s, waited_s = [], []
    for number, after in end.items():
        before = start.get(number, never)
        cpu_s.append(max(0.0, after.cpu_s - before.cpu_s))
        if after.waited_s is not None and before.waited_s is not None:
            waited_s.append(max(0.0, after.waited_s - before.waited_s))
    return msgspec.structs.replace(row, main_thread_s=max(cpu_s), waited_s=max(waited_s, default=None))


def strangers(
    start: Reading, end: Reading, seconds: float, cores: Collection[int], ours: Collection[int], *, proc: Path = PROC
) -> list[Stranger]:
    """The biggest processes that are not `ours`, used over 2 % of a core for `seconds`, and last ran on one of `cores`.

    At most 10, the busiest first; kernel threads are processes here. One that began and ended between the two
    readings is not seen. Of a process with several threads, the core is that of its busiest thread.
    """
    found = []
    for pid, after in end.processes.items():
        before = start.processes.get(pid)
        same = before is not None and before.started_ticks == after.started_ticks
        cpu_s = after.cpu_s - before.cpu_s if before is not None and same else after.cpu_s
        if pid in ours or cpu_s <= STRANGER_SHARE_MIN * seconds:
            continue
        core = _core(after, proc)
        if core in cores:
            found.append(Stranger(pid=pid, name=_clean(after.name), cpu_s=cpu_s, core=core))
    return sorted(found, key=lambda one: (-one.cpu_s, one.pid))[:STRANGERS_MOST]


def _process(stat: str, tick_s: float) -> Process | None:
    """The name may hold spaces and brackets: fields are counted from its last bracket on."""
    head, _, rest = stat.rpartition(")")
    number, _, name = head.partition("(")
    fields = rest.split()
    if len(fields) < 37:
        return None
    used_s = (int(fields[11]) + int(fields[12])) * tick_s
    return Process(int(number), int(fields[19]), name, used_s, int(fields[36]))


def _threads(pid: int, proc: Path, tick_s: float) -> dict[int, Thread]:
    found = {}
    for entry in _list(f"{proc}/{pid}/task"):
        folder = f"{proc}/{pid}/task/{entry}"
        times = _read(f"{folder}/schedstat").split()
        # A kernel that keeps no such account says 0 0 0.
        if len(times) == 3 and times != ["0", "0", "0"]:
            found[int(entry)] = Thread(int(times[0]) / 1e9, int(times[1]) / 1e9)
        elif (one := _process(_read(f"{folder}/stat"), tick_s)) is not None:
            found[int(entry)] = Thread(one.cpu_s, None)
    return found


def _core(process: Process, proc: Path) -> int:
    """Where the busiest thread ran last: the first one may sleep while another computes."""
    folder = f"{proc}/{process.pid}/task"
    threads = (_process(_read(f"{folder}/{entry}/stat"), 1.0) for entry in _list(folder))
    return max((one for one in threads if one is not None), key=lambda one: one.cpu_s, default=process).core


def _clean(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:NAME_WIDTH]


def _read(path: str) -> str:
    # Thousands of files in a moment: no Path objects. A name may hold any bytes.
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return ""


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)  # noqa: PTH208
    except OSError:
        return []
