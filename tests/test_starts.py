"""Several windows of one start of the engines, on stand-in programs: what is shared, what is not, and how it ends."""

from __future__ import annotations

import os
import signal

import msgspec
import psutil
import pytest
from sites import assert_nothing_left, codes, engine_cores, live

from advisor.core import specs
from advisor.core.errors import Unfit
from advisor.core.starts import same_start
from advisor.core.tried import candidate
from advisor.shell import engines


def at_load(spec, concurrency: int, **changes):
    workload = msgspec.structs.replace(spec.workload, concurrency=concurrency)
    return msgspec.structs.replace(spec, workload=workload, **changes)


def cores_of(raw) -> list[int]:
    return [engine.engine_core_pid for engine in raw.engines]


# ---------------------------------------------------------------- what one start serves


def test_two_loads_of_the_same_engines_are_measured_in_one_start(site):
    said = []
    runner, folder = live(site, said.append)
    with runner:
        runner.run(site.spec(2))
        runner.run(at_load(site.spec(2), 4))
    first, second = folder.trials()

    assert (codes(first), codes(second)) == ([], [])
    assert cores_of(first) == cores_of(second)
    assert first.mps is not None and second.mps is not None
    assert first.mps.servers_start == second.mps.servers_end  # one daemon
    assert first.started is not None and first.started == second.started
    assert [stage.name for stage in second.timeline] == ["check", "warm-up", "window", "drain", "teardown"]
    assert second.timeline[0].start_s >= first.timeline[-1].end_s
    assert sum("cleaning up" in text for text in said) == 1
    # Asked once, on record with both.
    assert all(engine.prompt_logprobs for engine in first.engines)
    assert [e.prompt_logprobs for e in second.engines] == [e.prompt_logprobs for e in first.engines]


def test_idle_engines_are_started_and_attached_and_get_no_request(site):
    runner, folder = live(site)
    with runner:
        runner.run(msgspec.structs.replace(site.spec(2), engines=1, idle_engines=1, split_cores=True))
    (raw,) = folder.trials()

    assert codes(raw) == []
    assert [load.engine for load in raw.loads] == [0]
    assert sorted(raw.mps.clients_start) == sorted(cores_of(raw)) and len(raw.engines) == 2
    counted = [
        engine.counters_end.generation_tokens - engine.counters_start.generation_tokens for engine in raw.engines
    ]
    assert counted[0] > 0 == counted[1]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_engines_that_rest_first_work_later_and_take_their_share_of_the_cores(site):
    one, other = sorted(os.sched_getaffinity(0))[:2]
    manifest = site.place.manifest
    host = msgspec.structs.replace(
        manifest.host, cores=[one] * 3 + [other] * 3 + [one] * 2
    )  # the last two for the load
    site.place.manifest = manifest = msgspec.structs.replace(manifest, host=host)
    runner, folder = live(site)
    together, seen = site.spec(2), []
    with runner:
        for working, load in ((1, 8), (2, 8), (1, 4)):
            runner.run(at_load(specs.among(manifest, together, working), load))
            threads = [{tuple(os.sched_getaffinity(t.id)) for t in core.threads()} for core in engine_cores(site.bench)]
            seen.append(sorted(set.union(*threads)))
    first, second, third = folder.trials()

    # One that rests stays where it is: where it was started, or where it worked.
    assert seen == [[(one, other), (other,)], [(one,), (other,)], [(one, other), (other,)]]
    for raw in (first, second, third):
        assert codes(raw) == []
        assert len(raw.engines) == 2 and raw.started == first.started
        assert sorted(raw.mps.clients_start) == sorted(cores_of(first))
    assert [[load.engine for load in raw.loads] for raw in (first, second, third)] == [[0], [0, 1], [0]]
    assert candidate(first.spec) == candidate(site.spec(1)) != candidate(second.spec)


def test_the_second_window_counts_only_its_own_tokens(site):
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(1, mps=False))
        runner.run(at_load(site.spec(1, mps=False), 4))
    first, second = folder.trials()

    assert codes(second) == []
    (before,), (after,) = first.engines, second.engines
    assert after.counters_start.generation_tokens > before.counters_end.generation_tokens
    assert after.counters_start.at_s > first.window[1]
    # The engine still knows the first window's prompts; the second one has others.
    assert after.counters_end.prefix_cache_hits == after.counters_start.prefix_cache_hits
    (load,) = second.loads
    assert load.bins_start_s > first.window[1]
    assert load.completed * 13 <= load.output_tokens <= load.sent * 19
    assert max(second.gpu.at_s) > second.window[0] > min(second.gpu.at_s) > max(first.gpu.at_s)
    assert before.log_tail and not set(before.log_tail) & set(after.log_tail)


def test_a_second_decode_wave_meets_no_request_of_the_first(site):
    site.bench.engine_faults({"all": {"tokens_per_s": 500}})  # slow enough to be cut off in mid-answer
    question = site.place.manifest.question
    wave = msgspec.structs.replace(question.workload, kind="decode", concurrency=4, osl_spread=0)
    question = msgspec.structs.replace(question, workload=wave)
    site.place.manifest = msgspec.structs.replace(site.place.manifest, question=question)
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(1, mps=False, drain_timeout_s=0.05))
        runner.run(at_load(site.spec(1, mps=False, drain_timeout_s=0.05), 3))
    first, second = folder.trials()

    assert (first.ended, second.ended) == ("completed", "completed")
    assert cores_of(first) == cores_of(second)
    assert second.engines[0].counters_start.running == 3


@pytest.mark.parametrize(
    "other",
    [
        lambda spec: msgspec.structs.replace(spec, engines=3),
        lambda spec: msgspec.structs.replace(spec, mps=False),
        lambda spec: msgspec.structs.replace(spec, thread_percentage=50),
        lambda spec: msgspec.structs.replace(spec, repeat=1),
        lambda spec: msgspec.structs.replace(spec, engine_cores=[[1], [2]]),
        lambda spec: changed_settings(spec, max_num_seqs=32),
        lambda spec: changed_settings(spec, kv_cache_memory_bytes=1 << 30),
        lambda spec: msgspec.structs.replace(spec, workload=msgspec.structs.replace(spec.workload, kind="decode")),
        lambda spec: msgspec.structs.replace(spec, kind="numerics"),
    ],
)
def test_engines_that_differ_in_anything_need_a_start_of_their_own(site, other):
    spec = site.spec(2)
    assert not same_start(spec, other(spec))
    assert same_start(spec, at_load(site.spec(2, measure_min_s=9.0), 3, load_cores=[1], label="load-3"))


def changed_settings(spec, **changes):
    return msgspec.structs.replace(spec, settings=msgspec.structs.replace(spec.settings, **changes))


# ---------------------------------------------------------------- what ends a start


def test_other_settings_end_the_engines_first(site):
    seen = []

    def say(text: str) -> None:
        if "starting engines" in text:
            seen.append([core.pid for core in engine_cores(site.bench)])

    runner, folder = live(site, say)
    with runner:
        runner.run(site.spec(1, mps=False))
        looked = len(seen)
        runner.run(changed_settings(site.spec(1, mps=False), max_num_seqs=32))
    first, second = folder.trials()

    assert (first.ended, second.ended) == ("completed", "completed")
    assert seen[looked:] and not any(set(cores_of(first)) & set(pids) for pids in seen[looked:])
    assert cores_of(first) != cores_of(second) and first.started != second.started
    assert_nothing_left(first)
    assert_nothing_left(second)


def test_the_teardown_stands_in_the_last_record_of_a_start(site):
    runner, folder = live(site)
    last = at_load(site.spec(1, mps=False), 4)
    with runner:
        assert runner.run(site.spec(1, mps=False)).teardown is None
        assert runner.run(last).teardown is None
        assert [raw.teardown for raw in folder.trials()] == [None, None]  # on record before the engines end
        assert len(engine_cores(site.bench)) == 1
        runner.finish()
        assert engine_cores(site.bench) == []
        assert runner.run(last).teardown is not None
    first, second = folder.trials()

    assert first.teardown is None
    assert_nothing_left(second)
    assert second.timeline[-1].name == "teardown"
    assert (first.engines[0].exit_code, second.engines[0].exit_code) == (None, 0)
    assert len(list((folder.path / "trials").iterdir())) == 2


def test_numerics_ends_the_engines_first(site):
    seen = []

    def say(text: str) -> None:
        if "checking matrix products" in text:
            seen.append(engine_cores(site.bench))

    runner, folder = live(site, say)
    with runner:
        runner.run(site.spec(1))
        runner.run(specs.numerics_spec(site.place.manifest, [50], site.place.manifest.settings))
        runner.run(at_load(site.spec(1), 4))
    first, check, second = folder.trials()

    assert seen == [[]]
    assert check.spec.kind == "numerics" and check.started is None
    assert cores_of(first) != cores_of(second)
    assert_nothing_left(first)
    assert_nothing_left(second)


def test_an_engine_that_dies_between_two_windows_is_a_crash_and_the_next_trial_starts_afresh(site):
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(1))
        (core,) = engine_cores(site.bench)
        os.kill(core.pid, signal.SIGKILL)
        core.wait(5.0)
        runner.run(at_load(site.spec(1), 4))
        assert site.bench.gpu_processes() == []  # ended at once
        runner.run(at_load(site.spec(1), 4, repeat=1))
    first, second, third = folder.trials()

    assert (first.ended, codes(first), first.teardown) == ("completed", [], None)
    assert (second.ended, second.window, cores_of(second)) == ("crash", None, [core.pid])
    assert "engine 0 died" in second.detail
    assert second.started == first.started
    assert_nothing_left(second)
    assert (third.ended, codes(third)) == ("completed", [])
    assert third.started != first.started
    assert_nothing_left(third)


def test_ctrl_c_in_the_second_window_keeps_the_first_and_leaves_nothing(site):
    def say(text: str) -> None:
        # The second Ctrl-C comes while everything is being ended, and has to wait.
        if (len(folder.trials()) == 1 and "measuring" in text) or text == "cleaning up":
            os.kill(os.getpid(), signal.SIGINT)

    runner, folder = live(site, say)
    with pytest.raises(KeyboardInterrupt), runner:
        runner.run(site.spec(2))
        runner.run(at_load(site.spec(2), 4))
    (first,) = folder.trials()

    assert codes(first) == []
    assert_nothing_left(first)
    assert site.bench.processes() == [] and site.bench.gpu_processes() == []
    assert not site.place.scratch.exists()


def test_a_run_that_goes_on_starts_engines_for_the_missing_window_alone(site):
    runner, _ = live(site)
    with runner:
        first = runner.run(site.spec(1, mps=False))
    site.renew()
    runner, folder = live(site)
    with runner:
        assert runner.run(site.spec(1, mps=False)).created == first.created
        assert site.bench.gpu_processes() == []
        runner.run(at_load(site.spec(1, mps=False), 4))
    first, second = folder.trials()

    assert second.timeline[0].name == "start engines"
    assert first.started != second.started
    assert_nothing_left(first)
    assert_nothing_left(second)


def test_company_that_came_between_two_windows_is_refused(site):
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(1, mps=False, teardown_timeout_s=0.5))
        site.bench.gpu(processes={str(os.getpid()): 1 << 30})
        with pytest.raises(Unfit, match=rf"PID {os.getpid()}\b.*--gpu"):
            runner.run(at_load(site.spec(1, mps=False), 4))
        assert site.bench.gpu_processes() == []
    (first,) = folder.trials()
    assert (first.ended, codes(first)) == ("completed", [])


def test_no_second_window_is_measured_of_an_engine_that_is_not_attached(site):
    site.bench.engine_faults({"all": {"tokens_per_s": 1000}, "1": {"not_attached": True}})
    runner, folder = live(site)
    with runner:
        runner.run(site.spec(2))
        runner.run(at_load(site.spec(2), 4))
    first, second = folder.trials()

    assert (first.ended, second.ended, second.window) == ("completed", "not_attached", None)
    assert f"engine core PID {second.engines[1].engine_core_pid} is not attached" in second.detail
    assert_nothing_left(second)


def test_what_could_not_be_ended_is_refused_when_the_start_ends(site, monkeypatch):
    monkeypatch.setattr(engines, "end", lambda left, timeout_s, processes: [])  # no signal but the first
    site.bench.engine_faults({"all": {"tokens_per_s": 1000, "ignore_sigterm": True}})
    runner, folder = live(site)
    with pytest.raises(Unfit, match=r"PID .* could not be ended after trial “1-engine-no-mps”; .*--resume"), runner:
        runner.run(site.spec(1, mps=False, teardown_timeout_s=0.5))
        runner.run(at_load(site.spec(1, mps=False), 4))
    first, second = folder.trials()

    left = [psutil.Process(pid) for pid in second.teardown.left_pids]
    for process in left:
        process.kill()
    psutil.wait_procs(left, 5.0)
    assert first.teardown is None
    assert set(cores_of(second)) < {process.pid for process in left}
