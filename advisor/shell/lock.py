"""One profile per GPU at a time: an advisory lock on a file named after the GPU's UUID."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from advisor.core.errors import Unfit


class GpuLock:
    """Holds a GPU from `with` to its end, or to this process's death, whichever comes first.

    The lock is the kernel's (flock), so a file that a dead process left is no obstacle. The file is never removed:
    two processes could then hold locks on two files of one name. Raises Unfit, naming the holder, when it is taken.
    """

    def __init__(self, uuid: str, directory: Path | None = None) -> None:
        """`directory` None: `mps-advisor-UID` in the system's directory for temporary files."""
        self._uuid = uuid
        self._directory = directory or Path(tempfile.gettempdir()) / f"mps-advisor-{os.getuid()}"
        self.path = self._directory / f"{re.sub(r'[^A-Za-z0-9._-]', '_', uuid)}.lock"
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        if self._descriptor is not None:
            raise RuntimeError("this lock is held already; make another one")
        private_directory(self._directory)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unfit(f"{self.path} cannot be opened ({error.strerror}); remove it, or set TMPDIR") from error
        try:
            self._take(descriptor)
            _write_holder(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.ftruncate(descriptor, 0)
                # Closing would leave the lock with a child that was forked meanwhile; unlocking frees it for all.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            finally:
                os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unfit(
                f"GPU {self._uuid} is being profiled by {_holder(descriptor)}; "
                "wait until that ends or stop it with Ctrl-C, or choose another GPU with --gpu"
            ) from None
        except OSError as error:
            raise Unfit(f"{self.path} cannot be locked ({error.strerror}); set TMPDIR to a local directory") from error


def private_directory(path: Path) -> None:
    """Make it, or make sure that it is a real directory of this user: others can write where it lies."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise Unfit(f"{path} must be a directory that you own; remove it, or set TMPDIR")
        path.chmod(0o700)
    except OSError as error:
        raise Unfit(f"{path} cannot be made ({error.strerror}); set TMPDIR to a directory you can write") from error


def _write_holder(descriptor: int) -> None:
    started = datetime.fromtimestamp(psutil.Process().create_time(), UTC)
    text = json.dumps({"pid": os.getpid(), "started": started.isoformat(timespec="seconds")})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    """Who wrote the file. It may be empty or torn in the moment between locking and writing."""
    try:
        written = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(written['pid'])}, started {written['started']}"
    except (ValueError, TypeError, KeyError):
        return "another process that has not written its pid yet"
