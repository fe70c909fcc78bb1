"""The shell target: start.sh, stop.sh and check.sh, for one host without a service manager."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.core.deployment import Deployment, core_list
from advisor.report.deploy.files import File, assigned, probe, script, settings_file, shown
from advisor.report.deploy.nginx import nginx_file
from advisor.report.deploy.readme import readme


def render(deployment: Deployment, vllm: Sequence[str]) -> list[File]:
    """All files; `vllm` is the command that is followed by `serve`."""
    more: dict[str, str | int | Sequence[str]] = {
        "VLLM": list(vllm),
        "PUBLIC_HOST_SHOWN": shown(deployment.host),
        "CORES": [core_list(engine.cores) for engine in deployment.engines],
        "BALANCER_CORES": core_list(deployment.balancer.cores) if deployment.balancer else "",
        "DAEMON_ENVIRONMENT": assigned(deployment.daemon.environment) if deployment.daemon else [],
    }
    for engine in deployment.engines:
        more[f"ENGINE_{engine.index}_ENVIRONMENT"] = assigned(engine.environment)
        more[f"ENGINE_{engine.index}"] = engine.arguments
    rendered = [script(name) for name in _SCRIPTS]
    rendered.append(settings_file(deployment, more))
    if deployment.balancer is not None:
        rendered.append(
            nginx_file(
                listen=deployment.host,
                port=deployment.port,
                servers=[f"{shown(probe(deployment.engine_host))}:{engine.port}" for engine in deployment.engines],
                workers=max(1, len(deployment.balancer.cores)),
                run=f"{deployment.run}/nginx",
                log="logs/balancer.log",
            )
        )
    return [*rendered, readme(deployment, _STEPS.format(run=deployment.run))]


_SCRIPTS = ("start.sh", "stop.sh", "restart.sh", "check.sh", "engine.sh", "engines.sh", "common.sh")

_STEPS = """\
    ./start.sh    daemon, first engine, other engines, balancer; each waits for
                  what is before it, and a start that fails stops all of it
    ./check.sh    exit 0: every engine is healthy and attached to MPS
    ./restart.sh N   engine N anew, while the others serve on
    ./stop.sh     balancer, engines, daemon; leaves nothing but logs/

What is needed on PATH: vllm, bash, coreutils, util-linux; nginx where there are
several engines, nvidia-cuda-mps-control where there is MPS. No root.
While it runs, {run} holds its sockets and process numbers.
Nothing is started again by itself: run check.sh from a timer, or use the target
systemd. START_S, DRAIN_S and STOP_S in the environment change how long is waited.
"""
