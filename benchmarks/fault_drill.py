"""Break a short profile on a GPU on purpose, and tell what the tool made of it and what it left on the machine.

    python benchmarks/fault_drill.py --model Qwen/Qwen2.5-0.5B --out DIR [--fault core,server,ctrl-c,killed] [--gpu N]

Each fault gets a profile of its own in DIR/FAULT, as a child process: up to two engines, short windows, no tuning, some
minutes. When two engines are under load under MPS, it strikes:

    core     SIGKILL to one of the engine cores
    server   SIGKILL to the MPS server
    ctrl-c   SIGINT to the profiler, and a second one a second later, while it cleans up
    killed   SIGKILL to the profiler; then the same call once more, with --resume, which has to clear up

It prints one JSON object a line: `before`, `strike`, for `killed` what is `left`, `end` (exit code, what was kept, the
last lines on stderr, the verdict) and `after`, with `as_before`: whether GPU processes, MPS daemons, GPU memory (within
300 MiB), scratch directories and ledgers are as they were. Exit code 0 if all are. Options that it does not know go to
`mps-advisor profile`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from advisor.core.errors import AdvisorError
from advisor.core.records import Protocol
from advisor.shell import mps
from advisor.shell.gpu import Nvml
from advisor.shell.store import RunFolder

FAULTS = ("core", "server", "ctrl-c", "killed")
MEMORY_SLACK_BYTES = 300 << 20
STRIKE_TIMEOUT_S = 420.0
END_TIMEOUT_S = 900.0
SETTLE_S = 20.0  # for the driver to forget what has just ended
_CORE_TITLE = "VLLM::EngineCor"
SHORT = Protocol(measure_turnovers=2.0, warmup_turnovers=1.0, measure_min_s=8.0, unsteady_log=0.5)


class Machine(NamedTuple):
    """What a fault must not change."""

    gpu_processes: list[int]
    daemons: list[int]
    memory_bytes: int | None
    scratch: list[str]
    ledgers: list[str]

    def same(self, other: Machine) -> bool:
        """Whether nothing was left or lost."""
        memory = self.memory_bytes, other.memory_bytes
        close = None in memory or abs((memory[0] or 0) - (memory[1] or 0)) <= MEMORY_SLACK_BYTES
        return self._replace(memory_bytes=None) == other._replace(memory_bytes=None) and close


def look(selector: str | None) -> Machine:
    """What is there now."""
    temporary = Path(tempfile.gettempdir())
    with Nvml() as nvml:
        uuid = nvml.find(selector).uuid
        processes, memory = sorted(nvml.compute_processes(uuid)), nvml.memory_used_bytes(uuid)
    return Machine(
        gpu_processes=processes,
        daemons=[one.pid for one in mps.foreign_daemons(uuid)],
        memory_bytes=memory,
        scratch=sorted(path.name for path in temporary.glob("mpsa-*")),
        ledgers=sorted(path.name for path in temporary.glob(f"mps-advisor-{os.getuid()}/*.run")),
    )


def look_until(as_before: Machine, selector: str | None) -> Machine:
    """What is there, once it is as before; at the latest after `SETTLE_S`."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        now = look(selector)
        if as_before.same(now) or time.monotonic() > deadline_s:
            return now
        time.sleep(0.2)


class Drill:
    """One fault: a profile, the strike, what became of it."""

    def __init__(self, fault: str, options: argparse.Namespace, more: list[str]) -> None:
        self.fault, self.selector = fault, options.gpu
        self.out = Path(options.out) / fault
        self.after_s = options.after_s
        command = shlex.split(options.command) if options.command else [sys.executable, __file__, "--child"]
        question = ["--model", options.model, "--ctx", str(options.ctx), "--concurrency", str(options.concurrency)]
        question += ["--max-engines", "2", "--thread-percentages", "none"]
        question += ["--gpu", options.gpu] if options.gpu else []
        self.command = [*command, "profile", *question, *more, "--out", str(self.out), "--format", "json"]

    def run(self) -> bool:
        """Whether the machine is as before afterwards."""
        before = look(self.selector)
        self._tell("before", **before._asdict())
        child, began_s = self._start("first"), time.monotonic()
        try:
            self._when_under_load(child)
            self._strike(child)
            self._end(child, "first", began_s)
            if self.fault == "killed":
                left = look(self.selector)
                self._tell("left", **left._asdict(), as_before=before.same(left))
                child, began_s = self._start("next", "--resume"), time.monotonic()
                self._end(child, "next", began_s)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(120.0)
        after = look_until(before, self.selector)
        self._tell("after", **after._asdict(), as_before=before.same(after))
        return before.same(after)

    def _start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self._log(name, "stdout").open("wb") as out, self._log(name, "stderr").open("wb") as err:
            return subprocess.Popen([*self.command, *more], stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    def _log(self, name: str, stream: str) -> Path:
        return self.out.with_name(f"{self.out.name}-{name}.{stream}")

    def _when_under_load(self, child: subprocess.Popen[bytes]) -> None:
        """Wait until two engines under MPS answer the load generators, and `after_s` more."""

        def ready() -> bool:
            words = [" ".join(_words(one)) for one in _tree(child.pid)]
            loaded = any("load_worker" in one for one in words)
            return loaded and len(self._cores(child)) == 2 and self._daemon() is not None

        _wait(ready, child, STRIKE_TIMEOUT_S, "two engines under MPS and load")
        time.sleep(self.after_s)

    def _strike(self, child: subprocess.Popen[bytes]) -> None:
        match self.fault:
            case "core":
                victim = self._cores(child)[0]
                os.kill(victim, signal.SIGKILL)
            case "server":
                (victim, *_) = self._servers()
                os.kill(victim, signal.SIGKILL)
            case "ctrl-c":
                victim = child.pid
                child.send_signal(signal.SIGINT)
                time.sleep(1.0)
                with suppress(ProcessLookupError):
                    child.send_signal(signal.SIGINT)
            case _:
                victim = child.pid
                child.kill()
        self._tell("strike", pid=victim)

    def _end(self, child: subprocess.Popen[bytes], name: str, began_s: float) -> None:
        try:
            code: int | None = child.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        said = self._log(name, "stderr").read_text(errors="replace").splitlines()
        try:
            verdict = json.loads(self._log(name, "stdout").read_bytes())["recommendation"]["sentence"]
        except (ValueError, KeyError):
            verdict = None
        try:
            kept: Any = [
                {"trial": path.name, "ended": raw.ended, "detail": raw.detail}
                for path, raw in RunFolder(self.out).files()
            ]
        except AdvisorError as error:
            kept = str(error)
        self._tell(
            "end",
            call=name,
            exit_code=code,
            seconds=round(time.monotonic() - began_s, 1),
            kept=kept,
            traceback=any("Traceback" in line for line in said),
            said=said[-12:],
            verdict=verdict,
        )

    def _cores(self, child: subprocess.Popen[bytes]) -> list[int]:
        """The engine cores: by their title, which a process may bear as its name or as a word of its command line."""
        return [one.pid for one in _tree(child.pid) if any(word.startswith(_CORE_TITLE) for word in _words(one))]

    def _daemon(self) -> mps.ForeignDaemon | None:
        scratch = str(Path(tempfile.gettempdir()) / "mpsa-")
        found = [one for one in mps.foreign_daemons() if str(one.pipe_directory).startswith(scratch)]
        return found[0] if found else None

    def _servers(self) -> list[int]:
        daemon, control = self._daemon(), mps.binaries().control
        if daemon is None or daemon.pipe_directory is None or control is None:
            raise RuntimeError("no MPS daemon of this run was found")
        return mps.Daemon.found(daemon.pipe_directory.parent, control, "", ()).servers()

    def _tell(self, at: str, **what: Any) -> None:  # noqa: ANN401 (JSON)
        print(json.dumps({"drill": self.fault, "at": at, **what}, ensure_ascii=False), flush=True)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _words(process: psutil.Process) -> list[str]:
    try:
        return [process.name(), *process.cmdline()]
    except psutil.Error:
        return []


def _wait(condition: Callable[[], bool], child: subprocess.Popen[bytes], limit_s: float, what: str) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if child.poll() is not None:
            raise RuntimeError(f"the profile ended (exit code {child.returncode}) before there were {what}")
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"there were no {what} within {limit_s:.0f} s")
        time.sleep(0.1)


def _child(words: list[str]) -> None:
    """`mps-advisor` itself, with a short protocol."""
    import advisor.profiling
    from advisor.cli import main as advise

    advisor.profiling.FULL = SHORT
    sys.argv = ["mps-advisor", *words]
    advise()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return _child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--fault", default=",".join(FAULTS), metavar="LIST")
    parser.add_argument("--gpu", metavar="INDEX|UUID")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--after-s", type=float, default=2.0, help="how long under load before the strike")
    parser.add_argument("--command", help="what to run in place of mps-advisor with short windows")
    options, more = parser.parse_known_args()
    faults = options.fault.split(",")
    if unknown := set(faults) - set(FAULTS):
        parser.error(f"--fault: {', '.join(sorted(unknown))} is none of {', '.join(FAULTS)}")
    clean = True
    for fault in faults:
        try:
            clean &= Drill(fault, options, more).run()
        except (RuntimeError, AdvisorError) as error:
            print(json.dumps({"drill": fault, "at": "failed", "why": str(error)}), flush=True)
            clean = False
    return sys.exit(0 if clean else 1)


if __name__ == "__main__":
    main()
