"""What it takes to run a candidate: environment, commands, and what MPS costs whoever runs it. Pure.

`describe` is the one source: the commands of a recommendation and the files of `deploy` both say what it says.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from advisor.core import cores, settings
from advisor.core.errors import BadQuestion, NoHonestAnswer, Unfit
from advisor.core.memory import GIB, weights_bytes
from advisor.core.records import (
    EngineSettings,
    GpuFacts,
    HostFacts,
    ModelFacts,
    Record,
    Report,
    Software,
)

Target = Literal["shell", "systemd", "compose", "kubernetes"]

PIPE_DIRECTORY = "/tmp/mps/pipe"
LOG_DIRECTORY = "/tmp/mps/log"
FIRST_PORT = 8000
LOCAL, ANYWHERE = "127.0.0.1", "0.0.0.0"
# Below it only root may listen.
_PRIVILEGED_PORTS = 1024
_LAST_PORT = 65535
# Where a deployment keeps what lives only while it runs. Short: MPS makes sockets there, whose paths have 107 bytes.
_CONTAINER_RUN = "/run/mps"


class Facts(Protocol):
    """What a run's manifest and its report both hold."""

    @property
    def model(self) -> ModelFacts: ...
    @property
    def gpu(self) -> GpuFacts: ...
    @property
    def host(self) -> HostFacts: ...
    @property
    def software(self) -> Software: ...


class Chosen(Protocol):
    """What a candidate and a recommendation both hold."""

    @property
    def engines(self) -> int | None: ...
    @property
    def mps(self) -> bool | None: ...
    @property
    def thread_percentages(self) -> list[int] | None: ...
    @property
    def settings(self) -> EngineSettings | None: ...


class Where(Record, frozen=True):
    """Where engines are to run, as far as that is not what was measured. The defaults are those of the commands that
    a recommendation shows.

    `model` is what `vllm serve` loads, None: the model by its name. `gpu` goes into CUDA_VISIBLE_DEVICES, None: the
    measured one, empty: nothing, because the container holds no other GPU. With `run`, a directory, everything that
    lives only while the engines run is in it. `host` and `port` are the first engine's, the next ones follow.
    """

    model: str | None = None
    gpu: str | None = None
    run: str | None = None
    host: str | None = None
    port: int = FIRST_PORT


_AS_SHOWN = Where()


class Daemon(Record, frozen=True):
    """The MPS daemon; `environment` is what it is started with."""

    pipe_directory: str
    log_directory: str
    environment: dict[str, str]


class Engine(Record, frozen=True):
    """One engine: the words that follow `vllm`, what its environment has to hold, its cores (none: any) and port."""

    index: int
    port: int
    cores: list[int]
    environment: dict[str, str]
    arguments: list[str]


class Balancer(Record, frozen=True):
    """The load balancer before several engines, on cores that no engine has."""

    port: int
    cores: list[int]


class Deployment(Record, frozen=True):
    """Everything that the files of one deployment say. `host` and `port` are what clients connect to: the balancer's,
    or the engine's where there is one only. Engines behind a balancer listen on `engine_host`.
    """

    target: Target
    name: str
    model: str  # by which clients ask for it
    loaded: str  # what `vllm serve` loads
    gpu: str
    gpu_name: str
    vllm: str | None
    run: str
    host: str
    port: int
    engine_host: str
    daemon: Daemon | None
    engines: list[Engine]
    balancer: Balancer | None
    sentence: str
    notes: list[str]
    cost_of_mps: list[str]


# ---------------------------------------------------------------- one source: environment, arguments, cores


def environment(facts: Facts, chosen: Chosen, where: Where = _AS_SHOWN, engine: int = 0) -> dict[str, str]:
    """What an engine's environment has to hold: the GPU, what vLLM was set to, and the way to the daemon.

    With `where.run` also what keeps an engine without MPS from every daemon: an empty pipe directory.
    """
    gpu = facts.gpu.uuid if where.gpu is None else where.gpu
    variables = {**({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}), **facts.software.environment}
    if chosen.settings is not None:
        variables |= settings.serve_environment(chosen.settings)
    if where.run is not None:
        variables["VLLM_RPC_BASE_PATH"] = f"{where.run}/rpc"  # vLLM leaves its sockets there
    if not chosen.mps:
        return variables | ({} if where.run is None else {"CUDA_MPS_PIPE_DIRECTORY": f"{where.run}/empty"})
    pipe, log = _directories(where)
    variables |= {"CUDA_MPS_PIPE_DIRECTORY": pipe, "CUDA_MPS_LOG_DIRECTORY": log}
    if chosen.thread_percentages:
        variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(chosen.thread_percentages[engine])
    return variables


def describe(facts: Facts, chosen: Chosen, where: Where = _AS_SHOWN) -> tuple[Daemon | None, list[Engine]]:
    """The daemon, if there is one, and the engines, exactly as they were measured. No engines without settings."""
    if chosen.settings is None or not chosen.engines:
        return None, []
    # What stood in for weights and for prefill while measuring has no place in a deployment.
    real = msgspec.structs.replace(chosen.settings, load_format="auto")
    placed = cores.plan(facts.host.cores, chosen.engines)
    model = facts.model.name if where.model is None else where.model
    engines = []
    for index in range(chosen.engines):
        port = where.port + index
        arguments = ["serve", model]
        if model != facts.model.name:
            arguments += ["--served-model-name", facts.model.name]
        if where.host is not None:
            arguments += ["--host", where.host]
        arguments += ["--port", str(port), *settings.serve_arguments(real, "serve")]
        engines.append(
            Engine(
                index=index,
                port=port,
                cores=placed.engine_cores[index] if placed else [],
                environment=environment(facts, chosen, where, index),
                arguments=arguments,
            )
        )
    return _daemon(facts, chosen, where), engines


def _daemon(facts: Facts, chosen: Chosen, where: Where) -> Daemon | None:
    if not chosen.mps:
        return None
    pipe, log = _directories(where)
    gpu = facts.gpu.uuid if where.gpu is None else where.gpu
    variables = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    variables |= {"CUDA_MPS_PIPE_DIRECTORY": pipe, "CUDA_MPS_LOG_DIRECTORY": log}
    return Daemon(pipe_directory=pipe, log_directory=log, environment=variables)


def _directories(where: Where) -> tuple[str, str]:
    return (PIPE_DIRECTORY, LOG_DIRECTORY) if where.run is None else (f"{where.run}/pipe", f"{where.run}/log")


# ---------------------------------------------------------------- the recommendation's commands, and its costs


def commands(facts: Facts, chosen: Chosen) -> list[str]:
    """The shell commands that start exactly what was measured, one engine per line."""
    daemon, engines = describe(facts, chosen)
    lines = []
    if daemon is not None:
        lines.append(f"mkdir -p {daemon.pipe_directory} {daemon.log_directory}")
        lines.append(f"{_assigned(daemon.environment)} nvidia-cuda-mps-control -d")
    for engine in engines:
        pin = f"taskset -c {','.join(map(str, engine.cores))} " if engine.cores else ""
        line = f"{_assigned(engine.environment)} {pin}{shlex.join(['vllm', *engine.arguments])}"
        lines.append(line.strip())
    return lines


def _assigned(variables: dict[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def cost_of_mps(model: ModelFacts, chosen: Chosen) -> list[str]:
    """What whoever runs the engines under MPS takes on; empty without MPS.

    Sources: NVIDIA's MPS documentation on error containment, the article of Databricks that the README names, and
    what was seen on an H200 (docs/operations.md).
    """
    if not chosen.mps or not chosen.engines:
        return []
    several = chosen.engines > 1
    all_of_them = f"all {chosen.engines} engines die" if several else "the engine dies"
    lines = [
        "A daemon to start before the engines, to watch, and to stop after them. Where it is missing, an engine runs "
        "without MPS and says nothing.",
        f"Shared fate: when the MPS server dies, {all_of_them} with it.",
        "No isolation: one engine's illegal memory access can take the others down.",
    ]
    if not several:
        return lines
    lines.append("A load balancer to run and to watch in front of the engines.")
    if chosen.settings is not None and chosen.settings.enable_prefix_caching:
        lines.append(
            f"The prefix cache is split {chosen.engines} ways: an engine finds again only what was sent to it before."
        )
    # The sums know weights of 16 bits and of fp8.
    copies = f"{chosen.engines} copies of the weights"
    if model.quantization in (None, "fp8"):
        each = weights_bytes(model)
        lines.append(
            f"{copies}, {each / GIB:.1f} GiB each: {chosen.engines * each / GIB:.1f} GiB of GPU memory instead of "
            f"{each / GIB:.1f}, and {chosen.engines} CUDA contexts and sets of graphs."
        )
    else:
        lines.append(f"{copies}, and {chosen.engines} CUDA contexts and sets of graphs.")
    return lines


# ---------------------------------------------------------------- a deployment


class Asked(Record, frozen=True):
    """What may differ from what was measured. None: the default (see `deployment`)."""

    target: Target
    model: str | None = None
    gpu: str | None = None
    host: str | None = None
    port: int = FIRST_PORT


def deployment(report: Report, asked: Asked) -> Deployment:
    """What the report recommends, laid out for a target.

    Clients connect to `asked.port`: the balancer listens there and the engines on the ports that follow; a single
    engine has no balancer and listens there itself, so that clients need not know. Raises NoHonestAnswer when the
    report recommends nothing, BadQuestion for what cannot be asked, Unfit when the report names a model that no
    command line takes.
    """
    advice = report.recommendation
    if advice.status != "recommend" or advice.settings is None or advice.engines is None:
        raise NoHonestAnswer(
            f"this report's status is {advice.status}, and only what is recommended can be deployed; measure again, or "
            "ask for less (objectives, --min-gain)"
        )
    _check(report, asked)
    several = advice.engines > 1
    where = _where(asked, several)
    first = where.port
    if max(asked.port, first + advice.engines - 1) > _LAST_PORT:
        raise BadQuestion(f"--port is {asked.port}; {advice.engines} engines need as many ports above it")
    daemon, engines = describe(report, advice, where)
    placed = cores.plan(report.host.cores, advice.engines)
    return Deployment(
        target=asked.target,
        name=slug(report.model.name),
        model=report.model.name,
        loaded=report.model.name if asked.model is None else asked.model,
        gpu=report.gpu.uuid if where.gpu is None else where.gpu,
        gpu_name=report.gpu.name,
        vllm=report.software.vllm,
        run=where.run or "",
        host=_public_host(asked),
        port=asked.port,
        engine_host=where.host or LOCAL,
        daemon=daemon,
        engines=engines,
        balancer=Balancer(port=asked.port, cores=placed.load_cores if placed else []) if several else None,
        sentence=advice.sentence,
        notes=_notes(report, asked),
        cost_of_mps=cost_of_mps(report.model, advice),
    )


def slug(name: str) -> str:
    """A name as containers and services may be called: lower-case letters, digits and hyphens, 40 at most."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"vllm-{words}"[:40].rstrip("-")


def _where(asked: Asked, several: bool) -> Where:
    """Only on one host the GPU and the directory are known beforehand: a container has its own of both."""
    port = asked.port
    if several:
        port = asked.port + 1 if asked.port >= _PRIVILEGED_PORTS else FIRST_PORT + 1
    match asked.target:
        case "shell":
            host, run, gpu = LOCAL, f"/tmp/mps-advisor-{asked.port}", asked.gpu
        case "systemd":
            host, run, gpu = LOCAL, f"/run/vllm-{asked.port}", asked.gpu
        case "compose":
            host, run, gpu = ANYWHERE, _CONTAINER_RUN, asked.gpu
        case "kubernetes":
            host, run, gpu = LOCAL if several else ANYWHERE, _CONTAINER_RUN, ""
    if not several and asked.target in ("shell", "systemd"):
        host = _public_host(asked)
    model = asked.model
    if model is not None and model.startswith("/") and asked.target in ("compose", "kubernetes"):
        model = MODEL_MOUNT
    return Where(model=model, gpu=gpu, run=run, host=host, port=port)


# Where containers find the weights that are a folder of their host.
MODEL_MOUNT = "/model"


def _public_host(asked: Asked) -> str:
    return asked.host if asked.host is not None else LOCAL


def _check(report: Report, asked: Asked) -> None:
    if not report.model.name or not report.model.name.isprintable():
        raise Unfit(f"the report's model is called {report.model.name!r}; a printable name is expected")
    # Before it an option's value: what begins with a hyphen would be taken for an option itself.
    if asked.model is not None and (not asked.model.isprintable() or not asked.model or asked.model.startswith("-")):
        raise BadQuestion(f"--model is {asked.model!r}; a folder or a model's name is expected")
    if asked.gpu is not None and not re.fullmatch(r"[0-9]+|(GPU|MIG)-[0-9A-Za-z-]+", asked.gpu):
        raise BadQuestion(f"--gpu is “{asked.gpu}”; an index or a UUID like GPU-8de7794b-… is expected")
    if asked.host is not None and not re.fullmatch(r"[0-9A-Za-z.:-]+", asked.host):
        raise BadQuestion(f"--host is “{asked.host}”; an address or a name like 0.0.0.0 is expected")
    if not 1 <= asked.port <= _LAST_PORT:
        raise BadQuestion(f"--port is {asked.port}; 1 to {_LAST_PORT} is expected")
    if asked.target == "kubernetes":
        for name, value in (("--host", asked.host), ("--gpu", asked.gpu)):
            if value is not None:
                raise BadQuestion(f"{name} says nothing for kubernetes, where the cluster decides that; leave it out")


def _notes(report: Report, asked: Asked) -> list[str]:
    """What whoever starts it has to know of how it was measured."""
    workload, model = report.workload, report.model
    load = f"{workload.isl} tokens in, {workload.osl} out, {report.recommendation.concurrency} requests in flight"
    notes = [
        f"Measured on {report.gpu.name}, driver {report.gpu.driver}, vLLM {report.software.vllm or '?'}, "
        f"{report.host.cpu}, with {load}. Another GPU, host, vLLM or load is another measurement.",
    ]
    if model.weights == "dummy" and asked.model is None:
        notes.append(
            "It was measured with weights of the right shape and random values. The engines load the real ones by the "
            "model's name; where they lie in a folder, write the deployment with --model FOLDER."
        )
    if workload.kind != "serve":
        notes.append(
            f"It was measured with {workload.kind} work alone, which is not what clients of a server ask for: the "
            "verdict holds for that kind of work only."
        )
    chosen = report.recommendation.settings
    if chosen is not None and not chosen.enable_prefix_caching:
        notes.append("Prefix caching is off, as it was while measuring.")
    return notes


def core_list(numbers: Sequence[int]) -> str:
    """Cores as taskset, cpuset and systemd take them: 0,1,2."""
    return ",".join(map(str, numbers))
