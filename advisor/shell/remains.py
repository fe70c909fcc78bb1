"""What a run has on this machine, on disk as it comes, so that the next one can clear away what a killed one left.

Nobody cleans up after SIGKILL. Engines are ended by the kernel with the process that started them; the MPS daemon,
an engine core that outlives its server and the scratch directory stay. So each run keeps a ledger beside the locks: who
it is, its scratch directory, and every process it had, by PID and start time. The next run on that GPU ends what is in
the ledger of a run that is dead, and nothing else: a PID whose start time is another one is somebody else's.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from advisor.core.errors import Unfit
from advisor.core.records import Record
from advisor.shell import mps
from advisor.shell.interrupts import stop, uninterrupted
from advisor.shell.lock import GpuLock, private_directory
from advisor.shell.patience import LEFT_DAEMON_QUIT_S, LEFT_PROCESS_END_S
from advisor.shell.processes import Known, end, tree, wait_gone
from advisor.shell.store import write

SCRATCH_PREFIX = "mpsa-"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")

Say = Callable[[str], None]


class _Book(Record, frozen=True):
    """One run. Start times are clock ticks since the machine's start: a clock that is set does not move them."""

    advisor: int
    started: int
    boot: str
    namespace: str
    scratch: str
    processes: dict[int, int]  # PID -> start time


class Ledger:
    """This run's. Made before the first process is, closed when nothing is left."""

    def __init__(self, uuid: str, scratch: Path) -> None:
        """Raises Unfit when it cannot be written: then nothing may be started."""
        me = os.getpid()
        self.path = _folder(uuid) / f"{_prefix(uuid)}{me}.run"
        self._book = _Book(
            advisor=me,
            started=started_ticks(me) or 0,
            boot=_boot(),
            namespace=_namespace(),
            scratch=str(scratch.absolute()),
            processes={},
        )
        private_directory(self.path.parent)
        self._write()

    def note(self, pids: Iterable[int]) -> None:
        """Write down processes of ours that are not yet known. Raises Unfit when that cannot be done."""
        fresh = {pid: ticks for pid in pids if pid not in self._book.processes and (ticks := started_ticks(pid))}
        if fresh:
            self._book = msgspec.structs.replace(self._book, processes=self._book.processes | fresh)
            self._write()

    def close(self) -> None:
        """Forget it, unless something of it is still there: then the next run tries again."""
        if not _alive(self._book):
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        try:
            write(self.path, msgspec.json.encode(self._book))
        except OSError as error:
            raise Unfit(f"{self.path} cannot be written ({error.strerror}); free some space, or set TMPDIR") from error


def clear(uuid: str, control: Path | None, say: Say) -> bool:
    """End what killed runs left on this GPU, and remove their scratch directories; whether there was anything.

    The caller holds the GPU's lock. Raises Unfit for what could not be ended, KeyboardInterrupt when somebody asked to
    stop meanwhile.
    """
    found = False
    with uninterrupted(say) as interrupted:
        for path, book in _dead(uuid):
            told = _clear(book, uuid, control)
            if left := _alive(book):
                pids = ", ".join(str(one.pid) for one in left)
                raise Unfit(
                    f"PID {pids}, left by a run that was killed (PID {book.advisor}), could not be ended: end it"
                )
            _remove(Path(book.scratch))
            path.unlink(missing_ok=True)
            if told:
                found = True
                say(f"a run that was killed (PID {book.advisor}) had left {' and '.join(told)}; that is cleared away")
    if interrupted.asked:
        stop()
    return found


def _clear(book: _Book, uuid: str, control: Path | None) -> list[str]:
    """Engines first, then daemons: a daemon is never quit around live clients. Returns what was there."""
    told = []
    scratch = Path(book.scratch)
    here = _is_ours(scratch)
    daemons = [] if control is None or not here else list(_daemons(scratch, control, uuid, book))
    of_mps = {pid for daemon in daemons for pid in daemon.left()}
    engines = [one for one in _alive(book) if one.pid not in of_mps]
    if engines:
        told.append(f"PID {', '.join(str(one.pid) for one in engines)}")
        # What they started since is theirs too.
        theirs = {one.pid: one for engine in engines for one in [*tree(engine.pid), engine]}
        end(list(theirs.values()), LEFT_PROCESS_END_S)
    for daemon in daemons:
        told.append(f"an MPS daemon{f' (PID {daemon.pid})' if daemon.pid else ''}")
        daemon.quit(LEFT_DAEMON_QUIT_S)
    # A daemon without a control program to ask, and servers whose daemon is gone.
    rest = _alive(book)
    if rest:
        told += [f"PID {', '.join(str(one.pid) for one in rest)}"] if not engines and not daemons else []
        end(rest, LEFT_PROCESS_END_S)
        wait_gone(rest, LEFT_PROCESS_END_S)
    if here and not told:
        told.append(str(scratch))
    return told


def _daemons(scratch: Path, control: Path, uuid: str, book: _Book) -> Iterator[mps.Daemon]:
    """Those that answer in a pipe directory of that run; each gets signals only if it is in the ledger itself."""
    for pipe in sorted(scratch.glob("*/pipe")):
        with suppress(mps.MpsQueryError):
            if mps.answers(pipe, control):
                yield mps.Daemon.found(pipe.parent, control, uuid, {one.pid for one in _alive(book)})


def _dead(uuid: str) -> Iterator[tuple[Path, _Book]]:
    """The ledgers of runs on this GPU that ended without closing theirs."""
    for path in sorted(_folder(uuid).glob(f"{_prefix(uuid)}*.run")):
        try:
            book = msgspec.json.decode(path.read_bytes(), type=_Book)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            continue  # nothing can be proved by it
        if book.boot != _boot():
            # Of before this machine's start, or of another machine that shares this directory?
            dead = path.stat().st_mtime < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        else:
            # In another PID namespace (a container) the same numbers mean other processes.
            dead = book.namespace == _namespace() and started_ticks(book.advisor) != book.started
        if dead:
            yield path, book


def _alive(book: _Book) -> list[Known]:
    """The processes of a ledger that still run, each proved by its start time."""
    if book.boot != _boot() or book.namespace != _namespace():
        return []
    found = []
    for pid, ticks in book.processes.items():
        if started_ticks(pid) == ticks:
            with suppress(psutil.Error):
                known = Known(psutil.Process(pid))
                # Once more, now that it is held on to: what is signalled is what was looked at.
                if started_ticks(pid) == ticks and known.alive:
                    found.append(known)
    return found


def started_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did (proc(5), field 22); None where it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])  # a zombie waits to be asked how it ended, and does nothing
    except (OSError, ValueError, IndexError):
        return None


def _remove(scratch: Path) -> None:
    if _is_ours(scratch):
        shutil.rmtree(scratch, ignore_errors=True)


def _is_ours(scratch: Path) -> bool:
    """Whether this is a scratch directory, and this user's. Nothing else is removed, whatever a ledger says."""
    try:
        told = scratch.lstat()
    except OSError:
        return False
    return (
        scratch.is_absolute()
        and scratch.name.startswith(SCRATCH_PREFIX)
        and scratch.is_dir()
        and not scratch.is_symlink()
        and told.st_uid == os.getuid()
    )


def _folder(uuid: str) -> Path:
    return GpuLock(uuid).path.parent


def _prefix(uuid: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', uuid)}."


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink(_NAMESPACE)  # noqa: PTH115 (it names no path)
    except OSError:
        return ""


def scratch_directory() -> Path:
    """A directory with a short path: sockets live in it, and their paths may hold 107 bytes.

    Raises Unfit where it would be too long for them, or cannot be made.
    """
    try:
        path = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
    except OSError as error:
        raise Unfit(
            f"no directory can be made in {tempfile.gettempdir()} ({error.strerror}); free some space, or set TMPDIR"
        ) from error
    try:
        mps.check_socket_path(path / "t12345678" / "pipe")
    except Unfit:
        path.rmdir()
        raise
    return path
