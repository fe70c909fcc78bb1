"""What kept a trial from being faster, told from its evidence."""

from __future__ import annotations

import pytest
import raw
from raw import changed

from advisor.core.limits import limited_by, step_shares
from advisor.core.measure import measure
from advisor.core.records import Workload


def limit(trial):
    found = limited_by(trial, measure(trial))
    assert found is not None
    return found


def idle(pct, **changes):
    return raw.trial(**{"engines": 1, "mps": False, "graphics_active_pct": 100.0 - pct, **changes})


def using(trial, role, *, thread=None, process=None, engine=0):
    """`trial` in which the process of that role used so many percent of a core."""
    window_s = trial.window[1] - trial.window[0]
    index = next(i for i, use in enumerate(trial.cpu) if (use.role, use.engine) == (role, engine))
    if thread is not None:
        trial = changed(trial, f"cpu.{index}.main_thread_s", thread / 100 * window_s)
    return trial if process is None else changed(trial, f"cpu.{index}.cpu_s", process / 100 * window_s)


def counting(trial, start, end):
    """`trial` whose engines counted these steps, by bound, up to the window's start and its end."""
    for index in range(len(trial.engines)):
        trial = changed(trial, f"engines.{index}.counters_start.steps_by_tokens", start)
        trial = changed(trial, f"engines.{index}.counters_end.steps_by_tokens", end)
    return trial


CALM = idle(60)  # engine core 80 %, API server 55 % and 60 %, load generators 30 %


def test_a_gpu_that_is_hardly_idle_is_the_limit_whatever_the_threads_do():
    busy = using(idle(5), "engine_core", thread=99)
    assert limit(busy).what == "gpu"
    assert limit(busy).evidence.startswith("GPU idle 5 %, engine core thread 99 % of a core, API server thread 55 %")
    assert limit(using(idle(15), "engine_core", thread=99)).what == "engine_core"


@pytest.mark.parametrize("idle_pct", [2, 60])
def test_a_load_generator_near_its_end_comes_before_everything_else(idle_pct):
    found = limit(idle(idle_pct, load_core_share=0.71))
    assert found.what == "load_generator"
    assert found.evidence.startswith("load generator 71 % of a core")
    assert limit(idle(idle_pct, load_core_share=0.69)).what != "load_generator"


def test_the_engine_core_is_the_limit_with_the_warning_that_it_may_spin():
    found = limit(using(CALM, "engine_core", thread=94))
    assert found.what == "engine_core"
    assert found.evidence.startswith(
        "engine core thread 94 % of a core, API server thread 55 %, process 60 %, GPU idle"
    )
    assert "may also spin while it waits for the GPU" in found.evidence
    assert limit(using(CALM, "engine_core", thread=84)).what == "unattributed"


@pytest.mark.parametrize("use", [{"thread": 86}, {"process": 131}])
def test_the_api_server_is_the_limit_by_its_busiest_thread_or_as_a_whole(use):
    assert limit(using(CALM, "api_server", **use)).what == "api_server"


@pytest.mark.parametrize(("core", "api", "what"), [(94, 96, "api_server"), (96, 94, "engine_core")])
def test_of_two_that_are_full_the_fuller_one_is_the_limit_and_both_are_named(core, api, what):
    found = limit(using(using(CALM, "engine_core", thread=core), "api_server", thread=api))
    assert found.what == what
    assert f"engine core thread {core} % of a core, API server thread {api} %" in found.evidence


def test_of_several_engines_the_busiest_counts_and_is_named():
    trial = using(idle(60, engines=3), "engine_core", thread=91, engine=2)
    found = limit(trial)
    assert found.what == "engine_core"
    assert "(engine 2, the busiest of 3)" in found.evidence


def test_a_wait_for_a_core_stands_in_the_evidence():
    index = next(i for i, use in enumerate(CALM.cpu) if use.role == "engine_core")
    trial = changed(CALM, f"cpu.{index}.waited_s", 0.2 * (CALM.window[1] - CALM.window[0]))
    assert "engine core waited 20 % of the window for a core" in limit(trial).evidence
    assert "waited" not in limit(CALM).evidence


def waiting(trial):
    return changed(trial, "engines.0.counters_end.waiting", 12.0)


def test_preemptions_with_requests_waiting_mean_a_kv_cache_that_is_too_small():
    trial = changed(waiting(CALM), "engines.0.counters_end.preemptions", 3.0)
    assert limit(trial).what == "kv_cache"
    assert limit(trial).evidence.startswith("12 requests waiting at the window's end, 3 preempted")
    assert limit(changed(CALM, "engines.0.counters_end.preemptions", 3.0)).what == "unattributed"
    assert limit(waiting(CALM)).what == "unattributed"


def test_a_cache_without_room_for_one_more_prompt_is_full():
    # 256 requests of 1024 prompt and on average 64 output tokens hold 278,528.
    full = changed(waiting(CALM), "engines.0.kv_cache_tokens", 279_000)
    assert limit(full).what == "kv_cache"
    assert "KV cache full at 256 requests" in limit(full).evidence
    assert limit(changed(full, "engines.0.kv_cache_tokens", 280_000)).what == "unattributed"
    assert limit(changed(full, "engines.0.kv_cache_tokens", None)).what == "unattributed"


def test_a_full_cache_on_a_busy_gpu_is_not_the_limit():
    assert limit(changed(waiting(idle(5)), "engines.0.kv_cache_tokens", 279_000)).what == "gpu"


BEFORE = {"512": 90.0, "4096": 95.0, "8192": 100.0, "inf": 100.0}


def test_steps_that_are_mostly_at_the_token_budget_make_it_the_limit():
    # 8192 is the budget: what exceeds 4096 tokens is counted as full.
    at = counting(CALM, BEFORE, {"512": 100.0, "4096": 145.0, "8192": 200.0, "inf": 200.0})
    assert limit(at).what == "token_budget"
    assert limit(at).evidence.startswith("50 % of the engine steps computed more than 4096 tokens")
    below = counting(CALM, BEFORE, {"512": 100.0, "4096": 146.0, "8192": 200.0, "inf": 200.0})
    assert limit(below).what == "unattributed"
    assert limit(using(at, "engine_core", thread=90)).what == "engine_core"


def test_without_the_gpus_activity_nothing_is_blamed_but_the_load():
    blind = changed(using(CALM, "engine_core", thread=99), "gpu", None)
    assert limit(blind).what == "unattributed"
    assert "GPU activity not recorded" in limit(blind).evidence
    assert limit(changed(idle(60, load_core_share=0.8), "gpu", None)).what == "load_generator"


def test_a_trial_that_says_nothing_of_its_processes_is_unattributed():
    assert limit(changed(CALM, "cpu", [])) == ("unattributed", limit(changed(CALM, "cpu", [])).evidence)
    assert "CPU use of the engines not recorded" in limit(changed(CALM, "cpu", [])).evidence


def test_a_trial_without_a_window_has_no_limit():
    assert limited_by(raw.failed(), measure(CALM)) is None


# ---------------------------------------------------------------- steps


def test_steps_within_the_captured_sizes_are_told_from_larger_ones():
    trial = counting(raw.trial(2), BEFORE, {"512": 150.0, "4096": 160.0, "8192": 180.0, "inf": 180.0})
    shares = step_shares(trial)
    assert shares is not None
    assert (shares.steps, shares.bound_tokens) == (160.0, 512)
    assert (shares.graphed, shares.ungraphed) == (pytest.approx(0.75), pytest.approx(0.25))
    tokens = sum(
        end - start
        for engine in trial.engines
        for start, end in (
            (engine.counters_start.generation_tokens, engine.counters_end.generation_tokens),
            (engine.counters_start.prompt_tokens, engine.counters_end.prompt_tokens),
        )
    )
    assert shares.mean_tokens == pytest.approx(tokens / 160)


def test_a_capture_size_between_two_bounds_counts_by_the_lower_one():
    trial = changed(counting(CALM, BEFORE, {key: 2 * n for key, n in BEFORE.items()}), "spec.settings", raw.settings())
    smaller = changed(trial, "spec.settings.max_cudagraph_capture_size", 600)
    assert step_shares(smaller) == step_shares(trial)
    assert step_shares(changed(trial, "spec.settings.max_cudagraph_capture_size", 100)) is None


def test_steps_that_were_not_counted_have_no_shares():
    assert step_shares(CALM) is None
    assert step_shares(counting(CALM, BEFORE, BEFORE)) is None
    assert step_shares(raw.failed()) is None
    prefill = raw.trial(workload=Workload(kind="prefill", isl=1024, osl=128, concurrency=256), rate=60.0)
    assert limit(prefill).what in ("unattributed", "engine_core")
