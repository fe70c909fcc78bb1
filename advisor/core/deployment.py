"""What it takes to run a candidate: environment, commands, and what MPS costs whoever runs it. Pure."""

from __future__ import annotations

import shlex

import msgspec

from advisor.core import cores, settings
from advisor.core.records import Candidate, Manifest

# Source: NVIDIA's MPS documentation on error containment, and the article of Databricks that the README names.
COST_OF_MPS = [
    "A daemon to start before the engines, to watch, and to stop after them.",
    "Shared fate: when the MPS server dies, every engine on this GPU dies with it.",
    "No isolation: one engine's illegal memory access can take the others down.",
    "A load balancer in front of the engines, and a prefix cache of its own in each of them.",
    "One copy of the weights per engine.",
]

PIPE_DIRECTORY = "/tmp/mps/pipe"
LOG_DIRECTORY = "/tmp/mps/log"
FIRST_PORT = 8000


def environment(manifest: Manifest, candidate: Candidate) -> dict[str, str]:
    """What every engine's environment has to hold: the GPU, what vLLM was set to, and the way to the daemon."""
    variables = {"CUDA_VISIBLE_DEVICES": manifest.gpu.uuid, **manifest.software.environment}
    if candidate.settings is not None:
        variables |= settings.serve_environment(candidate.settings)
    if not candidate.mps:
        return variables
    variables |= {"CUDA_MPS_PIPE_DIRECTORY": PIPE_DIRECTORY, "CUDA_MPS_LOG_DIRECTORY": LOG_DIRECTORY}
    if candidate.thread_percentages:
        variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(candidate.thread_percentages[0])
    return variables


def commands(manifest: Manifest, candidate: Candidate) -> list[str]:
    """The shell commands that start exactly what was measured, one engine per line."""
    if candidate.settings is None:
        return []
    lines = []
    variables = environment(manifest, candidate)
    if candidate.mps:
        directories = (
            f"CUDA_VISIBLE_DEVICES={manifest.gpu.uuid} CUDA_MPS_PIPE_DIRECTORY={PIPE_DIRECTORY} "
            f"CUDA_MPS_LOG_DIRECTORY={LOG_DIRECTORY}"
        )
        lines.append(f"mkdir -p {PIPE_DIRECTORY} {LOG_DIRECTORY}")
        lines.append(f"{directories} nvidia-cuda-mps-control -d")
    prefix = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    # What stood in for weights and for prefill while measuring has no place in a deployment.
    real = msgspec.structs.replace(candidate.settings, load_format="auto")
    flags = " ".join(shlex.quote(flag) for flag in settings.serve_arguments(real, "serve"))
    placed = cores.plan(manifest.host.cores, candidate.engines)
    for engine in range(candidate.engines):
        pin = f"taskset -c {','.join(map(str, placed.engine_cores[engine]))} " if placed else ""
        line = f"{pin}vllm serve {shlex.quote(manifest.model.name)} --port {FIRST_PORT + engine} {flags}"
        lines.append(f"{prefix} {line}".strip())
    return lines
