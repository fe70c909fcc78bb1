"""A deployment as files, by target. `render` is all that others call."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.core.deployment import Deployment
from advisor.report.deploy import compose, kubernetes, shell, systemd
from advisor.report.deploy.files import File


def render(deployment: Deployment, vllm: Sequence[str], image: str) -> list[File]:
    """Every file of the deployment. `vllm` is the command that `serve` follows, `image` the containers' image."""
    match deployment.target:
        case "shell":
            return shell.render(deployment, vllm)
        case "systemd":
            return systemd.render(deployment, vllm)
        case "compose":
            return compose.render(deployment, vllm, image)
        case "kubernetes":
            return kubernetes.render(deployment, vllm, image)
