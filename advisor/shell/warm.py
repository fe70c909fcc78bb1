"""A process with vLLM in its memory, from which engines are forked. Importing it takes half of an engine's start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from advisor.shell.patience import KILLED_S
from advisor.shell.patience import WARM_CLOSE_S as CLOSE_TIMEOUT_S
from advisor.shell.patience import WARM_FORK_S as FORK_TIMEOUT_S
from advisor.shell.patience import WARM_READY_S as READY_TIMEOUT_S
from advisor.shell.processes import Child, pinned

_WORKER = Path(__file__).with_name("warm_worker.py")
# How vLLM makes its engine core from the API server. Its command line would start it anew, to import all again.
_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


class WarmGone(Exception):
    """The process that engines are forked from has ended, or does not answer any more."""


def python_of(command: Sequence[str]) -> list[str] | None:
    """The interpreter of a vLLM command, with its options; None where it is no Python program that can be forked.

    Known are `PYTHON -m MODULE`, `PYTHON SCRIPT` and a script whose first line names a Python.
    """
    match command:
        case [python, "-m", _] | [python, _] if _is_python(python):
            return [python]
        case [script] if path := shutil.which(script):
            with Path(path).open("rb") as file:
                first = file.readline(4096).decode(errors="replace")
            words = first[2:].split() if first.startswith("#!") else []
            return words if words and _is_python(words[0]) else None
    return None


def _is_python(program: str) -> bool:
    return Path(program).name.startswith("python")


class Warm:
    """Forks engines of one vLLM command. Whoever makes one has to `close` it.

    `spawn` starts a program as `processes.start_pinned` does, and may be used once `ready` has said so.
    """

    def __init__(
        self, command: Sequence[str], python: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self._command = list(command)
        # The interpreter runs already; a script is read from where the shell would have found it.
        self._program = list(command[1:]) if list(command[:1]) == list(python) else [str(shutil.which(command[0]))]
        self._codes: dict[int, int] = {}
        self._forked: dict[int, int] = {}  # PIDs by the number of the request
        self._asked = 0
        self._fit: bool | None = None
        self._ended = False
        self._news = threading.Condition()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                pinned([*python, str(_WORKER)], []),
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """What forked engines get beside the usual, unless the user has set it."""
        return {} if _METHOD in os.environ else {_METHOD: "fork"}

    def ready(self) -> bool:
        """Wait until all is imported; False when it cannot be forked from, or has ended."""
        with self._news:
            self._news.wait_for(lambda: self._fit is not None or self._ended, READY_TIMEOUT_S)
            return bool(self._fit) and not self._ended

    def spawn(self, argv: Sequence[str], cores: Sequence[int], environment: Mapping[str, str], log: Path) -> Child:
        """Fork an engine. Raises WarmGone."""
        if list(argv[: len(self._command)]) != self._command:
            raise ValueError(f"{argv[0]} is not the program that this process was made for")
        self._asked += 1
        request = {
            "number": self._asked,
            "argv": [*self._program, *argv[len(self._command) :]],
            "cores": list(cores),
            "environment": dict(environment),
            "log": str(log),
        }
        with self._news:
            try:
                self._requests.write(json.dumps(request).encode() + b"\n")
                self._requests.flush()
            except (OSError, ValueError):  # nobody reads it any more; it was closed here
                raise WarmGone("the process that engines are forked from has ended") from None
            self._news.wait_for(lambda: self._asked in self._forked or self._ended, FORK_TIMEOUT_S)
            pid = self._forked.get(self._asked)
        if pid is None:
            self._fit = False  # what it may still fork would be nobody's: it is to be closed
            raise WarmGone("the process that engines are forked from does not answer")
        return _Forked(self, pid)

    def close(self) -> None:
        """End it; engines that still run are ended with it. While it imports it is not asked to: it would not hear."""
        with suppress(OSError):
            self._requests.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S if self._fit is not None else 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(KILLED_S)
        self._listener.join(CLOSE_TIMEOUT_S)

    def code(self, pid: int) -> int | None:
        """How a forked engine ended; None while it runs."""
        with self._news:
            if pid in self._codes or not self._ended:
                return self._codes.get(pid)
        # Nobody is left to tell its code: it was ended with its parent.
        try:
            gone = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            gone = True
        return -signal.SIGTERM if gone else None

    def _listen(self, answers: IO[bytes]) -> None:
        for line in answers:
            found: dict[str, Any] = json.loads(line)
            with self._news:
                if "ready" in found:
                    self._fit = bool(found["ready"])
                elif "pid" in found:
                    self._forked[int(found["number"])] = int(found["pid"])
                    self._codes.pop(int(found["pid"]), None)  # of an earlier process with that number
                else:
                    self._codes[int(found["ended"])] = int(found["code"])
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()
        answers.close()


class _Forked:
    """A forked engine, with what `subprocess.Popen` would offer of it."""

    def __init__(self, warm: Warm, pid: int) -> None:
        self._warm = warm
        self.pid = pid

    def poll(self) -> int | None:
        return self._warm.code(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("vllm", timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, sig: int) -> None:
        with suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, sig)
