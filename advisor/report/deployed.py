"""What `deploy` has written, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from advisor.core.deployment import Deployment
from advisor.report.deploy.files import shown
from advisor.report.formats import clean
from advisor.report.terminal import Line, emit, width_of, wrap

_NEXT = {
    "shell": "start.sh starts it, check.sh looks after it, stop.sh ends it.",
    "systemd": "README.txt says how the units are installed.",
    "compose": "docker compose up -d starts it.",
    "kubernetes": "kubectl apply -f kubernetes.yaml starts it; read the head of that file first.",
}


def render(made: Deployment, written: dict[str, Any], console: Console) -> None:
    """Print what was written where, how to go on, what to know."""
    emit(_lines(made, written, width_of(console)), console)


def _lines(made: Deployment, written: dict[str, Any], width: int) -> Iterator[Line]:
    count = len(made.engines)
    what = f"{count} engine{'s' if count > 1 else ''} {'under' if made.daemon else 'without'} MPS"
    yield from ((line, "bold") for line in wrap(f"{clean(made.model)}: {what}, for {made.target}", width))
    yield from ((line, "") for line in wrap(f"In {clean(written['directory'])}: {', '.join(written['files'])}", width))
    ports = [engine.port for engine in made.engines]
    address = f"http://{shown(made.host)}:{made.port}"
    if made.target == "kubernetes":
        address = f"the service {made.name}, port {made.port}"
    behind = f", the engines on {ports[0]} to {ports[-1]}" if made.balancer else " (the engine itself)"
    yield from ((line, "") for line in wrap(f"Clients connect to {address}{behind}.", width))
    yield from ((line, "") for line in wrap(_NEXT[made.target], width))
    for note in [*made.notes, *made.cost_of_mps]:
        yield from ((line, "dim") for line in wrap(f"  · {clean(note)}", width, "    "))
