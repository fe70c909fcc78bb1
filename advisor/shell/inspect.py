"""Gathers what `doctor` judges. Reads only: starts nothing, and imports neither torch nor vllm (20 s)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path

import psutil

from advisor.core.doctor import Folder, ForeignDaemon, GpuProcess, MachineFacts
from advisor.core.errors import Unfit
from advisor.core.records import GpuFacts
from advisor.shell import host, mps
from advisor.shell.gpu import Nvml


def inspect(selector: str | None = None) -> MachineFacts:
    """Findings about this machine and the GPU that `selector` means (see Nvml.find).

    No driver and no GPU are findings. Raises BadQuestion for a selector that means none of the GPUs.
    """
    gpu: GpuFacts | None = None
    gpu_error: str | None = None
    numa_node: int | None = None
    processes: list[GpuProcess] = []
    try:
        with Nvml() as nvml:
            found = nvml.find(selector)
            numa_node = nvml.numa_node(found.uuid)
            processes = [
                GpuProcess(pid=pid, name=_process_name(pid), memory_bytes=held)
                for pid, held in sorted(nvml.compute_processes(found.uuid).items())
            ]
            gpu = found
    except Unfit as error:
        gpu_error = str(error)
    binaries = mps.binaries()
    host_facts = host.facts(numa_node)
    near = host.node_cpus(numa_node)
    return MachineFacts(
        gpu=gpu,
        gpu_error=gpu_error,
        daemons=[
            ForeignDaemon(
                pid=daemon.pid,
                user=daemon.user,
                pipe_directory=None if daemon.pipe_directory is None else str(daemon.pipe_directory),
            )
            for daemon in mps.foreign_daemons(None if gpu is None else gpu.uuid)
        ],
        processes=processes,
        mps_control=None if binaries.control is None else str(binaries.control),
        mps_server=None if binaries.server is None else str(binaries.server),
        vllm=vllm_version(),
        torch=torch_version(),
        host=host_facts,
        cores_near_gpu=len(near.intersection(host_facts.cores)) if near else None,
        cpu_quota=host.cpu_quota(),
        open_files=host.open_file_limit(),
        folders=[
            _folder("run", Path(tempfile.gettempdir())),
            _folder("vLLM cache", _vllm_cache()),
        ],
        shm_free_bytes=_free_bytes(Path("/dev/shm")),
        inherited={name: value for name, value in os.environ.items() if name.startswith("CUDA_MPS_")},
    )


def vllm_version() -> str | None:
    """The installed vLLM's version, "unknown" when it is there but does not tell, None when it is not there."""
    return _from_metadata("vllm") or _from_file("vllm", "_version.py")


def torch_version() -> str | None:
    """The installed torch's version. Its own file comes first: it names the CUDA build ("+cu130")."""
    written = _from_file("torch", "version.py")
    return written if written not in (None, "unknown") else _from_metadata("torch") or written


def _from_metadata(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _from_file(package: str, name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / name).read_text()
    except OSError:
        return "unknown"
    version = re.search(r"""^__version__\b.*=\s*['"]([^'"]+)['"]""", text, re.MULTILINE)
    return version[1] if version else "unknown"


def _process_name(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None


def _vllm_cache() -> Path:
    """Where vLLM keeps compiled graphs (its VLLM_CACHE_ROOT, by default under the user's cache directory)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VLLM_CACHE_ROOT") or Path(cache) / "vllm").expanduser()


def _folder(purpose: str, path: Path) -> Folder:
    # A directory that does not exist yet will be made on the disk of the nearest one that does.
    there = next((place for place in (path, *path.parents) if place.exists()), path)
    return Folder(purpose=purpose, path=str(path), free_bytes=_free_bytes(there))


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
