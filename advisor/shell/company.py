"""Other processes on the GPU: nothing true can be measured beside them."""

from __future__ import annotations

import time
from collections.abc import Set

from advisor.core.errors import Unfit
from advisor.shell.gpu import Nvml

# The driver alone keeps about 0.6 GiB of an H200; more than this belongs to somebody.
UNSEEN_BYTES = 2 << 30


def refuse_company(nvml: Nvml, uuid: str, patience_s: float = 0.0) -> None:
    """Raise Unfit when other processes use this GPU. For a GPU on which nothing of ours runs.

    `patience_s`: how long to wait for the driver to forget a process of ours that has just ended.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _refuse_company(nvml, uuid)
        except Unfit:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.1)


def _refuse_company(nvml: Nvml, uuid: str) -> None:
    refuse_strangers(nvml, uuid, set())
    used = nvml.memory_used_bytes(uuid)
    if used is not None and used > UNSEEN_BYTES:
        raise Unfit(
            f"{used / 2**30:.1f} GiB of this GPU are in use by processes that cannot be seen from here (another "
            "container?); a measurement beside them would be wrong: free the GPU, or choose another with --gpu"
        )


def refuse_strangers(nvml: Nvml, uuid: str, ours: Set[int]) -> None:
    """Raise Unfit when processes other than `ours` can be seen on this GPU."""
    if others := set(nvml.compute_processes(uuid)) - ours:
        raise Unfit(
            f"other processes use this GPU (PID {', '.join(map(str, sorted(others)))}); a measurement beside them "
            "would be wrong: stop them, or choose another GPU with --gpu"
        )
