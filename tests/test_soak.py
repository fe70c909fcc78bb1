"""Whole profiles on stand-ins with random faults, one after another: `pytest tests/test_soak.py --soak 20 -s`.

Each ends with a verdict or a named outcome, and leaves no process, lock, ledger or directory. The faults follow from
the number of the profile, so that one that fails can be had again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Bench, make_bench

QUESTION = ("--ctx", "64", "--osl", "16", "--concurrency", "8", "--thread-percentages", "none", "--max-engines", "2")
LIMIT_S = 300.0
RATES = {"tokens_per_s": [1000, 550], "tokens_per_s_mps": [1000, 900]}
# What an engine does, with the chance that only one of several does it.
ENGINE: list[dict[str, Any]] = [
    {},
    {"die_at_start": "oom"},
    {"die_at_start": "crash"},
    {"die_at_start": "shm"},
    {"die_after_s": 0.8},
    {"die_after_s": 0.8, "core_survives": True},
    {"core_dies_after_s": 1.0},
    {"core_faults_after_s": 1.0},
    {"hang_after_s": 1.2},
    {"hang_start": True},
    {"hang_start": True, "ignore_sigterm": True},
    {"kv_tokens": 16000},
    {"not_attached": True},
    {"wrong_logprobs": True},
    {"fail_every": 3, "fail_how": "disconnect"},
    {"fail_every": 3, "fail_how": "status"},
    {"coalesce": 4},
]
DAEMON: list[dict[str, int]] = [
    {}, {}, {}, {"refuse_quit": 1}, {"flaky": 3}, {"garbled": 1}, {"refuse_start": 1}, {"mute": 1}, {"hide_clients": 1},
]  # fmt: skip
FROM_OUTSIDE = [None, None, None, "server", "core", "interrupt", "twice", "terminate", "kill", "gpu"]


def profile(number: int, folder: Path) -> dict[str, Any]:
    """Run the profile of this number; what it met and how it ended. Raises AssertionError for what must not be."""
    chooser = random.Random(number)
    engine, daemon, outside = chooser.choice(ENGINE), chooser.choice(DAEMON), chooser.choice(FROM_OUTSIDE)
    whose = chooser.choice(["all", "0", "1"])
    after_s = chooser.uniform(1.0, 12.0)
    told = {"number": number, "engine": {whose: engine}, "mps": daemon, "outside": outside}
    folder.mkdir()
    with make_bench(folder) as bench:
        faults: dict[str, Any] = {"all": dict(RATES)}
        faults[whose] = faults.get(whose, {}) | engine
        bench.engine_faults(faults)
        bench.mps_faults(**daemon)
        began_s = time.monotonic()
        code, out, err = run(bench, outside, after_s)
        if code == -signal.SIGKILL:
            bench.engine_faults({"all": dict(RATES)})
            bench.mps_faults()
            again = (*asked(bench), "--resume") if (folder / "run" / "manifest.json").exists() else asked(bench)
            done = bench.run(*again)
            code, out, err = done.returncode, done.stdout, done.stderr
        told |= {"code": code, "seconds": round(time.monotonic() - began_s, 1)}
        assert "Traceback" not in err, (told, err)
        assert code in (0, 3, 4, 130), (told, err)
        if code in (0, 4):
            report = json.loads(out)
            told["verdict"] = report["recommendation"]["status"]
            assert report["recommendation"]["sentence"] and all(one["outcome"] for one in report["candidates"])
        else:
            assert err.splitlines()[-1].startswith("mps-advisor: "), (told, err)
            told["said"] = err.splitlines()[-1][:120]
        left = bench.processes(), bench.gpu_processes(), bench.scratch(), bench.ledgers()
        assert left == ([], [], [], []), (told, left, err)
        locks = [path.read_text() for path in bench.temporary.glob("mps-advisor-*/*.lock")]
        assert not any(locks), (told, locks)
    return told


def asked(bench: Bench) -> tuple[str, ...]:
    return ("--model", str(bench.tiny), *QUESTION, "--out", "run", "--format", "json")


def run(bench: Bench, outside: str | None, after_s: float) -> tuple[int, str, str]:
    process = bench.start(*asked(bench))
    try:
        if outside is not None:
            try:
                out, err = process.communicate(timeout=after_s)
                return process.returncode, out, err  # it was over before anything could be done to it
            except subprocess.TimeoutExpired:
                strike(bench, process, outside)
        out, err = process.communicate(timeout=LIMIT_S)
        return process.returncode, out, err
    finally:
        mend(bench)
        process.kill()
        process.communicate()


def strike(bench: Bench, process: subprocess.Popen[str], what: str) -> None:
    match what:
        case "server":
            servers = [one for one in psutil.process_iter() if is_server(bench, one)]
            for one in servers:
                one.kill()
        case "core":
            for pid in bench.gpu_processes()[:1]:
                os.kill(pid, signal.SIGKILL)
        case "interrupt":
            process.send_signal(signal.SIGINT)
        case "twice":
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        case "terminate":
            process.terminate()
        case "kill":
            process.kill()
        case "gpu":
            bench.gpu(error=15)


def is_server(bench: Bench, process: psutil.Process) -> bool:
    try:
        return str(bench.programs / "nvidia-cuda-mps-server") in process.cmdline()
    except psutil.Error:
        return False


def mend(bench: Bench) -> None:
    """A GPU that fell off comes back, so that who is on it can be told."""
    path = bench.directory / "nvml.json"
    state = json.loads(path.read_text())
    state.pop("error", None)
    path.write_text(json.dumps(state))


@pytest.mark.timeout(0)
def test_profiles_with_random_faults_end_with_a_verdict_or_a_named_outcome(tmp_path, request):
    count = request.config.getoption("--soak")
    if not count:
        pytest.skip("--soak N runs so many profiles, of about half a minute each")
    failed = []
    for number in range(count):
        try:
            print(json.dumps(profile(number, tmp_path / str(number))), flush=True)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failed.append(str(error))
            print(error, flush=True)
    assert not failed
