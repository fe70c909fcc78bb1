"""Child processes that can be proved to be ours: identified by PID and start time, ended in steps."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from advisor.shell.patience import KILLED_S

# Set the cores first, then become the program: no thread of it ever runs elsewhere. The parent-death signal
# goes to the program itself, so that nothing survives an advisor that was killed.
_PIN_AND_EXEC = (
    "import ctypes,os,signal,sys\n"
    "cores=[int(c) for c in sys.argv[1].split(',') if c]\n"
    "cores and os.sched_setaffinity(0,cores)\n"
    "ctypes.CDLL(None).prctl(1,signal.SIGTERM,0,0,0)\n"
    "os.execvp(sys.argv[2],sys.argv[2:])\n"
)

_PR_SET_PDEATHSIG = 1

# What a child may see of our environment. Everything else is left out, CUDA_MPS_* above all.
_INHERITED = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
    "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_PATH",
    "FAKE_NVML_STATE",
)  # fmt: skip
_INHERITED_PREFIXES = ("VLLM_", "HF_", "HUGGING_FACE_", "NVIDIA_", "TORCH_", "NCCL_")


# Secrets, which would end up in records, and what would make all engines use one port, refuse our requests or
# keep their logs from us.
_LEFT_OUT = re.compile(r"^VLLM_(.*(KEY|TOKEN|SECRET|PASSWORD).*|PORT|HOST_IP|.*LOGGING.*)$")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """A built environment: named variables of ours, then `extra`."""
    # The engines' logs are evidence of what they resolved: they have to be there.
    return {**inherited(), "PYTHONUNBUFFERED": "1", "VLLM_LOGGING_LEVEL": "INFO", **extra}


def inherited() -> dict[str, str]:
    """What our children get of our own environment."""
    return {
        name: value
        for name, value in os.environ.items()
        if (name in _INHERITED or name.startswith(_INHERITED_PREFIXES)) and not _LEFT_OUT.search(name)
    }


class Child(Protocol):
    """What is used of `subprocess.Popen`, for processes that were started and for those that were forked."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


def pinned(argv: Sequence[str], cores: Sequence[int]) -> list[str]:
    """The command line that runs `argv` on these cores (none: on any), and ends it when this process ends."""
    return [sys.executable, "-c", _PIN_AND_EXEC, ",".join(map(str, cores)), *argv]


def end_with_parent() -> None:
    """Have the kernel end this process, a worker of ours, when the one that started it ends; even if that is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def start_pinned(argv: Sequence[str], cores: Sequence[int], environment: Mapping[str, str], log: Path) -> Child:
    """Start a program on these cores, in a session of its own, both outputs into `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            pinned(argv, cores),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
        )


class Known:
    """A process by PID and start time; a later process that got the same PID is never mistaken for it."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.pid: int = process.pid

    @property
    def alive(self) -> bool:
        try:
            return bool(self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False

    def signal(self, number: int) -> None:
        try:
            if self.alive:
                self.process.send_signal(number)
        except psutil.Error:
            pass  # it ended in between, which is what was wanted


def tree(pid: int) -> list[Known]:
    """A process and all its descendants, as far as they can be seen now."""
    try:
        root = psutil.Process(pid)
        return [Known(root), *(Known(child) for child in root.children(recursive=True))]
    except psutil.Error:
        return []


def wait_gone(processes: Iterable[Known], timeout_s: float, poll: Iterable[Child] = ()) -> list[Known]:
    """Wait until these are gone; returns those that are not. `poll` are children of ours to reap meanwhile."""
    deadline = time.monotonic() + timeout_s
    waiting, children = list(processes), list(poll)
    while True:
        for child in children:
            child.poll()
        waiting = [one for one in waiting if one.alive]
        if not waiting or time.monotonic() >= deadline:
            return waiting
        time.sleep(0.05)


def end(processes: Sequence[Known], timeout_s: float, poll: Sequence[Child] = ()) -> list[str]:
    """End processes: SIGTERM, wait, SIGKILL for what is left, wait. Returns the steps that were needed."""
    steps: list[str] = []
    left = [one for one in processes if one.alive]
    for number, name, patience_s in ((signal.SIGTERM, "SIGTERM", timeout_s), (signal.SIGKILL, "SIGKILL", KILLED_S)):
        if not left:
            break
        steps.append(f"{name} to {', '.join(str(one.pid) for one in left)}")
        for one in left:
            one.signal(number)
        left = wait_gone(left, patience_s, poll)
    if left:
        steps.append(f"still alive: {', '.join(str(one.pid) for one in left)}")
    return steps
