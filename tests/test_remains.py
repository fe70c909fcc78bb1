"""A run that was killed: what it left is cleared away by the next one, and nothing else is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from conftest import Bench
from sites import wait_for

from advisor.core.errors import Unfit
from advisor.shell import mps, remains
from advisor.shell.remains import Ledger, clear, scratch_directory, started_ticks

UUID = "GPU-00000000-1111-2222-3333-444444444444"
SLEEP = [sys.executable, "-IS", "-c", "import time; time.sleep(60)"]
SMALL = ("--ctx", "64", "--osl", "16", "--concurrency", "8", "--thread-percentages", "none")

KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from advisor.shell.remains import Ledger, scratch_directory
scratch = scratch_directory()
ledger = Ledger(sys.argv[1], scratch)
child = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
ledger.note([child.pid])
print(child.pid, scratch, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(mps, "check_socket_path", lambda path: None)  # pytest's directories are long
    return folder


@pytest.fixture
def bystander():
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def killed(temporary: Path) -> tuple[psutil.Process, Path]:
    """What a run leaves that notes a child and is killed: the child, and its scratch directory."""
    code = f"from advisor.shell import mps\nmps.check_socket_path = lambda path: None\n{KILLED}"
    done = subprocess.run(
        [sys.executable, "-c", code, UUID],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    pid, _, scratch = done.stdout.strip().partition(" ")
    return psutil.Process(int(pid)), Path(scratch)


def only_ledger(temporary: Path) -> Path:
    (path,) = temporary.glob("mps-advisor-*/*.run")
    return path


def test_a_killed_runs_process_and_directory_are_cleared_away_and_told(temporary, bystander):
    child, scratch = killed(temporary)
    said: list[str] = []
    assert clear(UUID, None, said.append)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert not scratch.exists() and bystander.poll() is None
    assert len(said) == 1 and f"PID {child.pid}" in said[0] and "that is cleared away" in said[0]
    assert list(temporary.glob("mps-advisor-*/*.run")) == []
    assert not clear(UUID, None, said.append)


def test_a_process_that_got_a_noted_pid_later_is_left_alone(temporary, bystander):
    child, scratch = killed(temporary)
    path = only_ledger(temporary)
    book = msgspec.json.decode(path.read_bytes())
    # The child's own start time under the bystander's PID: as if that had been given to another process since.
    book["processes"] = {str(bystander.pid): (started_ticks(bystander.pid) or 0) - 1}
    path.write_bytes(msgspec.json.encode(book))
    try:
        assert clear(UUID, None, lambda text: None)  # the directory
        assert bystander.poll() is None and child.is_running()
        assert not scratch.exists()
    finally:
        child.kill()


@pytest.mark.parametrize("mine", ["advisor", "namespace"])
def test_what_belongs_to_a_run_that_lives_or_to_another_container_is_left_alone(temporary, mine):
    child, scratch = killed(temporary)
    path = only_ledger(temporary)
    book = msgspec.json.decode(path.read_bytes())
    if mine == "advisor":
        book |= {"advisor": os.getpid(), "started": started_ticks(os.getpid())}
    else:
        book |= {"namespace": "pid:[1]"}
    path.write_bytes(msgspec.json.encode(book))
    try:
        assert not clear(UUID, None, lambda text: None)
        assert child.is_running() and scratch.is_dir() and path.exists()
    finally:
        child.kill()


def test_after_a_restart_of_the_machine_no_process_is_taken_for_a_noted_one(temporary):
    child, scratch = killed(temporary)
    path = only_ledger(temporary)
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | {"boot": "another"}))
    try:
        # Written since this machine started, by one that started another time: another machine's.
        assert not clear(UUID, None, lambda text: None) and scratch.exists() and path.exists()
        os.utime(path, (1.0, 1.0))
        assert clear(UUID, None, lambda text: None)
        assert child.is_running() and not scratch.exists() and not path.exists()
    finally:
        child.kill()


def test_runs_on_another_gpu_are_not_looked_at(temporary):
    child, scratch = killed(temporary)
    try:
        assert not clear("GPU-other", None, lambda text: None)
        assert child.is_running() and scratch.is_dir()
    finally:
        child.kill()


@pytest.mark.parametrize("what", ["elsewhere", "link"])
def test_only_a_scratch_directory_is_ever_removed(temporary, tmp_path, what):
    child, _ = killed(temporary)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").write_text("")
    named = precious
    if what == "link":
        named = temporary / "mpsa-link"
        named.symlink_to(precious)
    path = only_ledger(temporary)
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | {"scratch": str(named)}))
    assert clear(UUID, None, lambda text: None)
    assert ((precious / "kept").exists() and not psutil.pid_exists(child.pid)) or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"advisor": 1}'])
def test_a_damaged_ledger_proves_nothing_and_is_no_obstacle(temporary, text):
    child, scratch = killed(temporary)
    only_ledger(temporary).write_text(text)
    try:
        assert not clear(UUID, None, lambda text: None)
        assert child.is_running() and scratch.is_dir()
    finally:
        child.kill()


def test_what_cannot_be_ended_is_an_error_and_stays_noted(temporary, monkeypatch):
    child, _ = killed(temporary)
    monkeypatch.setattr(remains, "end", lambda processes, timeout_s: [])
    monkeypatch.setattr(remains, "LEFT_PROCESS_END_S", 0.1)
    try:
        with pytest.raises(Unfit, match=rf"PID {child.pid}, left by a run that was killed .* could not be ended"):
            clear(UUID, None, lambda text: None)
        assert only_ledger(temporary)
    finally:
        child.kill()


def test_a_ledger_is_closed_only_when_nothing_of_it_is_left(temporary, bystander):
    ledger = Ledger(UUID, scratch_directory())
    ledger.note([bystander.pid, 2**22 - 1])
    ledger.close()
    assert ledger.path.exists()
    bystander.kill()
    bystander.wait()
    ledger.close()
    assert not ledger.path.exists()


def test_a_path_too_long_for_sockets_is_refused_before_anything_runs(tmp_path, monkeypatch):
    folder = tmp_path / ("l" * 90)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(Unfit, match=r"bytes long, .*TMPDIR=/tmp"):
        scratch_directory()
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------- the real command, killed


def kill_under_load(bench: Bench, *more: str) -> tuple[int, list[int]]:
    """SIGKILL to a profile in the middle of a trial under MPS: its PID, and the engine cores that it had."""
    process = bench.start("--model", str(bench.tiny), *SMALL, "--max-engines", "2", "--out", "run", *more)
    try:
        wait_for(lambda: any("2-engines-no-mps" in path.name for path in (bench.directory / "run").rglob("*.gz")), 60.0)
        wait_for(lambda: daemons(bench) and len(bench.gpu_processes()) == 2, 60.0)
        wait_for(lambda: any("load_worker" in line for line in bench.processes()), 60.0)
        cores = bench.gpu_processes()
    finally:
        process.kill()
        process.communicate(timeout=30)
    return process.pid, cores


def daemons(bench: Bench) -> list[str]:
    return [line for line in bench.processes() if "nvidia-cuda-mps-control" in line and " -d" in line]


def test_the_next_call_clears_up_after_a_profiler_that_was_killed_and_goes_on(bench):
    bench.engine_faults({"all": {"tokens_per_s": [1000, 550], "tokens_per_s_mps": [1000, 900]}})
    pid, _ = kill_under_load(bench)
    assert daemons(bench) and bench.scratch() and bench.ledgers()  # nobody was there to end them

    question = ("--model", str(bench.tiny), *SMALL, "--max-engines", "2")
    done = bench.run(*question, "--out", "run", "--resume", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if "that is cleared away" in line]
    assert f"a run that was killed (PID {pid}) had left " in told and "an MPS daemon (PID " in told
    assert (bench.processes(), bench.gpu_processes(), bench.scratch(), bench.ledgers()) == ([], [], [], [])


def test_an_engine_core_that_outlived_everything_is_found_by_the_next_call(bench):
    """As vLLM's does when its API server is killed as well: nothing else remembers it."""
    bench.engine_faults({"all": {"tokens_per_s": 1000, "core_survives": True, "ignore_sigterm": True}})
    _, cores = kill_under_load(bench)
    for core in cores:
        server = psutil.Process(core).parent()
        assert server is not None and server.pid > 1
        server.kill()
    assert sorted(bench.gpu_processes()) == sorted(cores)

    bench.engine_faults({"all": {"tokens_per_s": 1000}})
    done = bench.run("--model", str(bench.tiny), *SMALL, "--max-engines", "1", "--out", "again")
    assert done.returncode in (0, 4), done.stderr
    (told,) = [line for line in done.stderr.splitlines() if "that is cleared away" in line]
    assert all(str(core) in told for core in cores)
    assert (bench.processes(), bench.gpu_processes(), bench.scratch(), bench.ledgers()) == ([], [], [], [])


def test_a_second_profile_names_the_first_whatever_that_is_doing(bench):
    first = bench.start("--model", str(bench.tiny), *SMALL, "--max-engines", "1", "--out", "run")
    try:
        wait_for(bench.gpu_processes, 60.0)
        second = bench.run("--model", str(bench.tiny), *SMALL, "--max-engines", "1", "--out", "other")
        assert (second.returncode, second.stdout) == (3, "")
        (line,) = second.stderr.splitlines()
        assert f"GPU {bench.gpu_uuid} is being profiled by process {first.pid}, started 20" in line
        assert not (bench.directory / "other").exists()
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=30)
    assert first.returncode == 130
    assert (bench.processes(), bench.scratch(), bench.ledgers()) == ([], [], [])


def test_a_zombie_has_ended(bystander):
    assert started_ticks(bystander.pid)
    bystander.kill()
    wait_for(lambda: psutil.Process(bystander.pid).status() == psutil.STATUS_ZOMBIE, 10.0)
    assert started_ticks(bystander.pid) is None
