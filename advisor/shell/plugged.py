"""What an engine is given of ours to run inside it: the fixed steps, and models without a part."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from advisor.core.records import Part
from advisor.shell import ablated

_STEPS, _ABLATED = "mps_advisor_inside", "mps_advisor_ablated"
_ARCHITECTURES: dict[Part, str] = {
    "attention": "MpsAdvisorWithoutAttention",
    "mlp": "MpsAdvisorWithoutMlp",
    "both": "MpsAdvisorWithoutBoth",
}


def plugged_in(folder: Path, without: Part | None, architecture: str) -> tuple[list[str], dict[str, str]]:
    """Options and environment of an engine that can be asked for fixed steps, of a model of this architecture or of
    what is left of it `without` a part. Writes what it needs into `folder`, which has to be new.

    A folder of its own: vLLM's environment must find these files and nothing else of this program.
    """
    folder.mkdir()
    here = Path(__file__).parent
    shutil.copy(here / "inside.py", folder / f"{_STEPS}.py")
    argv = ["--worker-extension-cls", f"{_STEPS}.FixedSteps"]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "VLLM_SERVER_DEV_MODE": "1"}
    if without is not None:
        _plug_in(here / "ablated.py", folder)
        argv += ["--hf-overrides", json.dumps({"architectures": [_ARCHITECTURES[without]]})]
        environment[ablated.BASE] = architecture
        # Where plug-ins are chosen, even none of them, this one has to be among them.
        if (chosen := os.environ.get("VLLM_PLUGINS")) is not None:
            environment["VLLM_PLUGINS"] = ",".join(filter(None, [chosen, _ABLATED]))
    return argv, environment


def _plug_in(source: Path, folder: Path) -> None:
    """Make a file a plug-in that vLLM finds, as if it had been installed."""
    shutil.copy(source, folder / f"{_ABLATED}.py")
    installed = folder / f"{_ABLATED}-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_ABLATED}\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{_ABLATED} = {_ABLATED}:register\n")
