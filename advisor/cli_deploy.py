"""The verb `deploy`: a report in, files that start what was measured out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from advisor.options import Format, FormatOption, stdout

EPILOG = "Example: mps-advisor deploy report.json --target shell --out deployment && deployment/start.sh"


class TargetName(StrEnum):
    shell = "shell"
    systemd = "systemd"
    compose = "compose"
    kubernetes = "kubernetes"


def deploy(
    report: Annotated[Path, typer.Argument(help="What profile --format json wrote.", metavar="REPORT")],
    target: Annotated[TargetName, typer.Option(help="What starts the engines.")],
    out: Annotated[
        Path, typer.Option(help="New or empty directory, or an earlier deployment to replace.", metavar="DIR")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Folder with the weights there, or their Hugging Face id. [default: the model's name]"),
    ] = None,
    port: Annotated[
        int, typer.Option(help="Where clients connect; the engines behind it take the ports that follow.")
    ] = 8000,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0 lets others in. [default: 127.0.0.1]")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="GPU there, by UUID or index. [default: the measured one]", metavar="UUID|INDEX")
    ] = None,
    vllm: Annotated[
        str | None, typer.Option(help="How vLLM is started there. [default: vllm]", metavar="COMMAND")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Image of the containers. [default: vllm/vllm-openai of the measured version]")
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """Write files that start what was measured.

    Daemon, engines with their cores and settings, load balancer, checks, and the order to start and stop them in.
    """
    import json

    from advisor import deploying
    from advisor.core.deployment import Asked
    from advisor.report import deployed as text

    asked = Asked(target=target.value, model=model, gpu=gpu, host=host, port=port)
    made, written = deploying.deploy(report, out, asked, vllm, image)
    if format is Format.json:
        typer.echo(json.dumps(written, indent=2, ensure_ascii=False))
    else:
        text.render(made, written, stdout())
