"""The processor side of the machine: cores, memory, limits, stolen time."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Set
from pathlib import Path

import psutil

from advisor.core.records import HostFacts

PROC = Path("/proc")
SYS = Path("/sys")


def facts(numa_node: int | None, *, allowed: Set[int] | None = None, proc: Path = PROC, sys: Path = SYS) -> HostFacts:
    """What this process may use. `numa_node` is the GPU's; its cores come first in `cores`.

    `allowed` is the set of logical CPUs to choose from, by default this process's affinity.
    """
    cpus = sorted(_affinity() if allowed is None else allowed)
    siblings = {cpu: _siblings(cpu, sys) for cpu in cpus}
    # Of each physical core the lowest logical CPU that may be used stands for it.
    first = {group: min(cpu for cpu in cpus if siblings[cpu] == group) for group in siblings.values()}
    near = node_cpus(numa_node, sys=sys)
    return HostFacts(
        cpu=_cpu_name(proc),
        cores=sorted(first.values(), key=lambda cpu: (cpu not in near, cpu)),
        threads_per_core=max((len(group) for group in siblings.values()), default=1),
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        numa_node=numa_node,
    )


def node_cpus(numa_node: int | None, *, sys: Path = SYS) -> set[int]:
    """The logical CPUs of a NUMA node; empty when the node is not known."""
    if numa_node is None:
        return set()
    return _cpu_list(_read(sys / f"devices/system/node/node{numa_node}/cpulist"))


def cpu_quota(*, proc: Path = PROC, sys: Path = SYS) -> float | None:
    """How many CPUs' worth of time the control group allows (a container's CPU limit); None without a limit."""
    quotas = []
    for line in _read(proc / "self/cgroup").splitlines():
        if line.startswith("0::"):
            group = Path(line.removeprefix("0::/"))
            quotas += [_read(sys / "fs/cgroup" / part / "cpu.max") for part in (group, *group.parents)]
    # Version 1 shows a container its own group as the root.
    v1 = sys / "fs/cgroup/cpu"
    quotas.append(f"{_read(v1 / 'cpu.cfs_quota_us')} {_read(v1 / 'cpu.cfs_period_us')}")
    limits = []
    for quota in quotas:
        match quota.split():
            case [granted, period] if granted.isdecimal() and period.isdecimal() and int(period) > 0:
                limits.append(int(granted) / int(period))
    return min(limits, default=None)


def steal_s(*, proc: Path = PROC) -> float:
    """Seconds, summed over all CPUs since boot, in which the hypervisor ran someone else (proc(5), /proc/stat)."""
    total = _read(proc / "stat").split("\n", 1)[0].split()
    return int(total[8]) / os.sysconf("SC_CLK_TCK") if len(total) > 8 else 0.0


def open_file_limit() -> int | None:
    """The soft limit of open files of this process; None when there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: int, sys: Path) -> frozenset[int]:
    listed = _cpu_list(_read(sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    return frozenset(listed or {cpu})


def _cpu_name(proc: Path) -> str:
    for line in _read(proc / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _cpu_list(text: str) -> set[int]:
    """The kernel's list format: "0-3,8" is 0, 1, 2, 3, 8."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        if low:
            cpus.update(range(int(low), int(high or low) + 1))
    return cpus


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
