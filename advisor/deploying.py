"""What stands between the command line and the files of a deployment."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from advisor import __version__
from advisor.core.deployment import Asked, Deployment, deployment
from advisor.core.errors import BadQuestion
from advisor.report.deploy import render
from advisor.shell import deployed
from advisor.shell.reports import read_report

IMAGE = "vllm/vllm-openai"


def deploy(
    source: Path, out: Path, asked: Asked, vllm: str | None, image: str | None
) -> tuple[Deployment, dict[str, Any]]:
    """Write the deployment that the report in `source` recommends into `out`; what was written, for people and as
    plain data. Raises BadQuestion, Unfit, NoHonestAnswer.
    """
    contained = asked.target in ("compose", "kubernetes")
    if image is not None and not contained:
        raise BadQuestion(f"--image says nothing for {asked.target}, which has no containers; leave it out")
    if image is not None and (not image.isprintable() or not image.strip()):
        raise BadQuestion(f"--image is {image!r}; a container image is expected")
    command = _words(vllm)
    made = deployment(read_report(source), asked)
    if contained and asked.model is not None and not asked.model.startswith("/") and Path(asked.model).is_dir():
        raise BadQuestion(f"--model is the folder {asked.model}; a container needs its absolute path")
    files = render(made, command, image or f"{IMAGE}:{'v' + made.vllm if made.vllm else 'latest'}")
    deployed.write(
        out,
        {file.name: deployed.Text(text=file.text, executable=file.executable) for file in files},
        advisor=__version__,
        target=asked.target,
        report=str(source),
        run=made.run if asked.target == "shell" else None,
    )
    return made, {
        "target": made.target,
        "directory": str(out),
        "files": sorted(file.name for file in files),
        "model": made.model,
        "engines": len(made.engines),
        "mps": made.daemon is not None,
        "host": made.host if asked.target != "kubernetes" else None,
        "port": made.port,
        "engine_ports": [engine.port for engine in made.engines],
        "notes": made.notes,
        "cost_of_mps": made.cost_of_mps,
    }


def _words(vllm: str | None) -> list[str]:
    if vllm is None:
        return ["vllm"]
    try:
        words = shlex.split(vllm)
    except ValueError as error:
        raise BadQuestion(f"--vllm is “{vllm}”: {error}; a command like /opt/vllm/bin/vllm is expected") from None
    if not words or not vllm.isprintable():
        raise BadQuestion(f"--vllm is {vllm!r}; a command like /opt/vllm/bin/vllm is expected")
    return words
