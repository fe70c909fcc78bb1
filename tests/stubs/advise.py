"""Runs the command line as a user would, on a machine that looks like the GPU machine but is not one.

Cores are listed several times over, so that a small machine can place several engines; windows are short.
Everything else (processes, daemon, sockets, signals, files) is real.
"""

import os
import sys

import msgspec

import advisor.core.tuning
from advisor.core.records import HostFacts, Protocol


def host_facts(numa_node: int | None) -> HostFacts:
    return HostFacts(
        cpu="test", cores=[0, *[0] * 15], threads_per_core=1, memory_bytes=1 << 36, kernel="test", numa_node=numa_node
    )


def protocol() -> Protocol:
    """Short windows; tuning, second starts and curves only where a test asks for them, because each is a start."""
    full = {}
    if "ADVISE_FULL" in os.environ:
        full = {"tune": True, "starts": 2, "equal_budget": True, "curve": [0.25, 0.5], "precision": 0.01}
        full |= {"gpu_alone": True, "confirm": True, "other_settings": True, "runner_up": True}
        # Stand-ins for API servers use little CPU, and would not be taken for the limit.
        advisor.core.tuning.API_CALM_FULLNESS = 0.0
    return Protocol(
        **full,
        curve_min_s=0.8,
        precise_max_s=2.0,
        warmup_min_s=0.3,
        measure_min_s=1.2,
        engine_start_timeout_s=8.0,
        stall_timeout_s=3.0,
        drain_timeout_s=10.0,
        teardown_timeout_s=6.0,
        gpm_interval_s=0.2,
    )


if __name__ == "__main__":
    import advisor.profiling
    from advisor.cli import main
    from advisor.shell import ceilings, host, progress

    if "ADVISE_TALKATIVE" in os.environ:  # a line for every word of progress, as a terminal has it
        progress.QUIET_S = 0.0
    host.facts = host_facts
    advisor.profiling.FULL = protocol()
    advisor.profiling.FAST = msgspec.structs.replace(protocol(), quick=True, tune=True, curve=[0.5])
    ceilings.measured = lambda gpu, folder: None  # its GPU is none
    sys.exit(main())
