"""One profile per GPU, whatever became of the one before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from advisor.core.errors import Unfit
from advisor.shell.lock import GpuLock

UUID = "GPU-00000000-1111-2222-3333-444444444444"

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from advisor.shell.lock import GpuLock
with GpuLock(sys.argv[1], Path(sys.argv[2])):
    child = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "locks"


@pytest.fixture
def holder(directory):
    """Another process that holds the lock and has a child, as a profile has engines; and the child's pid."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, UUID, str(directory)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process, psutil.Process(child)
    psutil.Process(child).kill()
    process.kill()
    process.communicate()


def test_a_second_lock_on_one_gpu_names_the_holder_and_what_to_do(directory, holder):
    process, _ = holder
    with (
        pytest.raises(Unfit, match=rf"{UUID} is being profiled by process {process.pid}, started 20\d\d-.*; wait"),
        GpuLock(UUID, directory),
    ):
        pass


def test_a_lock_is_freed_when_its_holder_is_killed_though_its_children_live_on(directory, holder):
    process, child = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    with GpuLock(UUID, directory) as lock:
        assert child.is_running()
        assert f'"pid": {os.getpid()}' in lock.path.read_text()


def test_two_locks_of_one_process_exclude_each_other_too(directory):
    with GpuLock(UUID, directory):
        with pytest.raises(Unfit, match=f"process {os.getpid()},"), GpuLock(UUID, directory):
            pass
        # The refused one must not have freed or emptied the lock of the first.
        with pytest.raises(Unfit, match=f"process {os.getpid()},"), GpuLock(UUID, directory):
            pass


def test_a_lock_is_freed_on_leaving_even_by_an_error(directory):
    with pytest.raises(ZeroDivisionError), GpuLock(UUID, directory):
        raise ZeroDivisionError
    with GpuLock(UUID, directory) as lock:
        assert lock.path.exists()
    assert lock.path.read_text() == ""


def test_a_lock_is_freed_on_leaving_though_a_forked_child_lives_on(directory):
    readable, writable = os.pipe()
    lock = GpuLock(UUID, directory)
    with lock:
        child = os.fork()
        if child == 0:
            os.close(writable)
            os.read(readable, 1)
            os._exit(0)
    with GpuLock(UUID, directory):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.close(writable)
    os.waitpid(child, 0)
    os.close(readable)


def test_two_gpus_are_locked_independently(directory):
    with GpuLock(UUID, directory) as first, GpuLock("GPU-other", directory) as second:
        assert first.path != second.path


@pytest.mark.parametrize("left", ["", "not json", "[]", '{"pid": "x"}', '{"pid": 1, "started": "long ago"}'])
def test_a_stale_file_is_no_obstacle(directory, left):
    directory.mkdir()
    (directory / f"{UUID}.lock").write_text(left)
    with GpuLock(UUID, directory):
        pass


def test_a_holder_that_has_not_written_its_pid_is_still_a_holder(directory):
    with GpuLock(UUID, directory) as lock:
        lock.path.write_text("")
        with pytest.raises(Unfit, match="another process that has not written its pid yet"), GpuLock(UUID, directory):
            pass


def test_a_uuid_never_leaves_the_directory(directory):
    with GpuLock("MIG-GPU-1/../../0", directory) as lock:
        assert lock.path.parent == directory


def test_the_directory_is_private_and_by_default_in_the_temporary_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with GpuLock(UUID) as lock:
        assert lock.path == tmp_path / f"mps-advisor-{os.getuid()}" / f"{UUID}.lock"
        assert lock.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_link_planted_in_the_directorys_place_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unfit, match="must be a directory that you own"), GpuLock(UUID, tmp_path / "locks"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_link_planted_in_the_files_place_is_refused(tmp_path, directory):
    directory.mkdir()
    (tmp_path / "precious").write_text("kept")
    (directory / f"{UUID}.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(Unfit, match="cannot be opened"), GpuLock(UUID, directory):
        pass
    assert (tmp_path / "precious").read_text() == "kept"
