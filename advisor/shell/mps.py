"""The one door to the MPS daemon: is one there, start a private one, ask who is attached, end it.

NVIDIA's control program `nvidia-cuda-mps-control` is both: with `-d` it becomes the daemon, without arguments it
reads commands from standard input and passes them to the daemon in CUDA_MPS_PIPE_DIRECTORY. Commands and variables:
NVIDIA, "Multi-Process Service", chapter "Appendix: Tools and Interface Reference".
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from advisor.core.errors import Unfit
from advisor.shell.patience import MPS_FORCE_S, MPS_QUIT_S, MPS_START_S
from advisor.shell.patience import MPS_QUERY_S as _QUERY_LIMIT_S
from advisor.shell.patience import MPS_SIGNAL_S as _SIGNAL_WAIT_S

CONTROL_NAME = "nvidia-cuda-mps-control"
SERVER_NAME = "nvidia-cuda-mps-server"
DEFAULT_PIPE_DIRECTORY = Path("/tmp/nvidia-mps")  # NVIDIA's default; only ever looked at, to name a foreign daemon's

_TRUNCATED_NAME = CONTROL_NAME[:15]  # the kernel keeps 15 bytes of a name: daemon and server look alike there
_DAEMON_OPTION = re.compile(r"-[A-Za-z]*[df][A-Za-z]*")  # -d background, -f foreground; neither is an operator's prompt
_NO_DAEMON = "cannot find mps control daemon"

_SOCKET_PATH_MAX_BYTES = 107  # sun_path holds 108 with its closing NUL
_SOCKET_NAME_BYTES = 20  # the longest name in a pipe directory is control_privileged
_QUERY_TRIES = 4
_QUERY_PAUSE_S = 0.1
_POLL_S = 0.02

_Answer = TypeVar("_Answer")


class MpsQueryError(Unfit):
    """The daemon gave no usable answer: none in time, a failure, or text that does not parse."""


class _CannotAsk(MpsQueryError):
    """The control program did not end in time, or cannot be run: nothing is known about the daemon."""


@dataclass(frozen=True)
class Binaries:
    """The MPS programs found on PATH; None where there is none."""

    control: Path | None
    server: Path | None


@dataclass(frozen=True)
class ForeignDaemon:
    """An MPS control daemon that is running on this machine. `pipe_directory` None: it could not be found out."""

    pid: int
    user: str
    pipe_directory: Path | None

    @property
    def remedy(self) -> str:
        """The command with which its owner ends it."""
        where = f"CUDA_MPS_PIPE_DIRECTORY={self.pipe_directory} " if self.pipe_directory else ""
        return f"when nothing uses it any more, as {self.user}: echo quit | {where}{CONTROL_NAME}"


def binaries() -> Binaries:
    """Where the control and the server program are. Never raises."""
    control, server = shutil.which(CONTROL_NAME), shutil.which(SERVER_NAME)
    return Binaries(Path(control) if control else None, Path(server) if server else None)


def foreign_daemons(gpu_uuid: str | None = None) -> list[ForeignDaemon]:
    """Every MPS control daemon that runs now, by pid. Ask before starting one's own, which would be among them.

    Only processes count: a directory with left-over sockets is no daemon, and neither is a zombie. With `gpu_uuid`,
    daemons are left out that were started for other GPUs by UUID, as ours are.
    """
    default = DEFAULT_PIPE_DIRECTORY if DEFAULT_PIPE_DIRECTORY.is_dir() else None
    found = []
    for process in _control_daemons():
        with contextlib.suppress(psutil.Error):
            if gpu_uuid is not None and _serves_others(process, gpu_uuid):
                continue
            found.append(ForeignDaemon(process.pid, process.username(), _declared_pipe_directory(process) or default))
    return sorted(found, key=lambda daemon: daemon.pid)


def answers(pipe_directory: Path, control: Path) -> bool:
    """Whether a daemon answers in that directory.

    Raises MpsQueryError when this cannot be told because the control program hangs or cannot be run.
    """
    environment = _environment(control, pipe_directory, pipe_directory)
    for _ in range(_QUERY_TRIES):
        try:
            _pids(_ask(control, environment, "get_server_list", _QUERY_LIMIT_S))
        except _CannotAsk:
            raise
        except MpsQueryError as error:
            if _NO_DAEMON in str(error).lower():
                return False
            time.sleep(_QUERY_PAUSE_S)
        else:
            return True
    return False


def without_mps_environment(directory: Path) -> dict[str, str]:
    """Variables that keep a CUDA client from every daemon: its pipe directory is `directory/empty`, made here.

    Raises Unfit when that directory cannot be made or is not empty.
    """
    empty = _private_directory(directory.absolute() / "empty")
    if next(empty.iterdir(), None) is not None:
        raise Unfit(f"{empty} must be empty, so that engines without MPS reach no daemon; give another run directory")
    return {"CUDA_MPS_PIPE_DIRECTORY": str(empty)}


class Daemon:
    """A private MPS daemon for one GPU. Made by `Daemon.start`, ended by `quit`.

    Signals go to the recorded daemon and to servers that were seen to be its children, each compared by pid and
    start time. A daemon whose process could not be identified (`pid` None) is only ever asked to quit.
    """

    def __init__(self, control: Path, directory: Path, gpu_uuid: str) -> None:
        """Names a daemon without starting it; use `Daemon.start`."""
        self.pipe_directory = directory.absolute() / "pipe"
        self.log_directory = directory.absolute() / "log"
        self._control = control
        self._environment = _environment(control, self.pipe_directory, self.log_directory)
        self._gpu_uuid = gpu_uuid
        self._process: psutil.Process | None = None
        self._servers: dict[int, psutil.Process] = {}
        self._asking = threading.Lock()

    @classmethod
    def start(cls, directory: Path, control: Path, gpu_uuid: str, timeout_s: float = MPS_START_S) -> Daemon:
        """Start a daemon with its sockets in `directory/pipe` and its logs in `directory/log`; it answers on return.

        Raises Unfit when the path is too long for a socket, the directory cannot be written, a daemon answers there
        already, or the new one does not answer within `timeout_s`. Nothing is left running then.
        """
        daemon = cls(control, directory, gpu_uuid)
        check_socket_path(daemon.pipe_directory)
        _private_directory(daemon.pipe_directory)
        _private_directory(daemon.log_directory)
        if answers(daemon.pipe_directory, control):
            raise Unfit(f"an MPS daemon answers in {daemon.pipe_directory} already; end it or give another directory")
        try:
            daemon._launch(timeout_s)
        except BaseException:
            daemon._abandon()
            raise
        return daemon

    @classmethod
    def found(cls, directory: Path, control: Path, gpu_uuid: str, proven: Collection[int]) -> Daemon:
        """A daemon that runs already, in `directory/pipe`: one that an earlier process of ours started there.

        It gets signals only if its process is among the `proven`; else it is only asked to quit.
        """
        daemon = cls(control, directory, gpu_uuid)
        process = _find_daemon(daemon.pipe_directory)
        daemon._process = process if process is not None and process.pid in proven else None
        daemon._remember_children()
        return daemon

    @property
    def pid(self) -> int | None:
        """The daemon's process, None if it could not be identified."""
        return self._process.pid if self._process else None

    @property
    def create_time(self) -> float | None:
        """When the daemon's process started, in seconds since the epoch."""
        return self._process.create_time() if self._process else None

    def client_environment(self, percentage: int | None) -> dict[str, str]:
        """Variables that make a CUDA process a client of this daemon, with at most `percentage` of the SMs' threads."""
        environment = {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe_directory),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log_directory),
        }
        if percentage is not None:
            if not 1 <= percentage <= 100:
                raise ValueError(f"a thread percentage is 1 to 100, not {percentage}")
            environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(percentage)
        return environment

    def servers(self) -> list[int]:
        """Process ids of the daemon's servers; none before the first client. Raises MpsQueryError."""
        pids = self._query("get_server_list", _pids)
        for pid in pids:
            self._remember_server(pid)
        return sorted(pids)

    def clients(self) -> list[int]:
        """Process ids of all clients of all servers. Raises MpsQueryError."""
        found: set[int] = set()
        for server in self.servers():
            try:
                found.update(self._query(f"get_client_list {server}", _pids))
            except MpsQueryError:
                if server in self.servers():  # a server that ended between two questions has no clients
                    raise
        return sorted(found)

    def server_status(self, pid: int) -> str:
        """What the daemon says of a server: ACTIVE, INITIALIZING or FAULT. Raises MpsQueryError."""
        return self._query(f"get_server_status {pid}", _status)

    def gone(self) -> bool:
        """Whether the daemon has ended. Without a known process: whether nothing answers any more."""
        if self._process is not None:
            return not _alive(self._process)
        try:
            return not answers(self.pipe_directory, self._control)
        except MpsQueryError:
            return False

    def left(self) -> list[int]:
        """The recorded daemon and servers that still run; empty after a clean end."""
        return [process.pid for process in self._own_processes()]

    def quit(self, timeout_s: float = MPS_QUIT_S, force_s: int = MPS_FORCE_S) -> list[str]:
        """End the daemon and its servers; the steps taken, each with its time in seconds since the call.

        `quit` first, which waits for clients: `timeout_s` for that. Then `quit -t force_s`, which ends servers after
        `force_s`, clients or not. Then signals, to recorded processes only. Never raises for what the daemon does:
        `gone` and `left` say what became of it. End the clients before; a client loses its work otherwise.
        """
        steps = _Steps()
        self._remember_children()
        if self.gone():
            steps.add("the daemon was gone already")
        else:
            ended = self._tell("quit", timeout_s, steps)
            ended = ended or self._tell(f"quit -t {force_s}", force_s + _SIGNAL_WAIT_S, steps)
            if not ended and self._process is None:
                steps.add("the daemon's process is not known, so it gets no signal")
        if self.gone():
            # A server outlives its daemon for a moment at most; a signal would cut its own clean-up short.
            _wait(lambda: not self.left(), _SIGNAL_WAIT_S)
        self._signal(steps)
        return steps.lines

    def _launch(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        start_log = self.log_directory / "start.txt"
        # A file, not a pipe: the daemon may keep what it inherits, and a pipe would then never end.
        with start_log.open("wb") as sink:
            try:
                code = subprocess.run(
                    [str(self._control), "-d"],
                    env={**self._environment, "CUDA_VISIBLE_DEVICES": self._gpu_uuid},
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                    start_new_session=True,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                raise Unfit(self._start_failure(f"did not return within {timeout_s:g} s")) from None
            except OSError as error:
                raise Unfit(self._start_failure(f"cannot be run ({error.strerror})")) from error
        if code != 0:
            raise Unfit(self._start_failure(f"ended with code {code}"))
        while True:
            remaining_s = deadline_s - time.monotonic()
            try:
                self._query("get_server_list", _pids, tries=1, limit_s=max(0.1, min(remaining_s, _QUERY_LIMIT_S)))
                break
            except MpsQueryError as error:
                if remaining_s <= 0:
                    raise Unfit(self._start_failure(f"started no daemon that answers in {timeout_s:g} s")) from error
            time.sleep(_POLL_S)
        self._process = _find_daemon(self.pipe_directory)

    def _start_failure(self, what: str) -> str:
        last = ""
        for name in ("start.txt", "control.log"):
            with contextlib.suppress(OSError):
                text = (self.log_directory / name).read_text(encoding="utf-8", errors="replace").strip()
                last = last or text[text.rfind("\n") + 1 :]
        said = f" It said: {last!r}." if last else ""
        return f"{self._control} -d {what}.{said} See {self.log_directory}; run `mps-advisor doctor`"

    def _abandon(self) -> None:
        """End what a failed start may have left."""
        self._process = self._process or _find_daemon(self.pipe_directory)
        self._remember_children()
        if self._process is None:
            with contextlib.suppress(MpsQueryError):
                _ask(self._control, self._environment, "quit -t 1", _SIGNAL_WAIT_S)
        self._signal(_Steps())

    def _query(
        self,
        command: str,
        parse: Callable[[str], _Answer],
        tries: int = _QUERY_TRIES,
        limit_s: float = _QUERY_LIMIT_S,
    ) -> _Answer:
        """Ask one at a time and again on failure: the daemon fails now and then when two ask at once."""
        for attempt in range(1, tries + 1):
            try:
                with self._asking:
                    return parse(_ask(self._control, self._environment, command, limit_s))
            except MpsQueryError as error:
                if attempt == tries:
                    raise MpsQueryError(
                        f"the MPS daemon in {self.pipe_directory} gave no usable answer to {command!r} in {tries} "
                        f"tries: {error}; see control.log in {self.log_directory}"
                    ) from error
            time.sleep(_QUERY_PAUSE_S)
        raise ValueError("at least one try is needed")

    def _tell(self, command: str, limit_s: float, steps: _Steps) -> bool:
        """Send a quit command, repeated while it fails, and wait for the daemon's end: whether it ended in time."""
        deadline_s = time.monotonic() + limit_s
        for _ in range(_QUERY_TRIES):
            try:
                with self._asking:
                    _ask(self._control, self._environment, command, max(0.1, deadline_s - time.monotonic()))
                break
            except MpsQueryError:
                if time.monotonic() >= deadline_s or self.gone():
                    break
                time.sleep(_QUERY_PAUSE_S)
        ended = _wait(self.gone, deadline_s - time.monotonic())
        steps.add(f"{command}: the daemon {'ended' if ended else f'did not end within {limit_s:g} s'}")
        return ended

    def _signal(self, steps: _Steps) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            own = self._own_processes()
            if not own:
                return
            for process in own:
                # psutil compares the start time once more before it sends.
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            steps.add(f"{number.name} to {', '.join(str(process.pid) for process in own)}")
            _wait(lambda: not self.left(), _SIGNAL_WAIT_S)
        if self.left():
            steps.add(f"still there: {', '.join(str(pid) for pid in self.left())}")

    def _remember_server(self, pid: int) -> None:
        """Record a server as ours, only if it is a child of the recorded daemon."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if self._process is not None and process.ppid() == self._process.pid and _alive(self._process):
                self._servers.setdefault(pid, process)

    def _remember_children(self) -> None:
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                for child in self._process.children():
                    self._servers.setdefault(child.pid, child)

    def _own_processes(self) -> list[psutil.Process]:
        recorded = [*([self._process] if self._process else []), *self._servers.values()]
        return [process for process in recorded if _alive(process)]


class _Steps:
    """What was done, in order, each with its time in seconds since the first."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        self.lines.append(f"{time.monotonic() - self._began_s:.2f} s {text}")


def _environment(control: Path, pipe_directory: Path, log_directory: Path) -> dict[str, str]:
    """Everything the control program gets. Its own folder is on PATH, since the daemon finds the server there."""
    environment = {
        "PATH": os.pathsep.join([str(control.parent.absolute()), os.environ.get("PATH", os.defpath)]),
        "CUDA_MPS_PIPE_DIRECTORY": str(pipe_directory),
        "CUDA_MPS_LOG_DIRECTORY": str(log_directory),
    }
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _ask(control: Path, environment: dict[str, str], command: str, limit_s: float) -> str:
    """One command on the control program's standard input; what it answers. Raises MpsQueryError."""
    try:
        done = subprocess.run(
            [str(control)],
            input=f"{command}\n",
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit_s,
            start_new_session=True,  # a Ctrl-C on the terminal must not cut a question short
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _CannotAsk(f"no answer within {limit_s:.1f} s") from None
    except OSError as error:
        raise _CannotAsk(f"{control} cannot be run: {error.strerror}") from error
    said = f"{done.stdout}{done.stderr}".strip()
    if done.returncode != 0 or _NO_DAEMON in said.lower():
        raise MpsQueryError(f"code {done.returncode}, {said[:200]!r}")
    return done.stdout


def _pids(answer: str) -> list[int]:
    """One process id a line; an empty answer means none."""
    words = answer.split()
    if not all(word.isascii() and word.isdigit() for word in words):
        raise MpsQueryError(f"process ids expected, got {answer[:200]!r}")
    return [int(word) for word in words]


def _status(answer: str) -> str:
    status = answer.strip()
    if not re.fullmatch(r"[A-Z][A-Z_]*", status):
        raise MpsQueryError(f"one word in capitals expected, got {answer[:200]!r}")
    return status


def check_socket_path(pipe_directory: Path) -> None:
    """Raise Unfit for a path that is too long: the daemon itself would start, and then end without a word."""
    room = _SOCKET_PATH_MAX_BYTES - 1 - _SOCKET_NAME_BYTES
    length = len(os.fsencode(pipe_directory))
    if length > room:
        raise Unfit(
            f"{pipe_directory} is {length} bytes long, and a directory for MPS sockets may have {room}; "
            "give a shorter directory (TMPDIR=/tmp)"
        )


def _private_directory(path: Path) -> Path:
    """A directory that only its owner enters. Raises Unfit when it cannot be made or written."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise Unfit(f"{path} cannot be made ({error.strerror}); give a directory that you can write") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise Unfit(f"{path} cannot be written; give a directory that you can write")
    return path


def _control_daemons() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if _is_control_daemon(process):
                yield process


def _is_control_daemon(process: psutil.Process) -> bool:
    """By name and command line, since daemon, server and an operator's prompt share the name that the kernel keeps."""
    if not process.name().startswith(_TRUNCATED_NAME) or not _alive(process):
        return False
    words = process.cmdline()
    names = [Path(word).name for word in words]
    if CONTROL_NAME not in names:
        return False
    return any(_DAEMON_OPTION.fullmatch(word) for word in words[names.index(CONTROL_NAME) + 1 :])


def _serves_others(process: psutil.Process, gpu_uuid: str) -> bool:
    """Whether a daemon's environment names GPUs by UUID, and this one is not among them."""
    try:
        named = process.environ().get("CUDA_VISIBLE_DEVICES", "").split(",")
    except (psutil.Error, OSError):
        return False
    return all(name.startswith("GPU-") for name in named) and gpu_uuid not in named


def _declared_pipe_directory(process: psutil.Process) -> Path | None:
    """The pipe directory in a process's environment; None if it names none or may not be read."""
    try:
        declared = process.environ().get("CUDA_MPS_PIPE_DIRECTORY")
    except (psutil.Error, OSError):
        return None
    return Path(declared) if declared else None


def _find_daemon(pipe_directory: Path) -> psutil.Process | None:
    """The daemon of a pipe directory of ours: named in its pid file, or with that directory in its environment."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((pipe_directory / f"{CONTROL_NAME}.pid").read_text(encoding="ascii")))
        ours = process.uids().real == os.getuid() and _declared_pipe_directory(process) in (pipe_directory, None)
        if ours and _is_control_daemon(process):
            return process
    matching = [process for process in _control_daemons() if _declared_pipe_directory(process) == pipe_directory]
    # While it forks, parents of the daemon share its environment: the last one born is the daemon.
    with contextlib.suppress(psutil.Error):
        return max(matching, key=lambda process: (process.create_time(), process.pid), default=None)
    return None


def _alive(process: psutil.Process) -> bool:
    """Whether exactly this process runs: same pid, same start time, no zombie. A zombie child of ours is reaped."""
    try:
        if not process.is_running():
            return False
        if process.status() != psutil.STATUS_ZOMBIE:
            return True
    except psutil.NoSuchProcess:
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    return False


def _wait(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_POLL_S)
    return True
