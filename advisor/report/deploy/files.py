"""What every target's files are made of: the file itself, the scripts that all targets share, and their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files

from advisor.core.deployment import ANYWHERE, LOCAL, Deployment
from advisor.core.records import Record

# How long a cold first engine may take, requests may finish after the end was asked for, and an engine may take to
# end. Starts of one engine took 27 to 117 s on an H200 (docs/operations.md).
START_S, DRAIN_S, STOP_S, DAEMON_S = 900, 60, 60, 30


class File(Record, frozen=True):
    """One file of a deployment, by its name in the directory."""

    name: str
    text: str
    executable: bool = False


def script(name: str) -> File:
    """One of the shell scripts beside this module, as it is."""
    return File(name=name, text=files(__package__).joinpath(name).read_text(encoding="utf-8"), executable=True)


def settings_file(deployment: Deployment, more: Mapping[str, str | int | Sequence[str]] = {}) -> File:
    """The settings that the scripts read, as bash assignments."""
    single = deployment.engines[0]
    values: dict[str, str | int | Sequence[str]] = {
        "RUN": deployment.run,
        "GPU": deployment.gpu,
        "MPS": int(deployment.daemon is not None),
        "BALANCER": int(deployment.balancer is not None),
        "PROBE": probe(deployment.engine_host),
        "PORTS": [str(engine.port) for engine in deployment.engines],
        "PUBLIC_PROBE": probe(deployment.host),
        "PUBLIC_PORT": deployment.port if deployment.balancer else single.port,
        "START_S": START_S,
        "DRAIN_S": DRAIN_S,
        "STOP_S": STOP_S,
        "DAEMON_S": DAEMON_S,
        **more,
    }
    # Times may be given by the environment, for hosts that are slower or less patient.
    waits = {"START_S", "DRAIN_S", "STOP_S", "DAEMON_S"}
    lines = ["# shellcheck shell=bash disable=SC2034,SC2016", "# Written by mps-advisor deploy; what the scripts read."]
    for name, value in values.items():
        if name in waits:
            lines.append(f"{name}=${{{name}:-{value}}}")
        elif isinstance(value, str | int):
            lines.append(f"{name}={_quoted(str(value))}")
        else:
            lines.append(f"{name}=({' '.join(map(_quoted, value))})")
    return File(name="settings.sh", text="\n".join(lines) + "\n")


def _quoted(text: str) -> str:
    """A word for bash, in quotes whether it needs them or not: commas and hyphens look like mistakes to shellcheck."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def probe(host: str) -> str:
    """Where to ask what listens on `host`."""
    return {ANYWHERE: LOCAL, "::": "::1"}.get(host, host)


def shown(host: str) -> str:
    """A host as it stands in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def assigned(variables: Mapping[str, str]) -> list[str]:
    """An environment as NAME=value words."""
    return [f"{name}={value}" for name, value in variables.items()]
