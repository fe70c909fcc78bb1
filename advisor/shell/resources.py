"""Where the shipped facts and recorded runs lie: beside the code in a wheel, at the top of a source tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from advisor.core.errors import Unfit

_PACKAGE = Path(__file__).resolve().parent.parent


def profiles_directory() -> Path:
    """The folder with the hardware and model facts."""
    return _directory("profiles")


def data_directory() -> Path:
    """The folder with the recorded runs."""
    return _directory("data")


def load_yaml(relative: str) -> Any:  # noqa: ANN401 (what a YAML file holds is for its reader to check)
    """The parsed file `relative` below the profiles folder. Raises Unfit when it is missing or damaged."""
    import yaml  # slow to import, and most verbs read one file or none

    path = profiles_directory() / relative
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise Unfit(f"cannot read the shipped file {path} ({reason}); install mps-advisor again") from None


def _directory(name: str) -> Path:
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
