"""Writes the files of a deployment into a directory, whole or not at all, and never over anything else's."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from advisor.core.errors import BadQuestion, Unfit
from advisor.core.records import Record

MARKER = "deployment.json"
LOGS = "logs"  # what the scripts of a deployment write beside it
_MADE_BY = "mps-advisor deploy"


class Text(Record, frozen=True):
    """What one file holds."""

    text: str
    executable: bool


class Written(Record, frozen=True):
    """The marker: by it a directory is known as an earlier deployment. `files` are SHA-256 sums by name; `run` is what
    is there as long as the deployment runs on this machine, if that can be seen by a path.
    """

    made_by: str
    advisor: str
    target: str
    report: str
    run: str | None
    files: dict[str, str]


def write(out: Path, files: Mapping[str, Text], *, advisor: str, target: str, report: str, run: str | None) -> None:
    """Put `files` and a marker into `out`, which may be new, empty, or an earlier deployment that nobody changed.

    Raises BadQuestion when something else is in `out`, Unfit when an earlier deployment in it runs or it cannot be
    written.
    """
    _refuse(out)
    sums = {name: _sum(file.text.encode()) for name, file in sorted(files.items())}
    marker = Written(made_by=_MADE_BY, advisor=advisor, target=target, report=report, run=run, files=sums)
    out = out.resolve()  # a name like "." has no neighbour by itself
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        for name, file in files.items():
            path = temporary / name
            path.write_text(file.text, encoding="utf-8")
            path.chmod(0o755 if file.executable else 0o644)
        (temporary / MARKER).write_bytes(msgspec.json.format(msgspec.json.encode(marker), indent=2) + b"\n")
        if out.exists():
            if (out / LOGS).is_dir():
                (out / LOGS).rename(temporary / LOGS)
            out.rename(old)
        temporary.rename(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise Unfit(f"cannot write {out}: {error.strerror}; choose another --out") from error
    shutil.rmtree(old, ignore_errors=True)


def _refuse(out: Path) -> None:
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise BadQuestion(f"--out {out} is a file; a directory is expected")
        inside = {path.name for path in out.iterdir()}
    except OSError as error:
        raise Unfit(f"{out} cannot be read: {error.strerror}; choose another --out") from error
    if not inside:
        return
    try:
        earlier = msgspec.json.decode((out / MARKER).read_bytes(), type=Written)
    except (OSError, msgspec.DecodeError):
        earlier = None
    if earlier is None or earlier.made_by != _MADE_BY:
        raise BadQuestion(f"--out {out} holds files that are no deployment; give a new or an empty directory")
    if earlier.run is not None and Path(earlier.run).exists():
        raise Unfit(
            f"the deployment in {out} runs, or was not stopped ({earlier.run} is there); run {out}/stop.sh first"
        )
    theirs = sorted(inside - {*earlier.files, MARKER, LOGS})
    theirs += [name for name, known in earlier.files.items() if name in inside and _changed(out / name, known)]
    if theirs:
        raise BadQuestion(
            f"--out {out} holds what mps-advisor did not write or was changed since ({', '.join(theirs)}); move it "
            "away, or give another directory"
        )


def _changed(path: Path, known: str) -> bool:
    try:
        return _sum(path.read_bytes()) != known
    except OSError:
        return True


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
