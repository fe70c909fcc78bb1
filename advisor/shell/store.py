"""Run folders: a manifest and one file per trial, append-only, each written under another name and renamed.

Only the last trial of a start of engines is written twice: how the engines ended is known after it was recorded.

    run/manifest.json
    run/trials/000-1-engine-no-mps.json.gz
    run/trials/001-…

Nothing here is an aggregate: everything a report says is computed from these files again.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from advisor.core import damage
from advisor.core.errors import DamagedRecord, Unfit
from advisor.core.records import SCHEMA_VERSION, Manifest, RawTrial, Record
from advisor.core.tried import key, slug

MANIFEST = "manifest.json"
TRIALS = "trials"
# A recorded trial is some hundred KB unpacked; anything far beyond that is not ours.
MAX_UNPACKED_BYTES = 64 << 20

R = TypeVar("R", bound=Record)


class _Versioned(msgspec.Struct):
    schema_version: int


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: under a temporary name, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()  # on a full disk half a file would only be in the way
        raise


class RunFolder:
    """One profile on disk. Files that end in `.tmp` were never finished and are ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def create(self, manifest: Manifest) -> None:
        """Start a run. Raises Unfit when the folder already holds one or cannot be written."""
        if self.exists:
            raise Unfit(f"{self.path} already holds a run; go on with it by --resume, or choose another --out")
        try:
            (self.path / TRIALS).mkdir(parents=True, exist_ok=True)
            write(self.path / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        except OSError as error:
            raise Unfit(f"cannot write to {self.path}: {error.strerror}; choose another --out") from error

    def manifest(self) -> Manifest:
        path = self.path / MANIFEST
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Unfit(
                f"{path} cannot be read: {error.strerror}; a run folder with a {MANIFEST} is expected"
            ) from error
        return _sound(_decode(data, Manifest, path), damage.of_manifest, path)

    def files(self) -> list[tuple[Path, RawTrial]]:
        """Every finished trial with its file, in the order in which they were run.

        Raises DamagedRecord, naming file and field, for one that cannot be true or is not what its name says.
        """
        found = []
        for path in sorted((self.path / TRIALS).glob("*.json.gz")):
            raw = _sound(_decode(_unpack(path), RawTrial, path), damage.of_trial, path)
            # What was asked stands in the name too: a changed `spec` would pass for another candidate.
            if path.name[4:] != f"{slug(raw.spec)}.json.gz":
                raise DamagedRecord(
                    f"{path} is damaged: its `$.spec` is of a trial “{slug(raw.spec)}”; give it its name, or restore it"
                )
            found.append((path, raw))
        return found

    def trials(self) -> list[RawTrial]:
        """Every finished trial, in the order in which they were run."""
        return [raw for _, raw in self.files()]

    def append(self, raw: RawTrial) -> Path:
        folder = self.path / TRIALS
        # One more than the last, not their count: somebody may have taken one away to have it measured again.
        number = max((int(path.name[:3]) for path in folder.glob("[0-9][0-9][0-9]-*.json.gz")), default=-1) + 1
        path = folder / f"{number:03d}-{slug(raw.spec)}.json.gz"
        _record(path, raw)
        return path

    def complete(self, path: Path, raw: RawTrial) -> None:
        """Write a trial that was appended once more, with what became known after it. The old file stays until then."""
        _record(path, raw)

    def recorded(self) -> dict[str, RawTrial]:
        """Finished trials by the identity of their spec. Raises DamagedRecord where two are the same trial."""
        return {name: raw for name, (_, raw) in self._by_identity().items()}

    def own(self) -> dict[str, RawTrial]:
        """As `recorded`, but raises DamagedRecord also for a trial that is not of this manifest's run."""
        manifest, found = self.manifest(), self._by_identity()
        for path, raw in found.values():
            for problem in damage.of_member(raw, manifest):
                raise DamagedRecord(f"{path} is not of this run: `$.{problem}`; take it away, or restore {MANIFEST}")
        return {name: raw for name, (_, raw) in found.items()}

    def _by_identity(self) -> dict[str, tuple[Path, RawTrial]]:
        found: dict[str, tuple[Path, RawTrial]] = {}
        for path, raw in self.files():
            first, _ = found.setdefault(key(raw.spec), (path, raw))
            if first != path:
                raise DamagedRecord(
                    f"{path} and {first.name} hold the same trial (`$.spec`), which a run does not do; "
                    "take the one away that is not of this run"
                )
        return found


def _record(path: Path, raw: RawTrial) -> None:
    try:
        # mtime=0: the same evidence is the same file, byte for byte.
        write(path, gzip.compress(msgspec.json.encode(raw), compresslevel=9, mtime=0))
    except OSError as error:
        raise Unfit(f"cannot record {path}: {error.strerror}; free some space and go on with --resume") from error


def _unpack(path: Path) -> bytes:
    try:
        packed = path.read_bytes()
        unpacker = zlib.decompressobj(wbits=31)
        data = unpacker.decompress(packed, MAX_UNPACKED_BYTES)
    except OSError as error:
        raise Unfit(f"{path} cannot be read: {error.strerror}") from error
    except zlib.error as error:
        raise DamagedRecord(
            f"{path} is damaged ({error}); restore it, or remove it and run again with --resume"
        ) from None
    if not unpacker.eof or unpacker.unused_data:
        raise DamagedRecord(f"{path} is cut short or too long; restore it, or remove it and run again with --resume")
    return data


def _sound(record: R, problems: Callable[[R], Iterator[str]], path: Path) -> R:
    """The record, if nothing is wrong with it."""
    for problem in problems(record):
        raise DamagedRecord(f"{path} is damaged: `$.{problem}`; restore it, or remove it and run again")
    return record


def _decode(data: bytes, kind: type[R], path: Path) -> R:
    """Decode one record. Raises Unfit for a newer version, DamagedRecord naming file and field otherwise."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).schema_version
        if version > SCHEMA_VERSION:
            raise Unfit(
                f"{path} has schema version {version}; this mps-advisor knows {SCHEMA_VERSION}: update mps-advisor"
            )
        if version < 1:
            raise DamagedRecord(f"{path} is damaged: schema_version is {version}, expected {SCHEMA_VERSION}")
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: {error}; restore it, or remove it and run again") from None
