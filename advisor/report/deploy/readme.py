"""README.txt of a deployment: what it is, how to use it, what to know."""

from __future__ import annotations

import textwrap

from advisor.core.deployment import Deployment
from advisor.report.deploy.files import File, shown

_WIDTH = 80


def readme(deployment: Deployment, steps: str) -> File:
    """`steps` says how this target is started, checked and stopped."""
    count = len(deployment.engines)
    engines = "1 engine" if count == 1 else f"{count} engines"
    mps = "under MPS" if deployment.daemon else "without MPS"
    percentage = deployment.engines[0].environment.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
    share = f", {percentage} % of the threads each" if percentage else ""
    who = (
        "The balancer listens there, the engines on ports of their own."
        if deployment.balancer
        else "It is the engine itself that listens there: one engine needs no balancer, and clients need not know."
    )
    address = f"http://{shown(deployment.host)}:{deployment.port}/v1"
    parts = [
        _wrapped(f"{deployment.model} on {deployment.gpu_name}: {engines} {mps}{share}"),
        _wrapped(deployment.sentence),
        steps.rstrip("\n"),
        _wrapped(f"Clients ask {address} for the model “{deployment.model}”. {who}")
        if deployment.target != "kubernetes"
        else _wrapped(f"Clients ask the service for the model “{deployment.model}”. {who}"),
        _wrapped("Nobody is asked who they are: whoever reaches that address is served."),
        _listed("To know", deployment.notes),
    ]
    if deployment.cost_of_mps:
        parts.append(_listed("What MPS costs", deployment.cost_of_mps))
    parts.append(
        _wrapped("docs/operations.md of mps-advisor says what to watch, and what to do when the MPS server is lost.")
    )
    return File(name="README.txt", text="\n\n".join(parts) + "\n")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _listed(title: str, lines: list[str]) -> str:
    points = [
        textwrap.fill(line, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
        for line in lines
    ]
    return "\n".join([f"{title}:", *points])
