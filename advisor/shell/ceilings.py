"""What the GPU at hand can do at best: measured once for a GPU and driver, then kept in the user's cache."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from advisor.core.records import Ceilings, GpuFacts
from advisor.shell.patience import CEILINGS_S
from advisor.shell.processes import child_environment
from advisor.shell.store import write

WORKER = ("-m", "advisor.shell.ceilings_worker")


def cache_folder() -> Path:
    """Where the user's programs keep what can be made again (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "mps-advisor"


def measured(gpu: GpuFacts, folder: Path, worker: Sequence[str] = WORKER) -> Ceilings | None:
    """The ceilings of this GPU under its driver, from `folder` or freshly measured; None where they cannot be.

    Nothing else may use the GPU meanwhile. Never raises: a profile does without.
    """
    path = folder / (re.sub(r"[^A-Za-z0-9._-]", "_", f"ceilings-{gpu.uuid}-{gpu.driver}") + ".json")
    try:
        return _sane(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        pass
    try:
        done = subprocess.run(
            [sys.executable, *worker],
            env=child_environment({"CUDA_VISIBLE_DEVICES": gpu.uuid}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CEILINGS_S,
            check=True,
        )
        found = msgspec.json.decode(done.stdout, type=dict[str, float])
        data = msgspec.json.encode(found | {"source": "measured"})
        ceilings = _sane(data)
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError):
        return None
    with suppress(OSError):  # a full or read-only cache costs the next profile some seconds, no more
        folder.mkdir(parents=True, exist_ok=True)
        write(path, data)
    return ceilings


def _sane(data: bytes) -> Ceilings:
    """Raises msgspec.ValidationError, a DecodeError, for what is no ceilings."""
    found = msgspec.json.decode(data, type=Ceilings)
    if not all(math.isfinite(rate) and rate > 0 for rate in (found.copy_bytes_per_s, found.bf16_flops_per_s)):
        raise msgspec.ValidationError("a ceiling is a rate above zero")
    return found
