"""The systemd target: one unit for the daemon, one per engine (their cores and ports differ), one for the balancer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from advisor.core.deployment import Deployment, Engine
from advisor.report.deploy.files import DRAIN_S, START_S, STOP_S, File, probe, script, settings_file, shown
from advisor.report.deploy.nginx import nginx_file
from advisor.report.deploy.readme import readme

Lines = Iterable[str]

_PRIVILEGED_PORTS = 1024


def render(deployment: Deployment, vllm: Sequence[str]) -> list[File]:
    """All files; `vllm` is the command that is followed by `serve`."""
    group = f"vllm-{deployment.port}"
    etc, unit = f"/etc/{group}", _Units(deployment, group)
    rendered = [
        unit.target(),
        *([unit.daemon(etc)] if deployment.daemon else []),
        *(unit.engine(engine, etc, vllm) for engine in deployment.engines),
        *([unit.balancer(etc)] if deployment.balancer else []),
        unit.check(etc),
        unit.timer(),
        *(script(name) for name in ("check.sh", "engine.sh", "common.sh")),
        *([script("daemon.sh")] if deployment.daemon else []),
        script("await.sh"),
        settings_file(deployment),
    ]
    if deployment.balancer is not None:
        rendered.append(
            nginx_file(
                listen=deployment.host,
                port=deployment.port,
                servers=[f"{shown(probe(deployment.engine_host))}:{engine.port}" for engine in deployment.engines],
                workers=max(1, len(deployment.balancer.cores)),
                run=f"/run/{group}-balancer",
                log="stderr",
                foreground=True,
            )
        )
    return [*rendered, readme(deployment, _STEPS.format(etc=etc, group=group))]


class _Units:
    def __init__(self, deployment: Deployment, group: str) -> None:
        self._deployment, self._group = deployment, group
        # All of them know one directory under /run. It stays while any of them runs.
        self._common = [f"User={_USER}", f"RuntimeDirectory={group}", "RuntimeDirectoryPreserve=yes"]

    def target(self) -> File:
        members = [self._name("mps")] if self._deployment.daemon else []
        members += [self._engine_name(engine) for engine in self._deployment.engines]
        members += [self._name("balancer")] if self._deployment.balancer else []
        return self._unit(
            f"{self._group}.target",
            Unit=[
                f"Description={_text(self._deployment.model)}, all that serves it on port {self._deployment.port}",
                f"Wants={' '.join([*members, f'{self._group}-check.timer'])}",
            ],
            Install=["WantedBy=multi-user.target"],
        )

    def daemon(self, etc: str) -> File:
        return self._unit(
            self._name("mps"),
            Unit=[
                f"Description=MPS daemon of {_text(self._deployment.gpu_name)}",
                f"PartOf={self._group}.target",
                # A crash loop is shown, not hidden.
                "StartLimitIntervalSec=600",
                "StartLimitBurst=5",
            ],
            Service=[
                *self._common,
                f"ExecStart=/usr/bin/env bash {etc}/daemon.sh",
                # It is up when it answers, so that engines that come after it find it.
                f"ExecStartPost=/usr/bin/env bash {etc}/await.sh daemon",
                "Restart=always",
                "RestartSec=2",
                # TERM to the script alone, which says quit and waits: engines have ended by then.
                "KillMode=mixed",
                "TimeoutStopSec=120",
                "LimitNOFILE=65536",
            ],
        )

    def engine(self, engine: Engine, etc: str, vllm: Sequence[str]) -> File:
        mps = [self._name("mps")] if self._deployment.daemon else []
        first = self._engine_name(self._deployment.engines[0])
        # The first one fills the compile cache for the others.
        after = mps + ([first] if engine.index else [])
        return self._unit(
            self._engine_name(engine),
            Unit=[
                f"Description={_text(self._deployment.model)}, engine {engine.index} on port {engine.port}",
                f"PartOf={self._group}.target",
                # Stopped before it and restarted with it. Not BindsTo=: what that stops when the daemon is lost need
                # not come back when it does (systemd issue 11695). An engine dies of a lost server by itself, is
                # started again by Restart=, and waits for the daemon.
                *([f"Requires={mps[0]}"] if mps else []),
                *([f"After={' '.join(after)}"] if after else []),
                "StartLimitIntervalSec=3600",
                "StartLimitBurst=5",
            ],
            Service=[
                *self._common,
                *([f"CPUAffinity={' '.join(map(str, engine.cores))}"] if engine.cores else []),
                *_environment(engine.environment),
                # engine.sh refuses to become an engine without the daemon.
                f"ExecStart={_command(['/usr/bin/env', 'bash', f'{etc}/engine.sh', str(engine.index), *vllm, *engine.arguments])}",  # noqa: E501
                # It is up when it is healthy and attached to MPS; else it is stopped again.
                f"ExecStartPost=/usr/bin/env bash {etc}/await.sh engine {engine.index}",
                f"TimeoutStartSec={START_S + 60}",
                "Restart=always",
                "RestartSec=5",
                # TERM to vLLM alone, which ends its engine core; never at once to a busy client of MPS.
                "KillMode=mixed",
                f"TimeoutStopSec={STOP_S + 30}",
                "LimitNOFILE=65536",
            ],
        )

    def balancer(self, etc: str) -> File:
        deployment = self._deployment
        assert deployment.balancer is not None
        engines = " ".join(self._engine_name(engine) for engine in deployment.engines)
        cores = deployment.balancer.cores
        return self._unit(
            self._name("balancer"),
            Unit=[
                f"Description=Load balancer of {_text(deployment.model)} on port {deployment.port}",
                f"PartOf={self._group}.target",
                f"After={engines}",
            ],
            Service=[
                f"User={_USER}",
                f"RuntimeDirectory={self._group}-balancer",
                *([f"CPUAffinity={' '.join(map(str, cores))}"] if cores else []),
                *(["AmbientCapabilities=CAP_NET_BIND_SERVICE"] if deployment.port < _PRIVILEGED_PORTS else []),
                # Only when every engine is healthy and attached; until then it is tried again. Later on it outlives
                # the restart of an engine.
                f"ExecStartPre=/usr/bin/env bash {etc}/check.sh engines",
                f"ExecStart=/usr/bin/env nginx -c {etc}/nginx.conf -e stderr",
                # QUIT lets running requests finish; TERM would cut them off.
                "KillSignal=SIGQUIT",
                "KillMode=mixed",
                f"TimeoutStopSec={DRAIN_S + 10}",
                "Restart=always",
                "RestartSec=10",
                "LimitNOFILE=65536",
            ],
        )

    def check(self, etc: str) -> File:
        return self._unit(
            f"{self._group}-check.service",
            Unit=[
                f"Description=Are all engines on port {self._deployment.port} healthy and attached",
                f"After={self._group}.target",
            ],
            Service=[
                "Type=oneshot",
                f"User={_USER}",
                f"ExecStart=/usr/bin/env bash {etc}/check.sh",
            ],
        )

    def timer(self) -> File:
        return self._unit(
            f"{self._group}-check.timer",
            Unit=[
                f"Description=Look after the engines on port {self._deployment.port} once a minute",
                f"PartOf={self._group}.target",
            ],
            Timer=["OnActiveSec=15min", "OnUnitActiveSec=1min"],
        )

    def _name(self, role: str) -> str:
        return f"{self._group}-{role}.service"

    def _engine_name(self, engine: Engine) -> str:
        return self._name(f"engine-{engine.index}")

    @staticmethod
    def _unit(name: str, **sections: Lines) -> File:
        text = "\n\n".join("\n".join([f"[{section}]", *lines]) for section, lines in sections.items())
        return File(name=name, text=f"# Written by mps-advisor deploy.\n{text}\n")


def _environment(variables: Mapping[str, str]) -> list[str]:
    return [f"Environment={_word(f'{name}={value}')}" for name, value in variables.items()]


def _command(words: Sequence[str]) -> str:
    """A command line for ExecStart=, where a dollar sign would begin a variable."""
    return " ".join(_word(word.replace("$", "$$")) for word in words)


def _word(text: str) -> str:
    """One word of a unit file (systemd.syntax(7)): in quotes where needed, per cent doubled."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    plain = all(character.isalnum() or character in "-_./:=,+@" for character in text)
    return escaped if plain and text else f'"{escaped}"'


def _text(text: str) -> str:
    """Text for Description=, which knows no quotes."""
    return text.replace("\\", "\\\\").replace("%", "%%")


_USER = "vllm"

_STEPS = """\
    sudo useradd --system --create-home vllm      # or put another user into the
                                                  # units: sed -i s/User=vllm/…/
    sudo install -d {etc}
    sudo install -m 644 nginx.conf settings.sh {etc}     # nginx.conf if it is there
    sudo install -m 755 *.sh {etc}
    sudo install -m 644 {group}* /etc/systemd/system
    sudo systemctl daemon-reload
    sudo systemctl enable --now {group}.target    # start
    sudo systemctl start {group}-check; systemctl status {group}-check
    sudo systemctl restart {group}-engine-0       # one engine; the others serve on
    sudo systemctl stop {group}.target            # balancer, engines, daemon

The user has to read the weights and to write its own home, where vLLM keeps its
compile cache. vllm, nginx and nvidia-cuda-mps-control have to be on the PATH
of system services, or write the deployment with --vllm /path/to/vllm.
Every minute {group}-check looks whether all engines are healthy and attached;
watch for that unit having failed. Logs: journalctl -u '{group}*'.
"""
