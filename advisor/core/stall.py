"""How much of the GPU's idle time is the CPU's doing. Pure.

Requests are in flight all through a window, so there always is something to do. A host thread that works for the share
w of a window in which the GPU idles for the share i does so for at least w + i - 1 of it while the GPU idles (Fréchet's
lower bound): nothing is assumed about when either happens. A thread that spins while it waits for the GPU counts as
working, but the GPU is busy then, so that the bound still holds. What remains of the idle time is unattributed.
"""

from __future__ import annotations

from advisor.core.measure import main_thread_pct
from advisor.core.records import Measurement, RawTrial

# Shorter windows hold too few of GPM's samples.
SHORTEST_WINDOW_S = 5.0


def cpu_stall_pct(raw: RawTrial, measurement: Measurement) -> float | None:
    """Percent of the window in which the GPU idled while an engine core or an API server was shown to work, at least.

    None where the GPU's activity or the threads' CPU time was not recorded, or the window is too short.
    """
    idle = measurement.gpu_idle_pct
    busy = [pct for role in ("engine_core", "api_server") if (pct := main_thread_pct(raw, role)) is not None]
    if idle is None or not busy or measurement.window_s < SHORTEST_WINDOW_S:
        return None
    return max(0.0, idle - max(0.0, 100.0 - max(busy)))
