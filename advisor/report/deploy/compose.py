"""The compose target: one container for the daemon, one per engine, one for the balancer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from advisor.core.deployment import MODEL_MOUNT, Deployment, Engine, core_list
from advisor.report.deploy.files import DRAIN_S, START_S, STOP_S, File, script, settings_file, shown
from advisor.report.deploy.nginx import nginx_file
from advisor.report.deploy.readme import readme

BALANCER_IMAGE = "nginx:stable"
# Every container finds the scripts there, and its share of the host's driver with the programs of MPS.
_SCRIPTS = "/deploy"
_CAPABILITIES = "compute,utility"
_SHARED_MEMORY = "8gb"  # a limit, no reservation


def render(deployment: Deployment, vllm: Sequence[str], image: str) -> list[File]:
    """All files; the engines' containers are of `image`, where `vllm` is followed by `serve`."""
    document = _plain(_document(deployment, vllm, image))
    text = _HEADER + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    rendered = [File(name="compose.yaml", text=text)]
    rendered += [script(name) for name in ("check.sh", "engine.sh", "common.sh")]
    rendered += [script("daemon.sh")] if deployment.daemon else []
    # A container has its engine on its own address, and only the GPU that it was given.
    rendered.append(settings_file(deployment))
    if deployment.balancer is not None:
        rendered.append(
            nginx_file(
                listen="0.0.0.0",
                port=deployment.port,
                servers=[f"engine-{engine.index}:{engine.port}" for engine in deployment.engines],
                workers=max(1, len(deployment.balancer.cores)),
                run="/tmp",
                log="stderr",
                foreground=True,
            )
        )
    return [*rendered, readme(deployment, _STEPS)]


def _document(deployment: Deployment, vllm: Sequence[str], image: str) -> dict[str, Any]:
    services: dict[str, Any] = {}
    if deployment.daemon is not None:
        services["mps"] = _daemon(deployment, image)
    for engine in deployment.engines:
        services[f"engine-{engine.index}"] = _engine(deployment, engine, vllm, image)
    if deployment.balancer is not None:
        services["balancer"] = _balancer(deployment)
    volumes: dict[str, Any] = {"cache": None}
    if deployment.daemon is not None:
        volumes["run"] = None
    return {"name": deployment.name, "services": services, "volumes": volumes}


def _on_the_gpu(deployment: Deployment, image: str) -> dict[str, Any]:
    devices = [{"driver": "nvidia", "device_ids": [deployment.gpu], "capabilities": ["gpu"]}]
    return {
        "image": image,
        "deploy": {"resources": {"reservations": {"devices": devices}}},
        "ulimits": {"nofile": 65536},
    }


def _daemon(deployment: Deployment, image: str) -> dict[str, Any]:
    assert deployment.daemon is not None
    return {
        **_on_the_gpu(deployment, image),
        "entrypoint": ["bash", f"{_SCRIPTS}/daemon.sh"],
        "command": [],
        "environment": {"NVIDIA_DRIVER_CAPABILITIES": _CAPABILITIES},
        # Server and clients share memory, and the daemon has to know its clients' PIDs.
        "ipc": "shareable",
        "shm_size": _SHARED_MEMORY,
        "init": True,
        "volumes": [f"./:{_SCRIPTS}:ro", f"run:{deployment.run}"],
        "healthcheck": {
            "test": ["CMD", "bash", f"{_SCRIPTS}/check.sh", "daemon"],
            "interval": "10s",
            "timeout": "30s",
            "retries": 3,
            "start_period": "30s",
        },
        # A daemon that comes back alone would find no engine of before attached to it.
        "restart": "no",
        "stop_grace_period": "60s",
    }


def _engine(deployment: Deployment, engine: Engine, vllm: Sequence[str], image: str) -> dict[str, Any]:
    needs = {}
    volumes: list[Any] = [f"./:{_SCRIPTS}:ro", "cache:/root/.cache"]
    if deployment.loaded.startswith("/"):
        # By its long form: a path may hold a colon.
        volumes.append({"type": "bind", "source": deployment.loaded, "target": MODEL_MOUNT, "read_only": True})
    shared: dict[str, Any] = {"ipc": "private", "shm_size": _SHARED_MEMORY}
    if deployment.daemon is not None:
        needs["mps"] = {"condition": "service_healthy"}
        volumes.append(f"run:{deployment.run}")
        shared = {"ipc": "service:mps", "pid": "service:mps"}
    if engine.index:
        # The first one fills the compile cache for the others.
        needs["engine-0"] = {"condition": "service_healthy"}
    service = {
        **_on_the_gpu(deployment, image),
        **shared,
        "entrypoint": ["bash", f"{_SCRIPTS}/engine.sh", str(engine.index)],
        "command": [*vllm, *engine.arguments],
        "environment": {
            **engine.environment,
            "NVIDIA_DRIVER_CAPABILITIES": _CAPABILITIES,
        },
        "volumes": volumes,
        "depends_on": needs,
        "healthcheck": {
            "test": ["CMD", "bash", f"{_SCRIPTS}/check.sh", "engine", str(engine.index)],
            "interval": "15s",
            "timeout": "30s",
            "retries": 3,
            "start_period": f"{START_S}s",
        },
        "restart": "on-failure",
        "stop_grace_period": f"{STOP_S + 30}s",
    }
    if engine.cores:
        service["cpuset"] = core_list(engine.cores)
    if deployment.balancer is None:
        service["ports"] = [_published(deployment, engine.port)]
    return service


def _balancer(deployment: Deployment) -> dict[str, Any]:
    assert deployment.balancer is not None
    service: dict[str, Any] = {
        "image": BALANCER_IMAGE,
        "command": ["nginx", "-c", "/etc/nginx/nginx.conf"],
        "volumes": ["./nginx.conf:/etc/nginx/nginx.conf:ro"],
        "ports": [_published(deployment, deployment.port)],
        # Every one of them healthy, and attached to MPS: that is what their health checks ask.
        "depends_on": {f"engine-{engine.index}": {"condition": "service_healthy"} for engine in deployment.engines},
        "ulimits": {"nofile": 65536},
        "stop_signal": "SIGQUIT",
        "restart": "unless-stopped",
        "stop_grace_period": f"{DRAIN_S + 10}s",
    }
    if deployment.balancer.cores:
        service["cpuset"] = core_list(deployment.balancer.cores)
    return service


def _published(deployment: Deployment, port: int) -> str:
    return f"{shown(deployment.host)}:{deployment.port}:{port}"


def _plain(value: Any) -> Any:  # noqa: ANN401 - YAML
    """Compose would put variables in the place of $NAME: every dollar sign is meant as it stands."""
    match value:
        case dict():
            return {key: _plain(one) for key, one in value.items()}
        case list():
            return [_plain(one) for one in value]
        case str():
            return value.replace("$", "$$")
        case _:
            return value


_HEADER = """\
# Written by mps-advisor deploy. Needs Docker Compose 2.x, the NVIDIA container
# toolkit, and an image whose vLLM is the measured one.
#
# Under MPS the engines share the daemon's IPC and PID namespaces (and its pipe
# directory, in the volume "run"): clients and server exchange memory, and only in
# one PID namespace can the check find an engine core in the daemon's list. So the
# containers are no fence between the engines, as MPS is none.
#
# Start order: mps, engine-0 (it fills the compile cache), the other engines, and
# the balancer only when all of them are healthy, which includes attached. Stop
# order is the reverse: "docker compose down". Never "docker kill" or "docker stop"
# mps while engines run: they share its PID namespace and die with it, at once.
# When mps has died: docker compose down, then docker compose up -d.
"""

_STEPS = """\
    docker compose up -d      # mps, first engine, other engines, balancer
    docker compose ps         # healthy: it answers and is attached to MPS
    docker compose restart engine-0      # one engine; the others serve on
    docker compose down       # balancer, engines, mps

When the container mps has died, its engines have died too: docker compose down,
then docker compose up -d. An engine is never started without the daemon.
Weights that are no folder (--model) are downloaded into the volume "cache".
"""
