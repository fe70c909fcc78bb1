"""A stand-in for NVIDIA's MPS control program, with real processes and a real socket, and faults on request.

`install(bin_directory)` puts `nvidia-cuda-mps-control` and `nvidia-cuda-mps-server` there. Like the original: `-d` (or
`-f`, in the foreground) makes a daemon that lives in CUDA_MPS_PIPE_DIRECTORY, without arguments commands come from
standard input, a server process is started for the first client and stays, `quit` waits for clients and
`quit -t SECONDS` does not.

A stand-in for a CUDA process calls `attach(pipe_directory, pid)`; like CUDA it goes on when no daemon is there (False).

Faults are read when the daemon starts, from mps_stub_faults.json beside the installed programs (see `set_faults`) or
from the daemon's environment:

    MPS_STUB_REFUSE_QUIT=1    quit and quit -t are answered and ignored
    MPS_STUB_GHOST_CLIENT=PID always lists this client too
    MPS_STUB_HIDE_CLIENTS=1   lists no client
    MPS_STUB_GHOST_SERVER=PID always lists this server too
    MPS_STUB_FLAKY=N          every N-th query fails
    MPS_STUB_GARBLED=1        lists of clients are not numbers
    MPS_STUB_MUTE=1           accepts commands and never answers
    MPS_STUB_NO_PID_FILE=1    writes no pid file
    MPS_STUB_REFUSE_START=1   -d fails

Only the standard library, since the installed program runs without site-packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CONTROL_NAME = "nvidia-cuda-mps-control"
SERVER_NAME = "nvidia-cuda-mps-server"
FAULTS_NAME = "mps_stub_faults.json"
LIFETIME_S = 600.0
ANSWER_LIMIT_S = 60.0


def install(bin_directory: Path) -> Path:
    """Put both programs into a directory; the path of the control program. Put the directory on PATH to be found."""
    bin_directory.mkdir(parents=True, exist_ok=True)
    faults, here = bin_directory.absolute() / FAULTS_NAME, Path(__file__).absolute()
    for name, arguments in ((CONTROL_NAME, ["--faults", str(faults)]), (SERVER_NAME, ["--server"])):
        program = bin_directory / name
        # Imported, not run, so that its compiled form is kept: every question starts this program anew.
        program.write_text(
            f"#!{sys.executable} -IS\n"
            f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as stub; "
            f"sys.exit(stub.main([*{arguments!r}, *sys.argv[1:]]))\n"
        )
        program.chmod(0o755)
    return bin_directory / CONTROL_NAME


def set_faults(bin_directory: Path, **faults: int) -> None:
    """Faults of daemons that start from now on, by lower-case name without prefix: set_faults(bin, refuse_quit=1)."""
    named = {f"MPS_STUB_{name.upper()}": value for name, value in faults.items()}
    (bin_directory / FAULTS_NAME).write_text(json.dumps(named))


def attach(pipe_directory: Path | str, pid: int) -> int | None:
    """Become a client; the PID of the server, or None, and no error, when no daemon is there."""
    answer = _call(pipe_directory, f"attach {pid}")
    return None if answer is None else int(answer[1])


def detach(pipe_directory: Path | str, pid: int) -> bool:
    """Stop being a client. A client that dies is forgotten without this."""
    return _call(pipe_directory, f"detach {pid}") is not None


def _call(pipe_directory: Path | str, command: str) -> tuple[int, str] | None:
    """One command and its answer (exit code, text); None when no daemon is there."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_LIMIT_S)
        try:
            connection.connect(str(Path(pipe_directory) / "control"))
            connection.sendall(f"{command}\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except (FileNotFoundError, ConnectionError, NotADirectoryError):
            return None
    if not answer:
        return None
    code, _, text = answer.decode().partition("\n")
    return int(code), text


class _Daemon:
    def __init__(self, pipe_directory: Path, faults: dict[str, int]) -> None:
        self.faults = faults
        self.clients: list[int] = []
        self.server: subprocess.Popen[bytes] | None = None
        self.queries = 0
        self.quit_at_s: float | None = None  # when to end whatever the clients do
        self.quitting: list[socket.socket] = []
        self.pipe_directory = pipe_directory
        self.pid_file = pipe_directory / f"{CONTROL_NAME}.pid"
        path = pipe_directory / "control"
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(64)
        if not faults.get("MPS_STUB_NO_PID_FILE"):
            self.pid_file.write_text(f"{os.getpid()}\n")
        if faults.get("MPS_STUB_GHOST_CLIENT"):
            self.start_server()

    def serve(self) -> None:
        held = []  # connections that never get an answer
        ends_at_s = time.monotonic() + LIFETIME_S
        while time.monotonic() < ends_at_s:
            ready, _, _ = select.select([self.listener], [], [], 0.02 if self.quitting else 1.0)
            if ready:
                connection, _ = self.listener.accept()
                connection.settimeout(1.0)
                if self.faults.get("MPS_STUB_MUTE"):
                    held.append(connection)
                else:
                    self.handle(connection)
            if self.quitting and (not self.live_clients() or (self.quit_at_s or ends_at_s) <= time.monotonic()):
                break
        if self.server:
            self.server.terminate()
            self.server.wait(5)
        self.pid_file.unlink(missing_ok=True)
        for connection in self.quitting:
            with contextlib.suppress(OSError):  # who asked may have lost patience
                _reply(connection, 0, "")

    def handle(self, connection: socket.socket) -> None:
        try:
            words = connection.makefile("r").readline().split()
        except OSError:
            connection.close()
            return
        if words[:1] == ["quit"] and not self.faults.get("MPS_STUB_REFUSE_QUIT"):
            self.quitting.append(connection)
            if words[1:2] == ["-t"]:
                self.quit_at_s = time.monotonic() + float(words[2])
            return
        with contextlib.suppress(OSError):
            _reply(connection, *self.answer(words))

    def answer(self, words: list[str]) -> tuple[int, str]:
        if words[:1] == ["attach"]:
            self.start_server()
            self.clients.append(int(words[1]))
            return 0, str(self.server.pid)
        if words[:1] == ["detach"]:
            self.clients = [pid for pid in self.clients if pid != int(words[1])]
            return 0, ""
        if words[:1] == ["quit"]:
            return 0, ""
        self.queries += 1
        if self.server and self.server.poll() is not None:
            self.server, self.clients = None, []  # killed: its clients end by themselves, and the daemon goes on
        every = int(self.faults.get("MPS_STUB_FLAKY", 0))
        if every and self.queries % every == 0:
            return 1, "Failed to communicate with the daemon\n"
        server = str(self.server.pid) if self.server else None
        if words == ["get_server_list"]:
            ghost = self.faults.get("MPS_STUB_GHOST_SERVER")
            return 0, "".join(f"{pid}\n" for pid in (server, ghost) if pid)
        if words[:1] == ["get_client_list"] and words[1:] == [server]:
            if self.faults.get("MPS_STUB_GARBLED"):
                return 0, "PID of client unknown\n"
            return 0, "".join(f"{pid}\n" for pid in self.listed_clients())
        if words[:1] == ["terminate_client"] and words[1:2] == [server]:
            self.clients = [pid for pid in self.clients if pid != int(words[2])]
            return 0, ""
        if words[:1] == ["get_server_status"] and words[1:] == [server]:
            return 0, "ACTIVE\n"
        return 1, f"Unrecognized command: {' '.join(words)}\n"

    def listed_clients(self) -> list[int]:
        if self.faults.get("MPS_STUB_HIDE_CLIENTS"):
            return []
        ghost = int(self.faults.get("MPS_STUB_GHOST_CLIENT", 0))
        return [*self.live_clients(), *([ghost] if ghost else [])]

    def live_clients(self) -> list[int]:
        self.clients = [pid for pid in self.clients if _runs(pid)]
        return self.clients

    def start_server(self) -> None:
        if self.server is None or self.server.poll() is not None:
            self.server = subprocess.Popen([SERVER_NAME], stdin=subprocess.DEVNULL)


def _reply(connection: socket.socket, code: int, text: str) -> None:
    with connection:
        connection.sendall(f"{code}\n{text}".encode())


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def _become_daemon(pipe_directory: Path, log_directory: Path, faults: dict[str, int], *, background: bool) -> int:
    if faults.get("MPS_STUB_REFUSE_START") or _accepts(pipe_directory):
        sys.stderr.write("An instance of this daemon is already running\n")
        return 1
    if not background:
        _Daemon(pipe_directory, faults).serve()
        return 0
    readable, writable = os.pipe()
    if os.fork():
        os.close(writable)
        return 0 if os.read(readable, 1) else 1
    os.setsid()
    os.close(readable)
    with Path(os.devnull).open("rb") as nothing, (log_directory / "control.log").open("ab") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    daemon = _Daemon(pipe_directory, faults)
    sys.stdout.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}.000 Control {os.getpid():5d}] Start\n")
    sys.stdout.flush()
    os.write(writable, b"1")
    os.close(writable)
    daemon.serve()
    return 0


def _accepts(pipe_directory: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.connect(str(pipe_directory / "control"))
        return True
    return False


def _prompt(pipe_directory: Path) -> int:
    code = 0
    for line in sys.stdin:
        if line.strip():
            answer = _call(pipe_directory, line.strip())
            if answer is None:
                sys.stdout.write("Cannot find MPS control daemon process\n")
                return 1
            code = max(code, answer[0])
            sys.stdout.write(answer[1])
    return code


def _serve() -> int:
    """The server: a process that does nothing, until its daemon ends."""
    parent = os.getppid()
    ends_at_s = time.monotonic() + LIFETIME_S
    while os.getppid() == parent and time.monotonic() < ends_at_s:
        time.sleep(0.1)
    return 0


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if arguments[:1] == ["--server"]:
        return _serve()
    faults: dict[str, int] = {name: int(value) for name, value in os.environ.items() if name.startswith("MPS_STUB_")}
    if arguments[:1] == ["--faults"]:
        with contextlib.suppress(FileNotFoundError):
            faults |= json.loads(Path(arguments[1]).read_text())
        arguments = arguments[2:]
    pipe_directory = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if arguments[:1] in (["-d"], ["-f"]):
        log_directory = Path(os.environ.get("CUDA_MPS_LOG_DIRECTORY", "/var/log/nvidia-mps"))
        return _become_daemon(pipe_directory, log_directory, faults, background=arguments[0] == "-d")
    return _prompt(pipe_directory)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
