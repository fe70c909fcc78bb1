"""The fault matrix (docs/faults.md), as far as no other test holds a row of it: real processes, stand-in programs."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from fcntl import ioctl
from pathlib import Path

import msgspec
import psutil
import pytest
from conftest import ROOT, Bench, make_bench
from sites import assert_nothing_left, codes, live, wait_for

from advisor import flow
from advisor.core import damage, tried
from advisor.core.errors import Unfit
from advisor.core.records import RawTrial
from advisor.shell import clock, engines, mps, store
from advisor.shell.replay import Replay
from advisor.shell.store import RunFolder

WORKLOAD = ("--ctx", "64", "--osl", "16", "--concurrency", "8")
SMALL = (*WORKLOAD, "--thread-percentages", "none", "--max-engines", "1")  # two trials


def assert_bench_is_clean(bench: Bench) -> None:
    assert (bench.processes(), bench.gpu_processes(), bench.scratch(), bench.ledgers()) == ([], [], [], [])


def at(word: str, do: Callable[[], object]) -> Callable[[str], None]:
    """What says `word` for the first time does this, once."""
    done: list[object] = []

    def say(text: str) -> None:
        if word in text and not done:
            done.append(do())

    return say


# ---------------------------------------------------------------- while running: MPS


def test_an_mps_server_that_is_killed_is_a_crash_that_names_mps_and_leaves_nothing(site):
    def kill() -> None:
        (server,) = [one for one in psutil.process_iter() if is_server(site.bench, one)]
        server.kill()

    raw = site.run(2, say=at("measuring", kill))
    assert raw.ended == "crash"
    assert "remote procedural call between the MPS server and the MPS client failed" in raw.detail
    assert_nothing_left(raw)


def is_server(bench: Bench, process: psutil.Process) -> bool:
    try:
        return str(bench.programs / "nvidia-cuda-mps-server") in process.cmdline()
    except psutil.Error:
        return False


def test_a_daemon_that_is_killed_is_a_crash_and_its_server_and_clients_are_ended(site):
    def kill() -> None:
        (daemon,) = mps.foreign_daemons(site.place.gpu_uuid)
        os.kill(daemon.pid, signal.SIGKILL)

    raw = site.run(2, say=at("measuring", kill))
    assert raw.ended == "crash"
    assert_nothing_left(raw)
    assert any("the daemon was gone already" in step for step in raw.teardown.steps)


def test_a_clients_illegal_access_is_a_crash_with_the_cause_and_the_other_engine_is_ended(site):
    site.bench.engine_faults({"all": {"tokens_per_s": 1000}, "1": {"tokens_per_s": 1000, "core_faults_after_s": 1.0}})
    raw = site.run(2)
    assert (raw.ended, tried.judge(raw).outcome) == ("crash", "crash")
    assert "engine 1 died" in raw.detail and "an illegal memory access was encountered" in raw.detail
    assert raw.engines[0].died_s is None
    assert_nothing_left(raw)


# ---------------------------------------------------------------- while running: the GPU


def test_a_gpu_that_falls_off_ends_the_run_with_its_name_and_leaves_nothing_but_what_was_measured(site):
    runner, folder = live(site)
    lose = at("measuring", lambda: site.bench.gpu(error=15))
    with pytest.raises(Unfit, match=r"NVML failed in .*: GPU is lost; see what nvidia-smi says"), runner:
        first = runner.run(site.spec(1, mps=False))
        runner._say = lose
        runner.run(site.spec(2))
    site.bench.gpu(error=0)
    state = json.loads((site.bench.directory / "nvml.json").read_text())
    del state["error"]
    (site.bench.directory / "nvml.json").write_text(json.dumps(state))
    (kept,) = folder.trials()
    assert (kept.spec, kept.teardown.left_pids) == (first.spec, [])


def test_a_gpu_that_falls_off_between_two_windows_leaves_the_end_of_the_first_on_record(site):
    runner, folder = live(site)
    with pytest.raises(Unfit, match="GPU is lost"), runner:
        runner.run(site.spec(1, mps=False))
        site.bench.gpu(error=15)
        workload = msgspec.structs.replace(site.place.manifest.question.workload, concurrency=4)
        runner.run(msgspec.structs.replace(site.spec(1, mps=False), workload=workload))
    state = json.loads((site.bench.directory / "nvml.json").read_text())
    del state["error"]
    (site.bench.directory / "nvml.json").write_text(json.dumps(state))
    (kept,) = folder.trials()
    assert (kept.ended, kept.teardown.left_pids, kept.teardown.memory_after_bytes) == ("completed", [], None)


def test_throttled_clocks_are_told_and_the_trial_counts(site):
    site.bench.gpu(throttle=0x40)
    judged = tried.judge(site.run(1, mps=False))
    assert judged.ok
    (told,) = [caution for caution in judged.cautions if caution.code == "throttled"]
    assert "hardware thermal slowdown" in told.text


def test_nonsense_from_the_driver_makes_a_trial_that_may_be_tried_again_and_a_run_that_can_be_read(site):
    site.bench.gpu(gpm_values=[95.0, 1e9, 20.0, 10.0, 30.0])
    runner, folder = live(site)
    with runner:
        raw = runner.run(site.spec(1, mps=False))
    assert (raw.ended, tried.judge(raw).outcome) == ("refused", "invalid")
    assert "gpu.sm_active_pct[0] is 1e+09, beyond anything that can be measured" in raw.detail
    # How its engines ended was put on record afterwards.
    (kept,) = folder.trials()
    assert (kept.detail, kept.teardown.left_pids) == (raw.detail, [])


# ---------------------------------------------------------------- while running: clocks and signals


def test_a_clock_that_is_set_back_in_mid_run_changes_no_measurement(site, monkeypatch):
    class Set(datetime):
        back = timedelta(0)

        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - cls.back

    monkeypatch.setattr(clock, "datetime", Set)
    runner, folder = live(site)
    with runner:
        for engines_, back in ((1, 0), (2, 7200)):
            runner._say = at("measuring", lambda back=back: setattr(Set, "back", timedelta(seconds=back)))
            raw = runner.run(site.spec(engines_, mps=False))
            assert (raw.ended, codes(raw), list(damage.of_trial(raw))) == ("completed", [], [])
    first, second = folder.trials()
    assert second.created > first.created  # it was set back after the second one began
    assert second.window[1] > second.window[0] and Replay(folder).run(first.spec) == first


def test_a_terminal_that_is_closed_ends_a_run_as_ctrl_c_does(bench):
    master, slave = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        bench.arguments("--model", str(bench.tiny), *SMALL, "--out", "run"),
        env=bench.environment | {"TERM": "xterm"},
        cwd=bench.directory,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=own_terminal,
    )
    os.close(slave)
    os.set_blocking(master, False)
    try:
        deadline_s = time.monotonic() + 30
        while not under_mps(bench):  # somebody has to read what it says
            assert time.monotonic() < deadline_s and process.poll() is None
            read(master)
            time.sleep(0.05)
        os.close(master)
        assert process.wait(30) in (130, 120)  # 120: Python could not flush what it had to say
    finally:
        process.kill()
        process.wait()
    assert_bench_is_clean(bench)
    assert (bench.directory / "run" / "manifest.json").exists()


def under_mps(bench: Bench) -> bool:
    """Whether an engine runs, and a daemon that nobody else would end."""
    return bool(bench.gpu_processes()) and any("nvidia-cuda-mps-control -d" in line for line in bench.processes())


def read(master: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(master, 65536)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_reader_of_progress_that_is_gone_does_not_stop_the_cleaning_up(bench, number):
    bench.environment["ADVISE_TALKATIVE"] = "1"
    process = bench.start("--model", str(bench.tiny), *SMALL, "--out", "run")
    try:
        deadline_s = time.monotonic() + 30
        while not under_mps(bench):
            assert time.monotonic() < deadline_s and process.poll() is None
            time.sleep(0.05)
        process.stderr.close()
        process.send_signal(number)
        process.send_signal(number)  # twice: the second is answered with a word that nobody hears
        process.stdout.read()
        assert process.wait(30) in (130, 120)  # 120: Python could not flush what it had to say
    finally:
        process.kill()
        process.wait()
    assert_bench_is_clean(bench)


def test_ctrl_c_as_often_as_one_likes_is_one_interrupt(bench):
    """Also in the moments between the parts of the cleaning up, and in the process's last ones."""
    process = bench.start("--model", str(bench.tiny), *SMALL, "--out", "run")
    try:
        wait_for(lambda: under_mps(bench), 30.0)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "mps-advisor: interrupted; what was measured is kept, go on with --resume"
    assert_bench_is_clean(bench)


# ---------------------------------------------------------------- start


def test_a_port_that_was_taken_after_all_is_a_crash_that_says_so_and_the_next_start_takes_others(site, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(engines, "port_blocks", lambda count: [taken.getsockname()[1]])
        raw = site.run(1, mps=False)
    assert raw.ended == "crash" and "address already in use" in raw.detail.lower()
    assert tried.judge(raw).outcome == "crash"  # an accident: it is tried once more
    assert_nothing_left(raw)


def test_no_room_in_shared_memory_is_a_crash_that_quotes_it(site):
    site.bench.engine_faults({"all": {"die_at_start": "shm"}})
    raw = site.run(1, mps=False)
    assert raw.ended == "crash" and "No space left on device: '/psm_" in raw.detail
    assert_nothing_left(raw)


def test_out_of_memory_at_the_third_engine_leaves_a_verdict_about_two(bench):
    bench.engine_faults({
        "all": {"tokens_per_s": [1000, 550], "tokens_per_s_mps": [1000, 900]},
        "2": {"die_at_start": "oom"},
    })  # fmt: skip
    done = bench.run("--model", str(bench.tiny), *WORKLOAD, "--thread-percentages", "none", "--max-engines", "4",
                     "--out", "run", "--format", "json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["recommendation"]["engines"], report["recommendation"]["mps"]) == (2, True)
    third = next(one for one in report["candidates"] if one["engines"] == 3)
    assert (third["outcome"], third["throughput_tok_per_s"]) == ("oom", None)
    assert "engine 2 ran out of GPU memory" in third["why_not"]
    assert_bench_is_clean(bench)


def test_a_temporary_directory_that_is_too_deep_for_sockets_is_refused_before_anything_is_written(bench):
    deep = bench.temporary / ("d" * 80)
    deep.mkdir()
    elsewhere = bench.environment | {"TMPDIR": str(deep)}
    done = bench.run("--model", str(bench.tiny), *SMALL, "--out", "run", environment=elsewhere)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert "bytes long, and a directory for MPS sockets may have 86" in line and "TMPDIR=/tmp" in line
    assert not (bench.directory / "run").exists()
    assert [path.name for path in deep.iterdir() if not path.name.startswith("mps-advisor-")] == []
    shutil.rmtree(deep)


def test_a_place_that_cannot_be_written_is_one_line(bench):
    done = bench.run("--model", str(bench.tiny), *SMALL, "--out", "/proc/run")
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr and "cannot write to /proc/run" in done.stderr.splitlines()[-1]
    assert_bench_is_clean(bench)


NOBODY = 65534


def nobody_can_run_this() -> bool:
    """Whether this test can become a user to whom this Python, and this program, are readable."""
    if os.getuid() != 0:
        return False  # then all tests are run by a user who is not root
    try:
        subprocess.run([sys.executable, "-c", "import advisor.cli"], cwd=ROOT, user=NOBODY, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


@pytest.fixture
def open_bench() -> Iterator[Bench]:
    """Where another user may go: pytest's own directories are for this one alone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        with make_bench(Path(folder)) as bench:
            yield bench


def test_a_user_who_is_not_root_gets_a_verdict_and_leaves_nothing(open_bench):
    if not nobody_can_run_this():
        pytest.skip("needs root, and a Python that others may run")
    bench, nobody = open_bench, NOBODY
    others = bench.environment | {"HOME": str(bench.directory), "PYTHONDONTWRITEBYTECODE": "1"}
    _ = bench.tiny
    for path in (bench.directory, bench.temporary, *bench.directory.rglob("*")):
        os.chown(path, nobody, nobody)
    asked = bench.arguments("--model", str(bench.tiny), *SMALL, "--out", "run", "--format", "json")
    done = subprocess.run(
        asked, env=others, cwd=bench.directory, user=nobody, group=nobody, extra_groups=[], capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip
    if "an MPS daemon of root already runs" in done.stderr:
        pytest.skip("a daemon of root is here, of another test perhaps, and may not be looked into")
    assert done.returncode in (0, 4), done.stderr
    assert {one["outcome"] for one in json.loads(done.stdout)["candidates"]} <= {"ok", "skipped"}
    assert_bench_is_clean(bench)


def test_a_full_disk_is_one_error_that_keeps_what_there_is_and_the_run_goes_on_later(site, monkeypatch):
    runner, folder = live(site)
    full = []

    def sync(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", sync)
    with (
        pytest.raises(Unfit, match=r"cannot record .*: No space left on device; free some"),
        runner,
    ):
        runner.run(site.spec(1, mps=False))
        full.append(True)
        runner.run(site.spec(2, mps=False))
    # The first trial is there, though without its end; nothing half-written lies beside it.
    (kept,) = folder.trials()
    assert kept.ended == "completed"
    assert [path.name for path in (folder.path / "trials").iterdir()] == ["000-1-engine-no-mps.json.gz"]
    full.clear()
    site.renew()
    again, _ = live(site)
    with again:
        again.run(site.spec(2, mps=False))
    assert len(folder.trials()) == 2


def test_a_disk_that_is_full_elsewhere_is_one_line_and_no_traceback(bench):
    """The scratch directory's: engines' logs, sockets and stand-in weights lie there."""
    broken = "import advisor.shell.hub as hub, errno\n"
    broken += "def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device', '/scratch/model')\n"
    broken += "hub.prepare_folder = full\n"
    (bench.directory / "modules" / "sitecustomize.py").write_text(broken)
    done = bench.run("--model", str(bench.tiny), *SMALL, "--out", "run")
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr
    assert (
        "/scratch/model: No space left on device; see that this can be written and has room"
        in done.stderr.splitlines()[-1]
    )
    assert_bench_is_clean(bench)


# ---------------------------------------------------------------- names, environments, limits


def test_paths_with_spaces_and_quotes_are_nothing_special(tmp_path):
    odd = tmp_path / """a b'c "d" $HOME;x"""
    odd.mkdir()
    with make_bench(odd) as bench:
        model = bench.model("my 'tiny' \"model\"")
        asked = ("--model", str(model), *WORKLOAD, "--thread-percentages", "none", "--max-engines", "2")
        (odd / "tm 'p").mkdir()
        done = bench.run(*asked, "--out", "my 'run' $1", "--format", "json",
                         environment=bench.environment | {"HF_HOME": str(odd / "h f")})  # fmt: skip
        assert done.returncode in (0, 4), done.stderr
        report = json.loads(done.stdout)
        assert {one["outcome"] for one in report["candidates"]} <= {"ok", "skipped"}, report["candidates"]
        # What is to be pasted into a shell is one word there again.
        serve = [line for line in report["recommendation"]["commands"] if "serve" in line]
        assert not serve or any(str(model) in shlex.split(line) for line in serve), serve
        replayed = bench.run("--replay", "my 'run' $1", "--format", "json")
        assert replayed.returncode == done.returncode
        assert_bench_is_clean(bench)


def test_children_get_a_built_environment_and_nothing_else_of_ours(site, monkeypatch):
    strange = {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10",
        "CUDA_MPS_PIPE_DIRECTORY": "/tmp/somebody-elses",
        "CUDA_MPS_CLIENT_PRIORITY": "1",
        "LD_PRELOAD": "",
        "MY_SECRET": "hush",
        "VLLM_API_KEY": "hush",
        "CUDA_VISIBLE_DEVICES": "7",
    }
    for name, value in strange.items():
        monkeypatch.setenv(name, value)
    seen: dict[str, dict[str, str]] = {}

    def look() -> None:
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                if process.pid != os.getpid() and str(site.bench.directory) in f"{words} {process.environ()}":
                    seen[f"{process.pid} {words}"] = process.environ()
            except psutil.Error:
                continue

    raw = site.run(1, say=at("measuring", look))
    assert codes(raw) == []
    assert any("load_worker" in name for name in seen) and any("EngineCore" in name for name in seen)
    assert any("nvidia-cuda-mps-control" in name for name in seen)
    for name, environment in seen.items():
        assert "MY_SECRET" not in environment and "VLLM_API_KEY" not in environment, name
        assert environment.get("CUDA_VISIBLE_DEVICES", site.place.gpu_uuid) == site.place.gpu_uuid, name
        own = str(site.place.scratch)
        told = [value for key, value in environment.items() if key.startswith("CUDA_MPS_")]
        assert all(value.startswith(own) for value in told), (name, told)


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted((ROOT / "advisor").rglob("*.py")):
        yield path, ast.parse(path.read_text())


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def test_every_child_is_started_without_a_shell_and_with_an_environment_of_its_own():
    found = 0
    for path, tree in sources():
        for name, call in calls(tree):
            if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "os":
                assert name not in ("system", "popen"), path
            starts = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "subprocess"
            if starts and name in ("run", "Popen", "call", "check_output", "check_call"):
                found += 1
                told = {keyword.arg for keyword in call.keywords}
                assert "env" in told and "shell" not in told, f"{path}:{call.lineno}"
                assert name == "Popen" or "timeout" in told, f"{path}:{call.lineno}"
                assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr), f"{path}:{call.lineno}"
    assert found >= 7


# What waits and has its limit elsewhere: the pool's requests have sockets' time limits, a line of a child's output
# comes or its pipe ends with it, and asyncio's waits stand inside `asyncio.timeout` or are woken by a task that does.
BOUND_ELSEWHERE = {
    ("engines.py", "result"), ("load_worker.py", "wait"), ("load_worker.py", "run"), ("warm_worker.py", "join"),
}  # fmt: skip


def test_every_wait_has_a_time_limit():
    found = 0
    for path, tree in sources():
        if path.parent.name != "shell":
            continue
        for name, call in calls(tree):
            waits = isinstance(call.func, ast.Attribute) and name in ("wait", "wait_for", "communicate", "result")
            if not waits and not (name == "join" and is_thread_join(call)):
                continue
            found += 1
            limited = call.keywords or len(call.args) >= (2 if name == "wait_for" else 1)
            assert limited or (path.name, name) in BOUND_ELSEWHERE, f"{path}:{call.lineno} {name}"
    assert found >= 12


def is_thread_join(call: ast.Call) -> bool:
    """`thread.join(…)`, not a text's: that has a text before the point, or several texts in one argument."""
    value = call.func.value if isinstance(call.func, ast.Attribute) else None
    return not isinstance(value, ast.Constant | ast.JoinedStr) and bool(
        re.search(r"thread|listener", ast.unparse(value) if value is not None else "")
    )


def test_limits_of_waits_stand_in_one_place():
    """Numbers of seconds as limits elsewhere would be limits that nobody finds."""
    for path, tree in sources():
        if path.parent.name != "shell" or path.name in ("patience.py", "inside.py", "ablated.py", "warm_worker.py"):
            continue
        for name, call in calls(tree):
            told = {keyword.arg: keyword.value for keyword in call.keywords}
            limits = [told[key] for key in ("timeout", "timeout_s", "limit_s") if key in told]
            if name in ("wait", "join", "wait_ready", "quit") and call.args:
                limits.append(call.args[0])
            for limit in limits:
                literal = isinstance(limit, ast.Constant) and isinstance(limit.value, int | float)
                assert not literal or not limit.value, f"{path}:{call.lineno} {ast.unparse(call)}"


# ---------------------------------------------------------------- numerics


def test_a_check_that_fails_disqualifies_percentages_and_not_the_profile(bench):
    """There is no torch here, so that no worker can check anything: what stands is the verdict about the rest."""
    bench.engine_faults({"all": {"tokens_per_s": [1000, 550], "tokens_per_s_mps": [1000, 900]}})
    asked = ("--model", str(bench.tiny), *WORKLOAD, "--thread-percentages", "40,50", "--max-engines", "2")
    broken = bench.directory / "modules" / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    done = bench.run(*asked, "--out", "run", "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["recommendation"]["thread_percentages"] is None
    assert (report["recommendation"]["engines"], report["recommendation"]["mps"]) == (2, True)
    restricted = [one for one in report["candidates"] if one["thread_percentages"]]
    assert [one["outcome"] for one in restricted] == ["skipped", "skipped"]
    assert all("numerics check failed" in one["why_not"] and "libcudart" in one["why_not"] for one in restricted)
    assert_bench_is_clean(bench)


RESTRICTED = ROOT / "data" / "h200-qwen2.5-3b-serve-1024-faster-host"


def fastest(raw: RawTrial) -> RawTrial:
    """The trial, with three times the tokens where it is of 50 %: by all counts alike."""
    if raw.spec.thread_percentage != 50:
        return raw
    loads = [
        msgspec.structs.replace(load, tokens=[3 * n for n in load.tokens], output_tokens=3 * load.output_tokens)
        for load in raw.loads
    ]
    engines_ = []
    for engine in raw.engines:
        ends = {
            name: msgspec.structs.replace(found, generation_tokens=3 * found.generation_tokens)
            for name in ("counters_start", "counters_end")
            if (found := getattr(engine, name)) is not None
        }
        engines_.append(msgspec.structs.replace(engine, **ends))
    return msgspec.structs.replace(raw, loads=loads, engines=engines_)


def advised(folder: Path, change: Callable[[RawTrial], RawTrial], tmp_path: Path) -> tuple[int | None, str]:
    """The percentage that a run's replay advises after a change of its trials, and what became of 50 %."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(folder, run.path, ignore=shutil.ignore_patterns("report.json"))
    for path, raw in run.files():
        run.complete(path, change(fastest(raw)))
    report = flow.profile(run.manifest(), Replay(run), created="now", replayed=True)
    half = next(one for one in report.candidates if one.thread_percentages == [50] * one.engines)
    told = report.recommendation.thread_percentages
    return told[0] if told else None, half.outcome


def test_the_fastest_percentage_is_not_advised_once_a_product_of_it_is_wrong(tmp_path):
    assert advised(RESTRICTED, lambda raw: raw, tmp_path / "as it is") == (50, "ok")

    def wrong(raw: RawTrial) -> RawTrial:
        if raw.numerics is None:
            return raw
        results = [
            msgspec.structs.replace(one, worst_error=0.37) if (one.percentage, index % 40) == (50, 7) else one
            for index, one in enumerate(raw.numerics.results)
        ]
        assert results != raw.numerics.results
        return msgspec.structs.replace(raw, numerics=msgspec.structs.replace(raw.numerics, results=results))

    percentage, outcome = advised(RESTRICTED, wrong, tmp_path / "product")
    assert (percentage != 50, outcome) == (True, "wrong_results")


def test_the_fastest_percentage_is_not_advised_once_its_engines_compute_something_else(tmp_path):
    def wrong(raw: RawTrial) -> RawTrial:
        if raw.spec.thread_percentage != 50:
            return raw
        last = raw.engines[-1]
        other = [[min(0.0, p - 0.5 * (place % 3)) for place, p in enumerate(one)] for one in last.prompt_logprobs]
        engines_ = [*raw.engines[:-1], msgspec.structs.replace(last, prompt_logprobs=other)]
        return msgspec.structs.replace(raw, engines=engines_)

    percentage, outcome = advised(RESTRICTED, wrong, tmp_path)
    assert (percentage != 50, outcome) == (True, "wrong_results")


def test_a_check_that_could_not_be_done_disqualifies_its_percentage_only(tmp_path):
    def failed(raw: RawTrial) -> RawTrial:
        if raw.numerics is None:
            return raw
        kept = [one for one in raw.numerics.results if one.percentage != 50]
        told = {**raw.numerics.failed, "50": "the worker was ended by signal 9"}
        return msgspec.structs.replace(raw, numerics=msgspec.structs.replace(raw.numerics, results=kept, failed=told))

    percentage, outcome = advised(RESTRICTED, failed, tmp_path)
    assert (percentage != 50, outcome) == (True, "skipped")


# ---------------------------------------------------------------- the matrix itself


def test_the_matrix_names_tests_that_exist_and_claims_nothing_else():
    known = {
        path.stem[5:]: re.findall(r"def test_(\w+)", path.read_text()) for path in Path(__file__).parent.glob("*.py")
    }
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    named = 0
    for row in rows:
        for module, tests in re.findall(r"`([a-z]+)`: ([^;|]+)", re.sub(r"\(.*?\)", "", row)):
            for told in tests.split(","):
                parts = [part for part in told.strip().split("[")[0].split("…") if part]
                assert any(all(part in name for part in parts) for name in known[module]), (module, told)
                named += bool(parts)
    assert named >= 40
