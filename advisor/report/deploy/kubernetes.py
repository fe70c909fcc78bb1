"""The kubernetes target: one pod on one GPU, with the daemon and the engines as sidecars that start in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from advisor.core.deployment import MODEL_MOUNT, Deployment, Engine
from advisor.report.deploy.compose import BALANCER_IMAGE
from advisor.report.deploy.files import DRAIN_S, START_S, STOP_S, File, script, settings_file
from advisor.report.deploy.nginx import nginx_file
from advisor.report.deploy.readme import readme

Object = dict[str, Any]

_SCRIPTS = "/deploy"
_CLAIM = "gpu"


def render(deployment: Deployment, vllm: Sequence[str], image: str) -> list[File]:
    """All files; the engines' containers are of `image`, where `vllm` is followed by `serve`."""
    objects = [_config(deployment)]
    if len(deployment.engines) > 1:
        objects.append(_claim(deployment))
    objects += [_workload(deployment, vllm, image), _service(deployment)]
    text = _HEADER + yaml.safe_dump_all(objects, sort_keys=False, allow_unicode=True, width=100)
    return [File(name="kubernetes.yaml", text=text), readme(deployment, _STEPS.format(name=deployment.name))]


def _meta(deployment: Deployment) -> Object:
    return {"name": deployment.name, "labels": _labels(deployment)}


def _labels(deployment: Deployment) -> dict[str, str]:
    return {"app.kubernetes.io/name": deployment.name}


def _config(deployment: Deployment) -> Object:
    shared = [script(name) for name in ("check.sh", "engine.sh", "common.sh")]
    shared += [script("daemon.sh")] if deployment.daemon else []
    shared.append(settings_file(deployment))
    if deployment.balancer is not None:
        shared.append(
            nginx_file(
                listen="0.0.0.0",
                port=deployment.port,
                servers=[f"127.0.0.1:{engine.port}" for engine in deployment.engines],
                workers=max(1, len(deployment.balancer.cores)),
                run="/tmp",
                log="stderr",
                foreground=True,
            )
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _meta(deployment),
        "data": {file.name: file.text for file in shared},
    }


def _claim(deployment: Deployment) -> Object:
    """One GPU that all containers of the pod may share: the device plugin's nvidia.com/gpu goes to one container."""
    one = {"deviceClassName": "gpu.nvidia.com", "count": 1}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": _meta(deployment),
        "spec": {"spec": {"devices": {"requests": [{"name": _CLAIM, "exactly": one}]}}},
    }


def _workload(deployment: Deployment, vllm: Sequence[str], image: str) -> Object:
    several = deployment.balancer is not None
    engines = [_engine(deployment, engine, vllm, image, sidecar=several) for engine in deployment.engines]
    sidecars = [*([_daemon(deployment, image)] if deployment.daemon else []), *(engines if several else [])]
    containers = [_balancer(deployment)] if several else engines
    volumes: list[Object] = [
        {"name": "scripts", "configMap": {"name": deployment.name, "defaultMode": 0o555}},
        {"name": "run", "emptyDir": {}},
        # A limit, no reservation: what is written there counts as the containers' memory.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        {"name": "cache", "emptyDir": {}},
    ]
    if deployment.loaded.startswith("/"):
        volumes.append({"name": "model", "hostPath": {"path": deployment.loaded, "type": "Directory"}})
    pod: Object = {
        # Only so can the check find an engine core in the daemon's list of clients.
        **({"shareProcessNamespace": True} if deployment.daemon else {}),
        "terminationGracePeriodSeconds": DRAIN_S + STOP_S + 60,
        **({"initContainers": sidecars} if sidecars else {}),
        "containers": containers,
        "volumes": volumes,
    }
    if several:
        pod["resourceClaims"] = [{"name": _CLAIM, "resourceClaimTemplateName": deployment.name}]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _meta(deployment),
        "spec": {
            # One pod is one GPU. More GPUs: more replicas; the service spreads connections, not requests.
            "replicas": 1,
            # A second pod beside the first would want a second GPU.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": _labels(deployment)},
            "template": {"metadata": {"labels": _labels(deployment)}, "spec": pod},
        },
    }


def _mounts(deployment: Deployment) -> list[Object]:
    return [
        {"name": "scripts", "mountPath": _SCRIPTS},
        {"name": "run", "mountPath": deployment.run},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


def _daemon(deployment: Deployment, image: str) -> Object:
    check = {"exec": {"command": ["bash", f"{_SCRIPTS}/check.sh", "daemon"]}, "timeoutSeconds": 30}
    return {
        "name": "mps",
        "image": image,
        "restartPolicy": "Always",
        "command": ["bash", f"{_SCRIPTS}/daemon.sh"],
        "env": [{"name": "NVIDIA_DRIVER_CAPABILITIES", "value": "compute,utility"}],
        "resources": {"claims": [{"name": _CLAIM}]},
        "startupProbe": {**check, "periodSeconds": 2, "failureThreshold": 30},
        "livenessProbe": {**check, "periodSeconds": 30, "failureThreshold": 3},
        "volumeMounts": _mounts(deployment),
    }


def _engine(deployment: Deployment, engine: Engine, vllm: Sequence[str], image: str, *, sidecar: bool) -> Object:
    check = {
        "exec": {"command": ["bash", f"{_SCRIPTS}/check.sh", "engine", str(engine.index)]},
        "timeoutSeconds": 30,
    }
    mounts = [*_mounts(deployment), {"name": "cache", "mountPath": "/root/.cache"}]
    if deployment.loaded.startswith("/"):
        mounts.append({"name": "model", "mountPath": MODEL_MOUNT, "readOnly": True})
    variables = {**engine.environment, "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    cores = {"cpu": str(len(engine.cores))} if engine.cores else {}
    resources: Object = {"requests": cores, "limits": cores} if cores else {}
    if sidecar:
        resources["claims"] = [{"name": _CLAIM}]
    else:
        resources["limits"] = {**cores, "nvidia.com/gpu": "1"}
    container: Object = {
        "name": f"engine-{engine.index}",
        "image": image,
        **({"restartPolicy": "Always"} if sidecar else {}),
        "command": ["bash", f"{_SCRIPTS}/engine.sh", str(engine.index)],
        "args": [_literal(word) for word in [*vllm, *engine.arguments]],
        "env": [{"name": name, "value": _literal(value)} for name, value in variables.items()],
        "resources": resources,
        # The next container starts when this one is healthy and attached to MPS.
        "startupProbe": {**check, "periodSeconds": 10, "failureThreshold": START_S // 10},
        "livenessProbe": {**check, "periodSeconds": 30, "failureThreshold": 3},
        "volumeMounts": mounts,
    }
    if not sidecar:
        container["ports"] = [{"name": "http", "containerPort": engine.port}]
        container["readinessProbe"] = {**check, "periodSeconds": 10}
    return container


def _balancer(deployment: Deployment) -> Object:
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 10}
    return {
        "name": "balancer",
        "image": BALANCER_IMAGE,
        "command": ["nginx", "-c", f"{_SCRIPTS}/nginx.conf"],
        "ports": [{"name": "http", "containerPort": deployment.port}],
        "readinessProbe": {**health, "periodSeconds": 5},
        # Until nobody sends it new requests; then the image's stop signal, QUIT, lets the running ones finish.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "5"]}}},
        "volumeMounts": [{"name": "scripts", "mountPath": _SCRIPTS}],
    }


def _service(deployment: Deployment) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(deployment),
        "spec": {
            "selector": _labels(deployment),
            "ports": [{"name": "http", "port": deployment.port, "targetPort": "http"}],
        },
    }


def _literal(text: str) -> str:
    """Kubernetes would put a variable in the place of $(NAME): it is meant as it stands."""
    return text.replace("$(", "$$(")


_HEADER = """\
# Written by mps-advisor deploy.
#
# Not what was measured to the last: containers add their own overhead, and it has
# not been measured. What it keeps: one GPU, the same engines with the same flags,
# environment and number of cores, one private MPS daemon, a gated start.
#
# The device plugin's own MPS sharing (sharing.mps.replicas: N) cannot give this:
# every client gets 1/N of the threads and 1/N of the memory, the same on all GPUs
# of the node, and it needs two replicas at least. What is recommended may be no
# limit, or 50 % for each of four. So the pod brings a daemon of its own: on its
# node the plugin's MPS sharing has to be off (two daemons of one GPU only make
# their clients take turns).
#
# With several engines the containers share one GPU by a ResourceClaim: Kubernetes
# 1.34 or newer with NVIDIA's DRA driver for GPUs. nvidia.com/gpu: 1 would give the
# GPU to a single container. On a cluster without it, run the target "shell" in
# one container that asks for nvidia.com/gpu: 1 and has nginx.
#
# mps and the engines are sidecars (restartable init containers): each starts when
# the one before it is healthy and, for an engine, attached to MPS; the balancer
# comes last. When the pod ends, Kubernetes stops the balancer first, then the
# sidecars in reverse order: engines, then the daemon.
#
# If the daemon dies, the engines die with its server and are started again; each
# waits until the daemon answers, and none runs without it.
#
# Cores of its own for each engine, as while measuring, take the kubelet's static
# CPU manager policy and memory limits equal to requests in every container: how
# much host memory an engine needs was not measured, so none is asked for here.
# hostPath weights (--model) have to be on the node: add a nodeSelector.
"""

_STEPS = """\
    kubectl apply -f kubernetes.yaml
    kubectl rollout status deployment/{name} --timeout=30m
    kubectl exec deploy/{name} -c engine-0 -- bash /deploy/check.sh engine 0
    kubectl delete -f kubernetes.yaml

The head of kubernetes.yaml says what the cluster has to have, and what the device
plugin's own MPS sharing cannot do.
"""
