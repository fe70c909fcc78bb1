"""The dry run: which trials, how long, and that it says these are estimates."""

from __future__ import annotations

import io
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from test_terminal import SETTINGS, report

from advisor.core.cores import most_engines
from advisor.core.plan import total_s, trial_plan
from advisor.core.records import (
    FULL,
    Manifest,
    Measurement,
    NumericsResult,
    Protocol,
    Question,
    RawNumerics,
    RawTrial,
    Value,
    Workload,
)
from advisor.core.search import Search
from advisor.core.tried import Tried
from advisor.report.plan import as_dict, render

MODEL = report().model
MEMORY = ["one engine fits on NVIDIA H200: 0.9 weights + 3.1 buffers + 4.0 KV cache = 8.0 GiB each, 8.0 of 128.6 GiB"]


def question(kind="serve", isl=1024, osl=128, concurrency=256, max_engines=4, thread_percentages="auto"):
    workload = Workload(kind=kind, isl=isl, osl=osl, concurrency=concurrency)
    return Question(workload=workload, max_engines=max_engines, thread_percentages=thread_percentages, min_gain=0.1)


def plan(asked=None, memory=16, cores=6, **more):
    return trial_plan(asked or question(), MODEL, memory, cores, **more)


def shape(trials):
    return [(trial.kind, trial.engines, trial.mps, trial.thread_percentage, trial.certain) for trial in trials]


def screen(trials, memory=MEMORY, width=80):
    file = io.StringIO()
    render(trials, memory, Console(file=file, width=width))
    return file.getvalue()


def test_the_plan_tells_the_trials_in_the_order_of_the_search():
    assert shape(plan()) == [
        ("load", 1, False, None, True),
        ("load", 2, False, None, True),
        ("load", 2, True, None, True),
        ("load", 3, True, None, False),
        ("load", 4, True, None, False),
        ("load", None, False, None, False),
        ("numerics", None, True, None, True),
        ("load", None, True, None, False),
        ("load", None, True, None, False),
        ("load", None, True, None, False),
        ("load", 1, True, None, True),
    ]


def walk(manifest, rates):
    """The trials that the search asks for when N engines under MPS give `rates[N]` and all products are right."""
    search = Search(manifest).story()
    asked = [next(search)]
    try:
        while True:
            asked.append(search.send(judged(asked[-1], rates)))
    except StopIteration:
        return asked


def judged(spec, rates):
    """A trial that ended well, with nothing in it but what the search reads."""
    rate = rates[spec.engines] if spec.mps else rates[1]
    checked = [
        NumericsResult(
            percentage=share, sms=66, product="qkv", rows=1, columns=1, inner=1, worst_error=0.0, unstable=False
        )
        for share in spec.percentages
    ]
    raw = RawTrial(
        schema_version=1, spec=spec, created="", ended="completed", detail="", gpu_uuid="", window=None, engines=[],
        loads=[], cpu=[], steal_s=None, gpu=None, mps=None, foreign_pids=[], teardown=None,
        numerics=RawNumerics(results=checked, failed={}, seconds=1.0), timeline=[],
    )  # fmt: skip
    measurement = Measurement(
        throughput_tok_per_s=Value(value=rate), requests_per_s=1.0, blocks_tok_per_s=[rate] * 3, log_mean=0.0,
        log_se=0.0, dof=2, turnovers=3.0, window_s=12.0, ttft_ms=None, itl_ms=None, e2e_ms=None, sm_active_pct=None,
        gpu_idle_pct=None, tokens_per_joule=None, power_w=None, load_cpu_pct=None, engine_core_cpu_pct=None,
        api_server_cpu_pct=None,
    )  # fmt: skip
    return Tried(spec=spec, raw=raw, outcome="ok", measurement=measurement, why="", cautions=[])


@pytest.mark.parametrize("percentages", ["auto", "none", [40]])
@pytest.mark.parametrize("max_engines", [1, 2, 4, 16])
@pytest.mark.parametrize("growth", [0.9, 1.5])
def test_what_the_search_asks_for_was_planned(growth, max_engines, percentages):
    asked = question(max_engines=max_engines, thread_percentages=percentages)
    whole = report()
    manifest = Manifest(
        schema_version=1, created="", question=asked, protocol=whole.protocol, model=MODEL, gpu=whole.gpu,
        host=whole.host, software=whole.software, settings=SETTINGS,
    )  # fmt: skip
    walked = walk(manifest, [growth**engines for engines in range(20)])
    planned = plan(asked, memory=16, cores=most_engines(whole.host.cores))
    certain = [(trial.kind, trial.engines, trial.mps) for trial in planned if trial.certain]
    for spec in walked:
        match = next(
            trial
            for trial in planned
            if (trial.kind, trial.mps) == (spec.kind, spec.mps)
            and (spec.kind == "numerics" or trial.engines in (spec.engines, None))
            and (trial.thread_percentage == spec.thread_percentage or trial.engines is None)
        )
        planned.remove(match)
    asked_for = [(spec.kind, None if spec.kind == "numerics" else spec.engines, spec.mps) for spec in walked]
    assert [trial for trial in certain if trial not in asked_for] == []
    if growth > 1:
        assert planned == []


def test_with_room_for_two_engines_their_percentages_are_known_and_100_is_none():
    trials = plan(question(max_engines=2))
    assert [trial.thread_percentage for trial in trials if trial.thread_percentage] == [50, 75]
    assert all(trial.engines for trial in trials if trial.kind == "load")


def test_percentages_that_were_asked_for_are_planned_once_each():
    trials = plan(question(thread_percentages=[60, 40, 60, 100]))
    assert [trial.thread_percentage for trial in trials if trial.thread_percentage] == [40, 60]


def test_without_percentages_there_is_no_numerics_check():
    assert {trial.kind for trial in plan(question(thread_percentages="none"))} == {"load"}
    assert {trial.kind for trial in plan(question(thread_percentages=[100]))} == {"load"}


def test_a_quantised_model_gets_no_percentages():
    model = msgspec.structs.replace(MODEL, quantization="fp8")
    assert {trial.kind for trial in trial_plan(question(), model, 8, 8)} == {"load"}


@pytest.mark.parametrize(
    "limits",
    [{"memory": 1}, {"cores": 1}, {"asked": question(max_engines=1)}, {"asked": question(concurrency=1)}],
)
def test_where_two_do_not_fit_one_engine_is_tried_with_and_without_mps(limits):
    assert shape(plan(**limits)) == [("load", 1, False, None, True), ("load", 1, True, None, True)]


@pytest.mark.parametrize("limits", [{"memory": 0}, {"cores": 0}])
def test_where_not_one_fits_nothing_is_planned(limits):
    assert plan(**limits) == []
    assert "Nothing to run" in screen(plan(**limits))


def test_only_the_first_start_is_a_cold_one():
    first, *later = [trial for trial in plan() if trial.kind == "load"]
    assert all(first.estimated_s_high > trial.estimated_s_high for trial in later)


def test_a_longer_window_makes_a_longer_plan():
    longer = plan(protocol=Protocol(measure_min_s=100.0))
    assert total_s(longer)[0] >= total_s(plan())[0] + 4 * 80.0


def test_a_bigger_model_is_given_more_time():
    bigger = msgspec.structs.replace(MODEL, hidden_size=3584, intermediate_size=18944, heads=28)
    assert total_s(trial_plan(question(), bigger, 8, 8))[1] > total_s(trial_plan(question(), MODEL, 8, 8))[1]


@given(
    st.builds(
        question,
        kind=st.sampled_from(["serve", "prefill", "decode"]),
        isl=st.integers(1, 131072),
        osl=st.integers(1, 4096),
        concurrency=st.integers(1, 4096),
        max_engines=st.integers(1, 64),
        thread_percentages=st.sampled_from(["auto", "none"]) | st.lists(st.integers(1, 100), max_size=4),
    ),
    st.integers(0, 64),
    st.integers(0, 64),
)
@settings(max_examples=60, deadline=None)
def test_no_plan_exceeds_a_limit_and_its_times_are_ranges(asked, memory, cores):
    trials = plan(asked, memory, cores)
    most = min(memory, cores, asked.max_engines, asked.workload.concurrency, 48)
    assert max((trial.engines for trial in trials if trial.engines), default=0) == most
    assert all(0 < trial.estimated_s_low < trial.estimated_s_high for trial in trials)
    longest_window_s = 2 * Protocol().window_max_s
    if asked.workload.kind != "decode":
        assert all(trial.estimated_s_high <= 120 + longest_window_s + 10 for trial in trials)
    low, high = total_s(trials)
    assert low <= high
    assert all(cell_len(line) <= 80 for line in screen(trials).splitlines())


def test_trials_that_are_alike_stand_in_one_row():
    trials = plan(protocol=msgspec.structs.replace(FULL, more_starts=6))
    text = " ".join(screen(trials).split())
    assert text.count("another start of what is known too roughly") == 1
    assert "MPS or without (6 times, minutes each)" in text
    assert f" to {len(trials)} trials, about " in text


def test_the_table_shows_every_trial_its_time_and_the_memory_sums():
    text = screen(plan())
    assert text.startswith("5 to 11 trials, about ")
    assert "not even one" not in text
    for trial in plan():
        assert trial.purpose in " ".join(text.split())
    assert MEMORY[0] in " ".join(text.split())
    assert "estimates" in text


def test_the_json_holds_what_the_table_says():
    data = json.loads(json.dumps(as_dict(plan(), MEMORY)))
    assert (data["trials_least"], data["trials_most"]) == (5, 11)
    assert data["memory"] == MEMORY
    assert 0 < data["estimated_minutes_low"] < data["estimated_minutes_high"]
    assert "estimates" in data["note"]
    assert data["trials"][0] == msgspec.to_builtins(plan()[0])
    text = screen(plan()).splitlines()[0]
    assert f"{data['estimated_minutes_low']:.0f} to {data['estimated_minutes_high']:.0f} minutes" in text
