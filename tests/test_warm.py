"""Programs that are forked instead of started: they find what started ones find, and end as they do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from sites import codes, live, wait_for

from advisor.shell import warm as warm_module
from advisor.shell.processes import child_environment, start_pinned
from advisor.shell.warm import Warm, WarmGone, python_of

TELL = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv[1:], "environment": dict(os.environ), "cores": sorted(os.sched_getaffinity(0)),
    "session": os.getsid(0) == os.getpid(), "folder": os.getcwd(), "stdin": sys.stdin.read(), "main": __name__,
    "handler": str(__import__("signal").getsignal(17)), "descriptors": len(os.listdir("/proc/self/fd")),
    "wakes": __import__("signal").set_wakeup_fd(-1),
    "threads": sys.modules["torch"].threads if "torch" in sys.modules else None,
}))
sys.stderr.write("and this\\n")
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A script that tells its surroundings, as an installed program."""
    return script(tmp_path, TELL)


def script(folder: Path, text: str) -> list[str]:
    program = folder / "program"
    program.write_text(f"#!{sys.executable} -IS\n{text}")
    program.chmod(0o755)
    return [str(program)]


@pytest.fixture
def warmed(tmp_path: Path) -> Iterator:
    made: list[Warm] = []

    def start(command: list[str], environment: dict[str, str] | None = None) -> Warm:
        python = python_of(command)
        assert python is not None
        told = child_environment(environment or {})
        made.append(Warm(command, python, told, tmp_path / "warm.log"))
        assert made[-1].ready()
        return made[-1]

    yield start
    for one in made:
        one.close()


def told(text: str) -> dict:
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))


def log_of(process, log: Path) -> str:
    assert process.wait(10.0) == 0, log.read_text()
    return log.read_text()


# ---------------------------------------------------------------- what it finds


def test_a_forked_program_finds_what_a_started_one_finds(command, warmed, tmp_path):
    environment = child_environment({"CUDA_MPS_PIPE_DIRECTORY": "/a place", "VLLM_PORT": "7"})
    found = []
    for start in (start_pinned, warmed(command, {"ONLY_THE_PARENT": "has this"}).spawn):
        log = tmp_path / "its.log"
        text = log_of(start([*command, "serve", "a model's folder", "--x"], [0], environment, log), log)
        assert "and this" in text.splitlines()
        found.append(told(text))
    started, forked = found

    for one in found:  # what the C library of each start adds
        one["environment"].pop("LC_CTYPE", None)
    assert forked == started  # with as many descriptors: an answer pipe that it kept would hide the end of its parent
    assert started["argv"] == ["serve", "a model's folder", "--x"]
    assert (started["cores"], started["session"], started["folder"], started["stdin"]) == ([0], True, "/", "")


def test_a_module_is_forked_as_python_would_run_it(warmed, tmp_path):
    (tmp_path / "packages" / "told").mkdir(parents=True)
    (tmp_path / "packages" / "told" / "__init__.py").touch()
    (tmp_path / "packages" / "told" / "main.py").write_text(TELL)
    command = [sys.executable, "-m", "told.main"]
    warm = warmed(command, {"PYTHONPATH": str(tmp_path / "packages")})
    log = tmp_path / "its.log"
    text = log_of(warm.spawn([*command, "serve"], [], child_environment({}), log), log)

    assert (told(text)["argv"], told(text)["main"]) == (["serve"], "__main__")


def test_a_forked_program_finds_modules_where_its_own_environment_says(warmed, tmp_path):
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "extension.py").write_text("FOUND = 'it was found'")
    command = script(tmp_path, "import extension; print(extension.FOUND)")
    log = tmp_path / "its.log"
    process = warmed(command).spawn(command, [], child_environment({"PYTHONPATH": str(tmp_path / "extra")}), log)
    assert "it was found" in log_of(process, log)


def test_a_forked_program_can_give_itself_a_title_as_vllm_does(warmed, tmp_path):
    program = tmp_path / "titled.py"
    program.write_text(
        "import setproctitle; from pathlib import Path\n"
        "setproctitle.setproctitle('VLLM::EngineCore')\n"
        "print(Path('/proc/self/comm').read_text().strip(), Path('/proc/self/cmdline').read_bytes().split(b'\\0')[0])\n"
    )
    command = [sys.executable, str(program)]
    log = tmp_path / "its.log"
    text = log_of(warmed(command).spawn(command, [], child_environment({}), log), log)
    assert text.strip() == "VLLM::EngineCor b'VLLM::EngineCore'"


def test_a_program_is_found_where_the_shell_would_find_it(warmed, tmp_path, monkeypatch):
    script(tmp_path, TELL)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    log = tmp_path / "its.log"
    text = log_of(warmed(["program"]).spawn(["program", "serve"], [], child_environment({}), log), log)
    assert told(text)["argv"] == ["serve"]


def test_what_goes_wrong_before_a_forked_program_begins_stands_in_its_log(warmed, tmp_path):
    command = script(tmp_path, TELL)
    log = tmp_path / "its.log"
    assert warmed(command).spawn(command, [9999], child_environment({}), log).wait(10.0) == 1
    assert "sched_setaffinity" in log.read_text()


def test_a_fork_that_comes_too_late_is_nobodys_and_does_not_live_on(warmed, tmp_path, monkeypatch):
    monkeypatch.setattr(warm_module, "FORK_TIMEOUT_S", 0.3)
    monkeypatch.setattr(warm_module, "CLOSE_TIMEOUT_S", 0.3)
    command = script(tmp_path, "import time\ntime.sleep(60)\n")
    warm = warmed(command)
    before = warm.spawn(command, [], child_environment({}), tmp_path / "before.log")
    worker = psutil.Process(warm._process.pid)
    worker.suspend()
    with pytest.raises(WarmGone, match="does not answer"):
        warm.spawn(command, [], child_environment({}), tmp_path / "late.log")
    assert not warm.ready() and before.poll() is None  # engines that run already are not to suffer
    worker.resume()
    wait_for(lambda: (tmp_path / "late.log").exists(), 5.0)
    warm.close()
    wait_for(lambda: not worker.is_running(), 5.0)
    wait_for(lambda: not [one for one in psutil.process_iter() if str(tmp_path) in " ".join(_words(one))], 5.0)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


def vllm_stand_in(folder: Path, text: str) -> list[str]:
    """A package with one of the modules that vLLM's command line imports, and a command that can be forked."""
    package = folder / "packages" / "vllm" / "v1" / "engine"
    package.mkdir(parents=True)
    for place in (package, package.parent, package.parent.parent):
        (place / "__init__.py").touch()
    (package / "core.py").write_text(text)
    (folder / "packages" / "told.py").write_text(TELL)
    return [sys.executable, "-m", "told"]


def test_what_vllm_changes_in_the_environment_when_it_is_imported_reaches_the_engines(warmed, tmp_path):
    text = "import os; os.environ['CHECKED_BY'] = 'NVML'; os.environ.pop('TO_GO', None)"
    command = vllm_stand_in(tmp_path, text)
    warm = warmed(command, {"PYTHONPATH": str(tmp_path / "packages"), "TO_GO": "yes"})
    log = tmp_path / "its.log"
    process = warm.spawn(command, [], child_environment({"TO_GO": "yes", "CHECKED_BY": "CUDA"}), log)

    found = told(log_of(process, log))["environment"]
    assert found["CHECKED_BY"] == "NVML" and "TO_GO" not in found


def test_a_forked_engine_has_as_many_threads_as_cores(warmed, tmp_path):
    command = vllm_stand_in(tmp_path, "import torch")
    (tmp_path / "packages" / "torch.py").write_text(
        "threads = 64\ndef set_num_threads(count):\n    global threads\n    threads = count\n"
    )
    warm = warmed(command, {"PYTHONPATH": str(tmp_path / "packages")})
    log = tmp_path / "its.log"
    assert told(log_of(warm.spawn(command, [0], child_environment({}), log), log))["threads"] == 1


SEVERAL_SERVERS = """
import os
import prometheus_client.values
from vllm.v1 import utils

def serve():
    print("with its memory" if hasattr(utils, "known") else "anew", prometheus_client.values.ValueClass, flush=True)

if __name__ == "__main__":
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = "/counts"
    utils.known = True
    server = utils.multiprocessing.get_context("spawn").Process(target=serve)
    server.start()
    server.join()
    print(utils.multiprocessing.current_process().name, server.exitcode)
"""
VALUES = """
import os
def get_value_class(): return "in files" if "PROMETHEUS_MULTIPROC_DIR" in os.environ else "in memory"
ValueClass = get_value_class()
"""


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"VLLM_WORKER_MULTIPROC_METHOD": "fork"}, "with its memory in files"),
        ({"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}, "anew in files"),
        ({}, "anew in files"),
    ],
)
def test_several_api_servers_are_made_as_vllm_makes_its_engine_core_and_count_together(
    warmed, tmp_path, environment, found
):
    command = vllm_stand_in(tmp_path, "import prometheus_client.values; import vllm.v1.utils")
    packages = tmp_path / "packages"
    (packages / "vllm" / "v1" / "utils.py").write_text("import multiprocessing")
    (packages / "prometheus_client").mkdir()
    (packages / "prometheus_client" / "__init__.py").touch()
    (packages / "prometheus_client" / "values.py").write_text(VALUES)
    (packages / "told.py").write_text(SEVERAL_SERVERS)
    warm = warmed(command, {"PYTHONPATH": str(packages)})
    log = tmp_path / "its.log"
    place = {"PYTHONPATH": str(packages), **environment}
    text = log_of(warm.spawn(command, [], child_environment(place), log), log)

    assert text.splitlines() == [found, "MainProcess 0"]


def test_a_process_whose_imports_left_a_thread_running_is_not_forked(tmp_path, monkeypatch):
    text = "import threading, time; threading.Thread(target=time.sleep, args=(30,), daemon=True).start()"
    command = vllm_stand_in(tmp_path, text)
    impatient = Path(warm_module._WORKER).read_text().replace("THREADS_END_S = 20.0", "THREADS_END_S = 0.2")
    (tmp_path / "worker.py").write_text(impatient)
    monkeypatch.setattr(warm_module, "_WORKER", tmp_path / "worker.py")
    environment = child_environment({"PYTHONPATH": str(tmp_path / "packages")})
    warm = Warm(command, [sys.executable], environment, tmp_path / "warm.log")

    assert warm.ready() is False
    warm.close()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="builds a stand-in for the driver's library")
@pytest.mark.parametrize(("answer", "fit"), [(3, True), (0, False)])
def test_a_process_in_which_cuda_is_initialised_is_not_forked(tmp_path, answer, fit):
    source = tmp_path / "cuda.c"
    source.write_text(f"int cuDeviceGetCount(int *count) {{ return {answer}; }}")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    environment = child_environment({"LD_LIBRARY_PATH": str(tmp_path)})
    warm = Warm(script(tmp_path, TELL), [sys.executable], environment, tmp_path / "warm.log")

    assert warm.ready() is fit
    warm.close()


def test_only_programs_whose_python_is_known_are_forked(tmp_path):
    shell = tmp_path / "vllm"
    shell.write_text("#!/bin/sh\nexec true\n")
    shell.chmod(0o755)

    assert python_of([str(shell)]) is None
    assert python_of(["/nowhere/vllm"]) is None
    assert python_of(["env", "vllm"]) is None
    assert python_of([sys.executable, "vllm"]) == [sys.executable]
    assert python_of([sys.executable, "-m", "vllm.entrypoints.cli.main"]) == [sys.executable]
    assert python_of(script(tmp_path, TELL)) == [sys.executable, "-IS"]


# ---------------------------------------------------------------- how it ends


def test_how_a_forked_program_ended_is_told_as_subprocess_tells_it(warmed, tmp_path):
    command = script(tmp_path, "import sys, time\nif sys.argv[1:]: sys.exit(int(sys.argv[1]))\ntime.sleep(60)\n")
    warm = warmed(command)
    log = tmp_path / "its.log"
    done, killed = warm.spawn([*command, "3"], [], {}, log), warm.spawn(command, [], {}, log)

    assert done.wait(10.0) == 3
    with pytest.raises(subprocess.TimeoutExpired):
        killed.wait(0.1)
    assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(10.0) == -signal.SIGKILL
    killed.send_signal(signal.SIGTERM)  # nothing is left that could be hit by it


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_forked_program_ends_with_the_process_it_came_from(warmed, tmp_path, how):
    command = script(tmp_path, "import time\ntime.sleep(60)\n")
    warm = warmed(command)
    process = warm.spawn(command, [], {}, tmp_path / "its.log")
    if how == "closed":
        warm.close()
    else:
        os.kill(warm._process.pid, signal.SIGKILL)

    wait_for(lambda: not psutil.pid_exists(process.pid), 5.0)
    assert process.wait(5.0) == -signal.SIGTERM
    with pytest.raises(WarmGone):
        warm.spawn(command, [], {}, tmp_path / "its.log")


# ---------------------------------------------------------------- in a profile


def test_all_engines_of_a_run_are_forked_and_the_record_says_so(site):
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(2))
        runner.run(site.spec(1, mps=False))
    first, second = folder.trials()

    assert (codes(first), codes(second)) == ([], [])
    assert [engine.forked for raw in (first, second) for engine in raw.engines] == [True] * 3


NOT_FORKED = {"die_at_start": "crash", "when": {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}}


def test_engines_that_come_up_only_when_started_are_started_from_then_on(site):
    site.bench.engine_faults({"all": NOT_FORKED})
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(1, mps=False))
        runner.run(msgspec.structs.replace(site.spec(1, mps=False), repeat=1))
        runner.run(site.spec(2, mps=False))
    first, again, other = folder.trials()

    assert (first.ended, [engine.forked for engine in first.engines]) == ("crash", [True])
    assert (again.ended, [engine.forked for engine in again.engines]) == ("completed", [False])
    assert (other.ended, [engine.forked for engine in other.engines]) == ("completed", [False, False])


def test_engines_that_do_not_come_up_either_way_leave_forking_as_it_was(site):
    runner, folder = live(site)
    with runner:
        for repeat in range(2):
            site.bench.engine_faults({"all": {"die_at_start": "crash"}})
            runner.run(msgspec.structs.replace(site.spec(1, mps=False), repeat=repeat))
        site.bench.engine_faults({})
        runner.run(site.spec(2, mps=False))
    first, again, other = folder.trials()

    assert [raw.ended for raw in (first, again, other)] == ["crash", "crash", "completed"]
    assert [raw.engines[0].forked for raw in (first, again, other)] == [True, False, True]


def test_a_run_goes_on_with_started_engines_when_what_they_are_forked_from_is_killed(site):
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(1, mps=False))
        assert runner._warm is not None
        os.kill(runner._warm._process.pid, signal.SIGKILL)
        runner.run(site.spec(2, mps=False))
        runner.run(site.spec(2))
    first, *later = folder.trials()

    assert first.engines[0].forked
    assert [(raw.ended, raw.engines[1].forked) for raw in later][-1] == ("completed", False)


def test_a_second_window_of_forked_engines_under_mps_knows_their_cores(site):
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(2))
        spec = site.spec(2)
        runner.run(msgspec.structs.replace(spec, workload=msgspec.structs.replace(spec.workload, concurrency=4)))
    first, second = folder.trials()
    assert (codes(first), codes(second)) == ([], [])
    assert {use.role for use in second.cpu if use.engine is not None} == {"api_server", "engine_core"}


def test_a_program_that_cannot_be_forked_is_started(site, tmp_path):
    wrapper = tmp_path / "vllm"
    wrapper.write_text(f'#!/bin/sh\nexec {" ".join(site.place.vllm_command)} "$@"\n')
    wrapper.chmod(0o755)
    site.place.vllm_command = [str(wrapper)]
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(1, mps=False))
    (raw,) = folder.trials()

    assert (codes(raw), [engine.forked for engine in raw.engines]) == ([], [False])


def test_what_the_user_says_of_vllms_processes_is_left_as_it_is(site, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    site.bench.engine_faults({"all": NOT_FORKED})
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(1, mps=False))
    (raw,) = folder.trials()

    assert (raw.ended, [engine.forked for engine in raw.engines]) == ("completed", [True])
