"""The MPS daemon's life cycle, against a stand-in control program with real processes and sockets."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from stubs.nvidia_cuda_mps_control import CONTROL_NAME, attach, detach, install, set_faults

from advisor.core.errors import Unfit
from advisor.shell import mps
from advisor.shell.mps import Daemon, MpsQueryError

UUID = "GPU-00000000-1111-2222-3333-444444444444"
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """The waits before a signal and before a question is repeated, shortened: the stand-in needs neither."""
    monkeypatch.setattr(mps, "_SIGNAL_WAIT_S", 0.3)
    monkeypatch.setattr(mps, "_QUERY_PAUSE_S", 0.01)


@pytest.fixture
def short_directory():
    """Sockets need short paths, and pytest's own are long."""
    with tempfile.TemporaryDirectory(prefix="mps", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def control(short_directory):
    return install(short_directory / "bin")


@pytest.fixture
def start(short_directory, control):
    """Starts daemons with the given faults, and ends whatever a test leaves of them."""
    daemons = []

    def start_daemon(name="run", timeout_s=10.0, **faults):
        set_faults(control.parent, **faults)
        daemon = Daemon.start(short_directory / name, control, UUID, timeout_s)
        daemons.append(daemon)
        return daemon

    yield start_daemon
    for daemon in daemons:
        for pid in daemon.left():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def bystander():
    """A process that is nobody's business; also used as a client, since a client is only a pid to the daemon."""
    process = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def processes_of(directory):
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CUDA_MPS_PIPE_DIRECTORY", "").startswith(str(directory)):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_daemon_lists_the_clients_that_attached_and_leaves_nothing_after_quit(start, short_directory, bystander):
    daemon = start()
    assert (daemon.servers(), daemon.clients()) == ([], [])

    for pid in (bystander.pid, os.getpid()):
        assert attach(daemon.pipe_directory, pid)
    (server,) = daemon.servers()
    assert daemon.clients() == sorted([bystander.pid, os.getpid()])
    assert daemon.server_status(server) == "ACTIVE"
    assert psutil.Process(server).ppid() == daemon.pid
    assert daemon.left() == [daemon.pid, server]

    assert detach(daemon.pipe_directory, bystander.pid)
    assert daemon.clients() == [os.getpid()]
    assert detach(daemon.pipe_directory, os.getpid())

    steps = daemon.quit()
    assert len(steps) == 1
    assert steps[0].endswith(" s quit: the daemon ended")
    assert daemon.gone()
    assert daemon.left() == []
    assert processes_of(short_directory) == []


def test_the_daemon_is_identified_by_its_pid_and_start_time(start):
    began_s = time.time()
    daemon = start()
    assert daemon.pid is not None
    assert (daemon.pipe_directory / f"{CONTROL_NAME}.pid").read_text().strip() == str(daemon.pid)
    assert daemon.create_time == pytest.approx(began_s, abs=30)


def test_the_daemon_is_identified_by_its_environment_when_it_writes_no_pid_file(start):
    first, second = start("first"), start("second", no_pid_file=1)
    assert not (second.pipe_directory / f"{CONTROL_NAME}.pid").exists()
    environment = psutil.Process(second.pid).environ()
    assert environment["CUDA_MPS_PIPE_DIRECTORY"] == str(second.pipe_directory)
    assert second.pid != first.pid


def test_the_daemon_gets_a_built_environment_with_its_gpu(start, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "10")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/nvidia/lib64")
    environment = psutil.Process(start().pid).environ()
    assert set(environment) == {
        "PATH",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_MPS_PIPE_DIRECTORY",
        "CUDA_MPS_LOG_DIRECTORY",
    }
    assert environment["CUDA_VISIBLE_DEVICES"] == UUID


def test_only_the_owner_may_enter_the_directories(start):
    daemon = start()
    for directory in (daemon.pipe_directory, daemon.log_directory):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_client_environment_names_the_daemon_and_the_percentage(start):
    daemon = start()
    directories = {
        "CUDA_MPS_PIPE_DIRECTORY": str(daemon.pipe_directory),
        "CUDA_MPS_LOG_DIRECTORY": str(daemon.log_directory),
    }
    assert daemon.client_environment(None) == directories
    assert daemon.client_environment(42) == {**directories, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "42"}
    with pytest.raises(ValueError, match="1 to 100"):
        daemon.client_environment(0)


def test_a_client_that_is_not_attached_is_not_listed(start, bystander):
    daemon = start(hide_clients=1)
    assert attach(daemon.pipe_directory, bystander.pid)
    assert len(daemon.servers()) == 1
    assert daemon.clients() == []


def test_a_client_too_many_is_listed(start, bystander):
    daemon = start(ghost_client=4242)
    assert attach(daemon.pipe_directory, bystander.pid)
    assert daemon.clients() == sorted([4242, bystander.pid])


def test_a_client_that_died_is_no_longer_listed(start, bystander):
    daemon = start()
    assert attach(daemon.pipe_directory, bystander.pid)
    bystander.kill()  # not waited for: it stays behind as a zombie
    while psutil.Process(bystander.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert daemon.clients() == []


def test_queries_that_fail_now_and_then_are_asked_again(start, bystander):
    daemon = start(flaky=2)
    assert attach(daemon.pipe_directory, bystander.pid)
    assert [daemon.clients() for _ in range(3)] == [[bystander.pid]] * 3


def test_threads_may_ask_at_the_same_time(start, bystander):
    daemon = start()
    assert attach(daemon.pipe_directory, bystander.pid)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(daemon.clients())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[bystander.pid]] * 4


def test_an_answer_that_is_no_list_of_processes_is_an_error(start, bystander):
    daemon = start(garbled=1)
    assert attach(daemon.pipe_directory, bystander.pid)
    with pytest.raises(MpsQueryError, match=r"get_client_list.*process ids expected, got 'PID of client unknown"):
        daemon.clients()


def test_the_status_of_an_unknown_server_is_an_error(start):
    with pytest.raises(MpsQueryError, match="get_server_status 1'"):
        start().server_status(1)


def test_a_question_to_a_daemon_that_ended_is_an_error(start):
    daemon = start()
    daemon.quit()
    with pytest.raises(MpsQueryError, match="Cannot find MPS control daemon"):
        daemon.servers()


def test_quit_gives_up_waiting_for_a_live_client_and_says_so(start, bystander, monkeypatch):
    monkeypatch.setattr(mps, "_SIGNAL_WAIT_S", 10.0)
    daemon = start()
    assert attach(daemon.pipe_directory, bystander.pid)
    steps = daemon.quit(timeout_s=0.3, force_s=0)
    assert [step.partition(" s ")[2] for step in steps] == [
        "quit: the daemon did not end within 0.3 s",
        "quit -t 0: the daemon ended",
    ]
    assert daemon.gone()
    assert daemon.left() == []
    assert bystander.poll() is None


def test_a_daemon_that_refuses_to_quit_is_killed_and_no_other_process_is(start, bystander):
    other = start("other")
    daemon = start("refuses", refuse_quit=1, ghost_server=bystander.pid)
    attach(daemon.pipe_directory, os.getpid())
    server = next(pid for pid in daemon.servers() if pid != bystander.pid)

    steps = daemon.quit(timeout_s=0.2, force_s=0)

    assert steps[-1].endswith(f"SIGTERM to {daemon.pid}, {server}")
    assert daemon.gone()
    assert daemon.left() == []
    assert bystander.poll() is None
    assert other.servers() == []
    assert not other.gone()


def test_a_stopped_daemon_is_ended_with_sigkill(start):
    daemon = start()
    os.kill(daemon.pid, signal.SIGSTOP)
    steps = daemon.quit(timeout_s=0.2, force_s=0)
    assert steps[-1].endswith(f"SIGKILL to {daemon.pid}")
    assert daemon.gone()


def test_quitting_twice_finds_the_daemon_gone(start):
    daemon = start()
    daemon.quit()
    (step,) = daemon.quit()
    assert step.endswith("the daemon was gone already")


def test_servers_of_a_daemon_that_was_killed_are_ended(start):
    daemon = start()
    attach(daemon.pipe_directory, os.getpid())
    (server,) = daemon.servers()
    os.kill(server, signal.SIGSTOP)  # so that it cannot notice by itself
    os.kill(daemon.pid, signal.SIGKILL)
    while not daemon.gone():
        time.sleep(0.01)
    steps = daemon.quit()
    assert steps[0].endswith("the daemon was gone already")
    assert any(f"to {server}" in step for step in steps)
    assert daemon.left() == []


def test_an_ended_daemon_that_is_our_zombie_counts_as_gone_and_is_reaped(start):
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        daemon = start()
        assert psutil.Process(daemon.pid).ppid() == os.getpid()
        (step,) = daemon.quit()
        assert step.endswith("quit: the daemon ended")
        assert not psutil.pid_exists(daemon.pid)
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def test_a_second_daemon_in_one_directory_is_refused_and_the_first_goes_on(start):
    first = start()
    with pytest.raises(Unfit, match=r"answers in .* already"):
        start()
    assert first.servers() == []


def test_a_directory_with_a_dead_daemons_sockets_can_be_used_again(start):
    daemon = start()
    os.kill(daemon.pid, signal.SIGKILL)
    while not daemon.gone():
        time.sleep(0.01)
    assert (daemon.pipe_directory / "control").is_socket()
    assert start().servers() == []


def test_a_control_program_that_fails_is_reported_with_what_it_said(start, short_directory):
    with pytest.raises(Unfit, match=r"ended with code 1\. It said: 'An instance of this daemon is already running'"):
        start(refuse_start=1)
    assert processes_of(short_directory) == []


def test_a_daemon_that_never_answers_is_reported_and_ended(start, short_directory):
    with pytest.raises(Unfit, match=r"started no daemon that answers in 1 s"):
        start(timeout_s=1.0, mute=1)
    assert processes_of(short_directory) == []


def test_a_control_program_that_is_not_there_is_reported(short_directory):
    with pytest.raises(Unfit, match="cannot be run"):
        Daemon.start(short_directory / "run", short_directory / "absent", UUID)


def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made(short_directory, control):
    deep = short_directory / ("d" * 80)
    with pytest.raises(Unfit, match="bytes long, and a directory for MPS sockets may have 86"):
        Daemon.start(deep, control, UUID)
    assert not deep.exists()


def test_the_longest_path_that_is_accepted_works(start, short_directory):
    name = "d" * (86 - len(f"{short_directory}/") - len("/pipe"))
    assert start(name).servers() == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_refused(short_directory, control):
    closed = short_directory / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(Unfit, match="cannot be made"):
        Daemon.start(closed / "run", control, UUID)


def test_a_file_in_the_directorys_place_is_refused(short_directory, control):
    (short_directory / "run").write_text("")
    with pytest.raises(Unfit, match="cannot be made"):
        Daemon.start(short_directory / "run", control, UUID)


def test_no_daemon_answers_in_the_empty_directory(start, short_directory, control):
    daemon = start()
    environment = mps.without_mps_environment(short_directory)
    assert list(environment) == ["CUDA_MPS_PIPE_DIRECTORY"]
    empty = Path(environment["CUDA_MPS_PIPE_DIRECTORY"])
    assert list(empty.iterdir()) == []
    assert not mps.answers(empty, control)
    assert not attach(empty, os.getpid())
    assert mps.answers(daemon.pipe_directory, control)


def test_a_directory_for_engines_without_mps_that_holds_something_is_refused(short_directory):
    (short_directory / "empty").mkdir()
    (short_directory / "empty" / "control").write_text("")
    with pytest.raises(Unfit, match="must be empty"):
        mps.without_mps_environment(short_directory)


def test_whether_a_daemon_answers_is_not_guessed_without_a_control_program(short_directory):
    with pytest.raises(MpsQueryError, match="cannot be run"):
        mps.answers(short_directory, short_directory / "absent")


def test_a_running_daemon_is_found_with_its_owner_and_directory(start):
    daemon = start()
    attach(daemon.pipe_directory, os.getpid())
    (server,) = daemon.servers()
    found = {foreign.pid: foreign for foreign in mps.foreign_daemons()}
    assert found[daemon.pid].pipe_directory == daemon.pipe_directory
    assert found[daemon.pid].user == psutil.Process().username()
    assert f"CUDA_MPS_PIPE_DIRECTORY={daemon.pipe_directory} " in found[daemon.pid].remedy
    assert server not in found


def test_an_operators_prompt_is_no_daemon(control, short_directory, start):
    daemon = start()
    prompt = subprocess.Popen(
        [str(control)],
        stdin=subprocess.PIPE,
        env={"CUDA_MPS_PIPE_DIRECTORY": str(daemon.pipe_directory)},
    )
    try:
        assert prompt.pid not in [foreign.pid for foreign in mps.foreign_daemons()]
    finally:
        prompt.communicate()


def test_left_over_sockets_and_zombies_are_no_daemon(short_directory, monkeypatch, start):
    prctl = ctypes.CDLL(None).prctl
    monkeypatch.setattr(mps, "DEFAULT_PIPE_DIRECTORY", short_directory / "stray")
    (short_directory / "stray").mkdir()
    with socket.socket(socket.AF_UNIX) as stray:
        stray.bind(str(short_directory / "stray" / "control"))
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        daemon = start()
        os.kill(daemon.pid, signal.SIGKILL)
        while psutil.Process(daemon.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        found = mps.foreign_daemons()
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert daemon.pid not in [foreign.pid for foreign in found]
    assert short_directory / "stray" not in [foreign.pipe_directory for foreign in found]


def test_the_programs_are_looked_up_on_the_path(control, short_directory, monkeypatch):
    monkeypatch.setenv("PATH", str(control.parent))
    assert mps.binaries() == mps.Binaries(control, control.parent / "nvidia-cuda-mps-server")
    monkeypatch.setenv("PATH", str(short_directory))
    assert mps.binaries() == mps.Binaries(None, None)
