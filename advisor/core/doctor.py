"""Is this machine fit for a live run? Raw findings in, one judged line per requirement out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from advisor.core.records import GpuFacts, HostFacts, Record

State = Literal["ok", "warn", "fail"]

VLLM_MIN = (0, 26)
VLLM_REMEDY = "pip install 'mps-advisor[gpu]'"
# Volta is the first chip whose MPS clients share the SMs without a common address space (NVIDIA MPS documentation).
CAPABILITY_MIN = (7, 0)
# Every engine wants two physical cores (front end and engine core); the load generator has its own.
CORES_MIN = 4
CORES_WISHED = 12
# NVIDIA's MPS documentation asks for 16384 under load; one engine and its streams still fit into 4096.
FILES_MIN = 4096
FILES_WISHED = 16384
DISK_MIN_BYTES = 2 * 2**30
DISK_WISHED_BYTES = 20 * 2**30
SHM_WISHED_BYTES = 2**30


class ForeignDaemon(Record, frozen=True):
    """An MPS control daemon that is not ours. What another user's process hides is None."""

    pid: int
    user: str | None
    pipe_directory: str | None


class GpuProcess(Record, frozen=True):
    """A process with a context on the GPU. `name` is None when it cannot be seen from here (another container)."""

    pid: int
    name: str | None
    memory_bytes: int | None


class Folder(Record, frozen=True):
    """A place that a run writes to. `free_bytes` is None when it cannot be read."""

    purpose: str
    path: str
    free_bytes: int | None


class MachineFacts(Record, frozen=True):
    """What was found, unjudged. `gpu_error` says why there is no `gpu`.

    `cores_near_gpu` counts those of `host.cores` on the GPU's NUMA node, None when that node is not known.
    `cpu_quota` is the control group's limit in CPUs, `open_files` the soft limit; None means unlimited.
    """

    gpu: GpuFacts | None
    gpu_error: str | None
    daemons: list[ForeignDaemon]
    processes: list[GpuProcess]
    mps_control: str | None
    mps_server: str | None
    vllm: str | None
    torch: str | None
    host: HostFacts
    cores_near_gpu: int | None
    cpu_quota: float | None
    open_files: int | None
    folders: list[Folder]
    shm_free_bytes: int | None
    inherited: dict[str, str]  # the CUDA_MPS_* variables of this environment


class Check(Record, frozen=True):
    """One requirement: what was found, and what to do about it (empty when there is nothing to do)."""

    name: str
    state: State
    found: str
    remedy: str


def judge(facts: MachineFacts) -> list[Check]:
    """Every check, in the order in which a user would mend them. Without a GPU, those of the GPU are left out."""
    gpu = facts.gpu
    if gpu is None:
        # The error is one line: what is wrong, then what to do.
        found, _, remedy = (facts.gpu_error or "no GPU was found").partition("; ")
        checks = [Check(name="driver", state="fail", found=found, remedy=remedy)]
    else:
        checks = [
            _driver(gpu, facts.torch),
            _gpu(gpu),
            _compute_mode(gpu),
            _mig(gpu),
            _gpm(gpu),
            _gpu_processes(facts.processes),
        ]
    return [
        *checks,
        _mps_binaries(facts.mps_control, facts.mps_server),
        _mps_daemon(facts.daemons),
        _vllm(facts.vllm, facts.torch),
        _cores(facts.host, facts.cpu_quota),
        _numa(facts.host, facts.cores_near_gpu),
        _open_files(facts.open_files),
        *(_disk(folder) for folder in facts.folders),
        _shm(facts.shm_free_bytes),
        _inherited(facts.inherited),
    ]


def fit(checks: Sequence[Check]) -> bool:
    """A machine with warnings is fit; one failure makes it unfit."""
    return all(check.state != "fail" for check in checks)


def _check(name: str, found: str, *, fail: str = "", warn: str = "") -> Check:
    """`fail` and `warn` are remedies; the one that is not empty decides the state."""
    state: State = "fail" if fail else "warn" if warn else "ok"
    return Check(name=name, state=state, found=found, remedy=fail or warn)


def _driver(gpu: GpuFacts, torch: str | None) -> Check:
    found = f"{gpu.driver}, CUDA {gpu.cuda}"
    built = re.search(r"\+cu(\d+)\d$", torch or "")
    # A driver runs every minor version of its own CUDA major version and all earlier ones, none later.
    if built and int(built[1]) > int(gpu.cuda.split(".")[0]):
        return _check(
            "driver",
            f"{found}, but torch {torch} needs CUDA {built[1]}",
            fail=f"install a driver for CUDA {built[1]}, or builds of torch and vLLM for CUDA {gpu.cuda}",
        )
    return _check("driver", found)


def _gpu(gpu: GpuFacts) -> Check:
    found = f"{gpu.index}: {gpu.name}, {gpu.uuid}, {gpu.sms} SMs, {_gib(gpu.memory_total_bytes)}"
    if _numbers(gpu.compute_capability) < CAPABILITY_MIN:
        found += f", compute capability {gpu.compute_capability}"
        return _check("GPU", found, fail="use a GPU of compute capability 7.0 (Volta) or newer (--gpu)")
    return _check("GPU", found)


def _compute_mode(gpu: GpuFacts) -> Check:
    if gpu.compute_mode == "Default":
        return _check("compute mode", "Default")
    why = "engines without MPS, the baseline, could not share the GPU"
    return _check("compute mode", f"{gpu.compute_mode}: {why}", fail=f"sudo nvidia-smi -i {gpu.index} -c DEFAULT")


def _mig(gpu: GpuFacts) -> Check:
    if not gpu.mig:
        return _check("MIG", "off")
    return _check("MIG", "on", fail=f"sudo nvidia-smi -i {gpu.index} -mig 0, or choose another GPU with --gpu")


def _gpm(gpu: GpuFacts) -> Check:
    if gpu.gpm:
        return _check("GPM", "SM activity can be read")
    return _check("GPM", "no SM activity from this GPU", warn="Hopper or newer has it; the verdict does not need it")


def _gpu_processes(processes: Sequence[GpuProcess]) -> Check:
    if not processes:
        return _check("GPU processes", "none")
    found = ", ".join(
        f"{process.pid} {process.name or '(not visible from here)'}"
        + ("" if process.memory_bytes is None else f" {_gib(process.memory_bytes)}")
        for process in processes
    )
    return _check("GPU processes", found, fail="end them, or choose an idle GPU with --gpu")


def _mps_binaries(control: str | None, server: str | None) -> Check:
    found = {"nvidia-cuda-mps-control": control, "nvidia-cuda-mps-server": server}
    missing = [name for name, path in found.items() if path is None]
    if not missing:
        return _check("MPS binaries", f"{control}, {server}")
    remedy = "install the driver's compute utilities (Ubuntu: nvidia-compute-utils-VERSION), or put them on PATH"
    return _check("MPS binaries", f"missing: {', '.join(missing)}", fail=remedy)


def _mps_daemon(daemons: Sequence[ForeignDaemon]) -> Check:
    if not daemons:
        return _check("MPS daemon", "none is running")
    found = "; ".join(
        f"pid {daemon.pid} of {daemon.user or 'another user'} in {daemon.pipe_directory or 'an unknown directory'}"
        for daemon in daemons
    )
    ends = "; ".join(
        f"as {daemon.user or 'its user'}: echo quit | "
        f"CUDA_MPS_PIPE_DIRECTORY={daemon.pipe_directory or 'ITS_DIRECTORY'} nvidia-cuda-mps-control"
        for daemon in daemons
    )
    return _check("MPS daemon", found, fail=f"stop its clients first, then {ends}")


def _vllm(vllm: str | None, torch: str | None) -> Check:
    if vllm is None:
        return _check("vLLM", "not installed", fail=VLLM_REMEDY)
    found = f"{vllm}, torch {torch or 'not installed'}"
    wanted = ".".join(str(number) for number in VLLM_MIN)
    if torch is None:
        return _check("vLLM", found, fail=VLLM_REMEDY)
    version = _numbers(vllm)
    if not version:
        return _check("vLLM", found, warn=f"its version could not be read; {wanted} or newer is needed")
    if version < VLLM_MIN:
        return _check("vLLM", f"{found}; {wanted} or newer is needed", fail=VLLM_REMEDY)
    return _check("vLLM", found)


def _cores(host: HostFacts, quota: float | None) -> Check:
    threads = "" if host.threads_per_core == 1 else f" ({host.threads_per_core} threads each)"
    found = f"{len(host.cores)} physical{threads}, {host.cpu}"
    usable = float(len(host.cores))
    if quota is not None and quota < usable:
        usable = quota
        found += f", but the control group allows only {quota:g} CPUs"
    if usable < CORES_MIN:
        return _check("cores", found, fail=f"give it {CORES_MIN} physical cores or more; {CORES_WISHED} are better")
    if usable < CORES_WISHED:
        wants = "each engine wants 2 and the load generator its own"
        return _check("cores", found, warn=f"fewer engines can be tried: {wants}; {CORES_WISHED} are better")
    if usable < len(host.cores):
        return _check("cores", found, warn="a quota halts engines at random moments; allow whole cores instead")
    return _check("cores", found)


def _numa(host: HostFacts, near: int | None) -> Check:
    if host.numa_node is None or near is None:
        return _check("NUMA node", "the platform does not say (usual in a virtual machine)")
    found = f"the GPU is on node {host.numa_node}, with {near} of the {len(host.cores)} usable cores"
    if near == 0:
        return _check("NUMA node", found, warn=f"run on the GPU's node: numactl --cpunodebind={host.numa_node}")
    return _check("NUMA node", found)


def _open_files(limit: int | None) -> Check:
    if limit is None:
        return _check("open files", "no limit")
    if limit < FILES_MIN:
        return _check("open files", f"limit {limit}", fail="ulimit -n 65536")
    return _check("open files", f"limit {limit}", warn="" if limit >= FILES_WISHED else "ulimit -n 65536")


def _disk(folder: Folder) -> Check:
    name = f"disk, {folder.purpose}"
    if folder.free_bytes is None:
        return _check(name, f"{folder.path} cannot be read", fail="make it a directory that you may write to")
    found = f"{_gib(folder.free_bytes)} free in {folder.path}"
    if folder.free_bytes < DISK_MIN_BYTES:
        return _check(name, found, fail=f"free at least {_gib(DISK_MIN_BYTES)}")
    if folder.free_bytes < DISK_WISHED_BYTES:
        return _check(name, found, warn=f"{_gib(DISK_WISHED_BYTES)} hold compile caches and logs without worry")
    return _check(name, found)


def _shm(free_bytes: int | None) -> Check:
    found = "no /dev/shm" if free_bytes is None else f"{_gib(free_bytes)} free"
    enough = free_bytes is not None and free_bytes >= SHM_WISHED_BYTES
    return _check("/dev/shm", found, warn="" if enough else "1 GiB or more (docker run --shm-size=8g, or --ipc=host)")


def _inherited(variables: dict[str, str]) -> Check:
    if not variables:
        return _check("CUDA_MPS_*", "not set")
    found = ", ".join(f"{name}={value}" for name, value in sorted(variables.items()))
    return _check("CUDA_MPS_*", found, warn="ignored: every run has a daemon and directories of its own")


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, () when it does not begin with any: "0.26.1.dev3+g1" is (0, 26)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else ()


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
