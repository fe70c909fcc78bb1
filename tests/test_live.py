"""One trial on stand-in programs: real processes, sockets and signals, from the first check to the last one gone."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from sites import QUESTION, assert_nothing_left, codes, engine_cores, live, wait_for

from advisor.core import tried
from advisor.core.contention import contention, unevenness
from advisor.core.errors import Unfit
from advisor.shell import engines, mps, processes

# ---------------------------------------------------------------- trials that may count


def test_two_engines_under_mps_give_a_trial_that_may_count_and_leave_nothing(site):
    raw = site.run(2)

    assert (raw.ended, raw.detail, codes(raw)) == ("completed", "", [])
    judged = tried.judge(raw)
    assert judged.measurement is not None
    assert judged.measurement.throughput_tok_per_s.value == pytest.approx(2000, rel=0.2)
    assert raw.mps is not None and len(raw.mps.servers_start) == 1
    assert raw.mps.clients_start == raw.mps.clients_end == sorted(engine.engine_core_pid for engine in raw.engines)
    assert [load.prompt_tokens_min for load in raw.loads] == [64, 64]
    assert {use.role for use in raw.cpu} == {"api_server", "engine_core", "load", "advisor", "mps_server"}
    assert [stage.name for stage in raw.timeline] == [
        "start engines", "check", "warm-up", "window", "drain", "teardown",
    ]  # fmt: skip
    assert raw.gpu is not None and raw.gpu.sm_active_pct and raw.gpu.power_w
    for engine in raw.engines:
        steps = engine.counters_end.steps_by_tokens
        assert steps["inf"] == engine.counters_end.engine_steps > engine.counters_start.steps_by_tokens["inf"]
        assert list(steps)[:3] == ["1", "8", "16"] and list(steps.values()) == sorted(steps.values())
    assert_nothing_left(raw)
    assert raw.teardown is not None
    assert any("SIGTERM to API servers" in step for step in raw.teardown.steps)
    assert any("quit: the daemon ended" in step for step in raw.teardown.steps)


def test_a_trial_with_prompts_and_answers_of_mixed_lengths_may_count(site):
    mixed = msgspec.structs.replace(QUESTION.workload, isl_range=(32, 96), osl_range=(8, 24))
    question = msgspec.structs.replace(QUESTION, workload=mixed)
    site.place.manifest = msgspec.structs.replace(site.place.manifest, question=question)
    raw = site.run(2, mps=False)

    assert codes(raw) == []
    for load in raw.loads:
        assert 32 <= load.prompt_tokens_min < load.prompt_tokens_max <= 96
    # All generators serve all engines: none of them is an engine's own.
    loads = [use for use in raw.cpu if use.role == "load"]
    assert len(loads) == len(raw.spec.load_cores) and {use.engine for use in loads} == {None}


# ---------------------------------------------------------------- the cores


def test_a_trial_tells_how_fast_its_cores_are_and_names_none_of_its_own_as_a_stranger(site):
    raw = site.run(2)

    assert [speed.core for speed in raw.core_speeds] == [0]  # all engines' and generators', on this bench
    own = {use.pid for use in raw.cpu} | {engine.api_server_pid for engine in raw.engines} | set(raw.mps.servers_start)
    assert not own & {stranger.pid for stranger in raw.strangers}
    if Path("/proc/self/schedstat").exists():
        assert all(use.waited_s is not None and use.waited_s >= 0 for use in raw.cpu)
    assert unevenness(raw) is None
    # This machine may be busy with something else: then, and only then, that is told.
    loud = [stranger for stranger in raw.strangers if stranger.cpu_s > 0.1 * (raw.window[1] - raw.window[0])]
    assert (contention(raw) is not None) == bool(loud)


def test_work_of_others_on_an_engines_core_is_named(site):
    busy = "import os; os.sched_setaffinity(0, {0})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as hog:
        try:
            raw = site.run(1, mps=False)
        finally:
            hog.kill()

    found = [stranger for stranger in raw.strangers if stranger.pid == hog.pid]
    assert [stranger.core for stranger in found] == [0]
    told = contention(msgspec.structs.replace(raw, strangers=found))
    assert told is not None and told.startswith(f"PID {hog.pid} (python")
    assert "of core 0, which engine 0 and the load generators share" in told


# ---------------------------------------------------------------- evidence that is rejected


def test_an_engine_that_is_not_attached_makes_the_trial_not_attached(site):
    site.bench.engine_faults({"all": {"tokens_per_s": 1000}, "1": {"not_attached": True}})
    raw = site.run(2)

    assert raw.ended == "completed"
    judged = tried.judge(raw)
    assert (judged.outcome, judged.measurement) == ("not_attached", None)
    assert f"engine core PID {raw.engines[1].engine_core_pid} was not attached" in judged.why
    assert str(raw.engines[0].engine_core_pid) not in judged.why
    assert_nothing_left(raw)


def test_a_client_too_many_rejects_the_trial_and_is_named(site):
    site.bench.mps_faults(ghost_client=os.getpid())
    raw = site.run()

    judged = tried.judge(raw)
    assert (judged.outcome, codes(raw)) == ("invalid", ["foreign_client", "foreign_client"])
    assert f"PID {os.getpid()} was attached to MPS but is no engine core" in judged.why


def test_engines_with_different_kv_caches_are_rejected(site):
    site.bench.engine_faults({"all": {"tokens_per_s": 1000}, "1": {"kv_tokens": 16000}})
    raw = site.run(2, mps=False)

    assert (tried.judge(raw).outcome, codes(raw)) == ("invalid", ["unequal_kv"])
    assert "engine 1: 16000" in tried.judge(raw).why
    assert_nothing_left(raw)


def test_a_process_that_joins_during_the_trial_rejects_it(site):
    site.bench.gpu(processes={})

    def say(text: str) -> None:
        if "measuring" in text:
            site.bench.gpu(processes={str(os.getpid()): 1 << 30})

    raw = site.run(say=say, teardown_timeout_s=0.5)

    assert (raw.foreign_pids, codes(raw)) == ([os.getpid()], ["foreign_process"])


def test_a_machine_with_company_is_refused_before_an_engine_starts(site):
    site.bench.gpu(processes={str(os.getpid()): 1 << 30})
    said = []
    with pytest.raises(Unfit, match=rf"PID {os.getpid()}\b.*--gpu"):
        site.run(say=said.append)
    assert said == []


# ---------------------------------------------------------------- engines that fail


def test_an_engine_that_never_answers_is_a_timeout(site):
    site.bench.engine_faults({"1": {"hang_start": True}})
    raw = site.run(2, engine_start_timeout_s=2.0)

    assert (raw.ended, raw.window) == ("timeout", None)
    assert raw.detail == "engine 1 did not answer within 2 s of its start"
    assert raw.engines[0].ready_s is not None and raw.engines[1].ready_s is None
    assert_nothing_left(raw)


def test_an_engine_that_dies_under_load_is_a_crash_with_the_reason(site):
    site.bench.engine_faults({"all": {"tokens_per_s": 1000, "die_after_s": 0.6}})
    raw = site.run()

    assert raw.ended == "crash"
    assert "engine 0 died" in raw.detail
    assert "the API server met an error that nobody expected" in raw.detail
    assert tried.judge(raw).outcome == "crash"
    assert raw.engines[0].died_s is not None
    assert_nothing_left(raw)


def test_an_engine_core_that_is_killed_is_a_crash(site):
    killed = []

    def say(text: str) -> None:
        if "measuring" in text and not killed:
            (core,) = engine_cores(site.bench)
            killed.append(core.pid)
            core.send_signal(signal.SIGKILL)

    raw = site.run(say=say)

    assert raw.ended == "crash"
    assert "engine 0 died" in raw.detail
    assert [engine.engine_core_pid for engine in raw.engines] == killed
    assert any("died unexpectedly" in line for line in raw.engines[0].log_tail)
    assert_nothing_left(raw)


def test_no_room_at_the_start_is_out_of_memory(site):
    site.bench.engine_faults({"1": {"die_at_start": "oom"}})
    raw = site.run(2)

    assert (raw.ended, raw.detail) == ("oom", "engine 1 ran out of GPU memory")
    assert_nothing_left(raw)


def test_a_failure_at_the_start_is_quoted(site):
    site.bench.engine_faults({"all": {"die_at_start": "crash"}})
    raw = site.run()

    assert raw.ended == "crash"
    assert "engine 0 died" in raw.detail and "CUDA error: an illegal instruction was met" in raw.detail
    assert any("an illegal instruction was met" in line for line in raw.engines[0].log_tail)


def test_a_program_that_is_not_there_is_a_crash_that_names_it(site):
    site.place.vllm_command = ["/nowhere/vllm"]
    raw = site.run()

    assert raw.ended == "crash"
    assert "No such file" in raw.detail
    assert_nothing_left(raw)


def test_engines_that_stop_answering_under_load_are_a_timeout(site):
    site.bench.engine_faults({"all": {"tokens_per_s": 1000, "hang_after_s": 1.3}})
    raw = site.run()

    assert (raw.ended, raw.detail) == ("timeout", "no token from any engine for 1 s")
    assert_nothing_left(raw)


# ---------------------------------------------------------------- what does not want to end


def test_a_daemon_that_refuses_to_quit_is_ended(site, monkeypatch):
    monkeypatch.setattr(mps.Daemon.quit, "__defaults__", (10.0, 1))  # seconds, in place of the five it is given
    site.bench.mps_faults(refuse_quit=1)
    site.bench.engine_faults({"all": {"die_at_start": "oom"}})
    raw = site.run(teardown_timeout_s=0.5)

    assert raw.ended == "oom"
    assert_nothing_left(raw)
    assert raw.teardown is not None
    told = [re.sub(r"^[\d.]+ s ", "", step) for step in raw.teardown.steps if " s " in step]
    assert [step.partition(":")[0] for step in told[:2]] == ["quit", "quit -t 1"]
    assert told[2].startswith("SIGTERM to ")


def test_an_engine_that_ignores_sigterm_is_killed(site, monkeypatch):
    impatient = lambda left, timeout_s, poll: processes.end(left, 0.5, poll)  # noqa: E731
    monkeypatch.setattr(engines, "end", impatient)
    site.bench.engine_faults({"all": {"hang_start": True, "ignore_sigterm": True}})
    raw = site.run(mps=False, engine_start_timeout_s=1.5, teardown_timeout_s=0.5)

    assert raw.ended == "timeout"
    assert_nothing_left(raw)
    assert raw.teardown is not None
    assert any(step.startswith("SIGKILL to ") for step in raw.teardown.steps)
    assert raw.engines[0].exit_code == -signal.SIGKILL


def test_an_engine_core_that_outlives_its_server_is_ended(site):
    site.bench.engine_faults({"all": {"tokens_per_s": 1000, "die_after_s": 0.5, "core_survives": True}})
    raw = site.run(teardown_timeout_s=0.5)

    assert raw.ended == "crash"
    assert_nothing_left(raw)
    assert raw.teardown is not None
    assert any(f"SIGTERM to {raw.engines[0].engine_core_pid}" in step for step in raw.teardown.steps)


def test_a_daemon_that_does_not_start_is_one_line_and_leaves_nothing(site):
    site.bench.mps_faults(refuse_start=1)
    with pytest.raises(Unfit, match="already running"):
        site.run()


def test_a_daemon_that_loses_its_tongue_is_a_crash(site, monkeypatch):
    monkeypatch.setattr(mps.Daemon.quit, "__defaults__", (10.0, 1))
    site.bench.mps_faults(garbled=1)
    raw = site.run()

    assert raw.ended == "crash"
    assert raw.detail.startswith("MPS: ") and "PID of client unknown" in raw.detail
    assert_nothing_left(raw)


# ---------------------------------------------------------------- the run folder


def test_a_recorded_trial_is_not_measured_again(site):
    site.bench.engine_faults({"all": {"die_at_start": "oom"}})
    runner, folder = live(site)
    with runner:
        first = runner.run(site.spec(1))
        assert runner.run(site.spec(1)) == first
    (path,) = (folder.path / "trials").iterdir()
    assert folder.trials() == [first]
    assert not site.place.scratch.exists()

    again, _ = live(site)  # without a scratch directory there is nothing that could be started
    with again:
        assert again.run(site.spec(1)) == first
    assert list((folder.path / "trials").iterdir()) == [path]


def test_a_trial_that_was_recorded_on_another_gpu_is_refused(site):
    site.bench.engine_faults({"all": {"die_at_start": "oom"}})
    _, folder = live(site)
    folder.append(msgspec.structs.replace(site.run(), gpu_uuid="GPU-other"))
    runner, _ = live(site)
    with runner, pytest.raises(Unfit, match=r"another GPU \(GPU-other\).*--out"):
        runner.run(site.spec(1))


def test_a_second_profile_of_the_same_gpu_is_refused(site):
    runner, _ = live(site)
    second, _ = live(site)
    with runner, pytest.raises(Unfit, match=f"{site.bench.gpu_uuid} is being profiled by process {os.getpid()}"):
        second.__enter__()


def test_an_advisor_that_is_killed_takes_its_engines_with_it(bench):
    """By the kernel: these stand-ins do not look whether their parent lives, and there is no one left to end them."""
    idle = [sys.executable, "-c", "import time; time.sleep(60)"]
    question = ("--model", str(bench.tiny), "--ctx", "64", "--osl", "16", "--concurrency", "8")
    process = bench.start("--vllm", shlex.join(idle), *question)
    try:
        wait_for(lambda: any(line.startswith(" ".join(idle)) for line in bench.processes()), 15.0)
    finally:
        process.kill()
        process.communicate(timeout=10)
    wait_for(lambda: not bench.processes(), 10.0)


def test_engine_steps_are_summed_over_labels_and_their_bounds_written_one_way() -> None:
    from advisor.shell.engines import _metrics

    lines = [
        f'vllm:iteration_tokens_total_bucket{{engine="{engine}",le="{bound}",model_name="m"}} {count}'
        for engine in (0, 1)
        for bound, count in (("1.0", 2.0), ("512.0", 10.0), ("1.048576e+06", 11.0), ("+Inf", 12.0))
    ]
    values, steps, _ = _metrics("\n".join([*lines, 'vllm:iteration_tokens_total_count{engine="0"} 24.0']))
    assert steps == {"1": 4.0, "512": 20.0, "1048576": 22.0, "inf": 24.0}
    assert values == {"vllm:iteration_tokens_total_count": 24.0}


def test_every_engine_gets_a_block_of_ports_that_the_kernel_does_not_deal_out() -> None:
    from advisor.shell.engines import PORTS_PER_ENGINE, port_blocks

    first_dealt = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = port_blocks(5)
    assert all(b - a == PORTS_PER_ENGINE for a, b in itertools.pairwise(ports))
    assert ports[0] > 1024 and ports[-1] + PORTS_PER_ENGINE <= first_dealt


def test_ports_in_use_are_passed_over() -> None:
    from advisor.shell.engines import PORTS_PER_ENGINE, port_blocks

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port_blocks(1)[0]))
        port = taken.getsockname()[1]
        assert all(not base <= port < base + PORTS_PER_ENGINE for base in (port_blocks(1)[0] for _ in range(300)))
