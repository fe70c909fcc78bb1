"""How long anything is waited for, in seconds: every wait of the shell has its limit here, or in a run's `Protocol`.

The `Protocol` (core/records.py) holds those that belong to how a trial is measured: how long engines may take to start,
how long they may be silent, how long a drain and a teardown may last. What a worker outside this package needs to know
is passed to it.
"""

from typing import Final

# The MPS daemon.
MPS_START_S: Final = 10.0
MPS_QUERY_S: Final = 5.0
MPS_QUIT_S: Final = 10.0
MPS_FORCE_S: Final = 5
MPS_SIGNAL_S: Final = 3.0

# Engines. `nvidia-smi` and NVML itself have no limit that could be set.
HEALTH_S: Final = 2.0
METRICS_S: Final = 10.0
DEATH_TOLD_S: Final = 3.0  # for an API server to notice that its engine core died, and to say why
BLAME_S: Final = 2.0  # for the death that made a request fail to become visible
FIXED_PROMPTS_S: Final = 60.0
IDLE_S: Final = 30.0  # for requests of an earlier window that were cut off
STEP_S: Final = 120.0  # for a fixed step to be prepared
RPC_GRACE_S: Final = 5.0  # over what a worker extension was given
ENGINE_END_S: Final = 5.0  # after the teardown's own limit
KILLED_S: Final = 10.0  # for SIGKILL to take effect

# The process that engines are forked from.
WARM_READY_S: Final = 120.0  # importing vLLM took 10 to 22 s; from a cold disk it takes longer
WARM_FORK_S: Final = 10.0
WARM_CLOSE_S: Final = 5.0

# Load generators.
LOAD_READY_S: Final = 60.0
REQUEST_S: Final = 600.0
LOAD_SUMMARY_S: Final = 30.0
LOAD_EXIT_S: Final = 5.0
LOAD_ABORT_S: Final = 2.0
LOAD_THREAD_S: Final = 1.0

# The GPU's driver.
SAMPLER_STOP_S: Final = 5.0
DRIVER_FORGETS_S: Final = 10.0  # for the driver to forget a process that has just ended

# Checks and measurements of the GPU and of the cores.
NUMERICS_S: Final = 240.0  # one percentage
NUMERICS_END_S: Final = 5.0
NUMERICS_QUIT_S: Final = 20.0
CEILINGS_S: Final = 90.0
CORE_PROBE_S: Final = 10.0
CORE_PROBE_PER_CORE_S: Final = 2.0

# The network.
NETWORK_S: Final = 10.0

# What a killed run left.
LEFT_PROCESS_END_S: Final = 10.0
LEFT_DAEMON_QUIT_S: Final = 10.0
