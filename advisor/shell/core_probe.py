"""How fast each core is: the same single-threaded work on one after another, in one child process.

Two machines whose processors have one name need not be equally fast, and what waits for the processor tells them
apart. The work is pure Python, as much of an engine's is.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from advisor.core.records import CoreSpeed
from advisor.shell import core_probe_worker
from advisor.shell.patience import CORE_PROBE_PER_CORE_S, CORE_PROBE_S


def core_speeds(cores: Iterable[int]) -> list[CoreSpeed]:
    """CPU seconds of the fixed work on each of `cores`; a core that a process may not be bound to is left out.

    CPU time, not time that passes: what else runs on a core is another question (see `contention`). Takes some
    60 ms per core. Never raises: without an answer the list is empty.
    """
    asked = sorted(set(cores))
    # Isolated and without site packages or environment: nothing of a user's may change how long the work takes.
    argv = [sys.executable, "-I", "-S", str(Path(core_probe_worker.__file__).resolve()), *map(str, asked)]
    try:
        done = subprocess.run(
            argv,
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CORE_PROBE_S + CORE_PROBE_PER_CORE_S * len(asked),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.split() for line in done.stdout.splitlines()]
    return [CoreSpeed(core=int(core), seconds=float(seconds)) for core, seconds in lines]
