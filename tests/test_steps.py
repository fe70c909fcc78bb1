"""Fixed steps on real child processes, and what their marks say."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys

import msgspec
import pytest
import raw as made
from hypothesis import given
from hypothesis import strategies as st
from sites import assert_nothing_left, codes, live

from advisor.core.overlap import overlap, step_rate
from advisor.core.records import RawStep, Step
from advisor.core.saturation import Saturation, saturation
from advisor.core.tried import judge, slug
from advisor.shell import inside
from advisor.shell.start import Start

DECODE, PREFILL = Step(decode=8, decode_context=100), Step(prefill=2, prefill_tokens=50)


def asked(site, engines: int, *steps: Step, mps: bool = True, seconds: float = 0.5):
    return msgspec.structs.replace(site.spec(engines, mps=mps), kind="steps", steps=list(steps), step_s=seconds)


def test_every_engine_runs_every_step_and_all_begin_together(site):
    site.bench.engine_faults({"all": {"steps": {"ms_per_token": 1.0}}})
    runner, folder = live(site)
    with runner:
        runner.run(asked(site, 2, DECODE, PREFILL))
    (raw,) = folder.trials()
    assert (raw.ended, codes(raw), judge(raw).outcome) == ("completed", [], "ok")
    assert [(row.step, row.engine, row.tokens, row.sequences) for row in raw.steps] == [
        (0, 0, 8, 8), (0, 1, 8, 8), (1, 0, 100, 2), (1, 1, 100, 2),
    ]  # fmt: skip
    starts = [row.marks[0][0] for row in raw.steps]
    assert starts[0] == starts[1] < starts[2] == starts[3]
    assert slug(raw.spec) == "steps-2-engines-mps"
    assert sorted(raw.mps.clients_start) == sorted(engine.engine_core_pid for engine in raw.engines)
    # 1 ms a token and engine: 2 x 1000 tokens/s.
    assert step_rate(raw, 0).tok_per_s.value == pytest.approx(2000, rel=0.01)
    assert_nothing_left(raw)


def test_a_step_that_does_not_fit_is_refused_and_the_others_are_run(site):
    site.bench.engine_faults({"all": {"steps": {"ms_per_token": 1.0}}})
    runner, folder = live(site)
    with runner:
        runner.run(asked(site, 1, Step(prefill=1, prefill_tokens=5000), DECODE, mps=False))
    (raw,) = folder.trials()
    assert "more than the budget" in step_rate(raw, 0)
    assert step_rate(raw, 1).step_ms == pytest.approx(8.0, rel=0.01)


def test_an_extension_that_fails_ends_the_trial_with_its_error(site):
    site.bench.engine_faults({"1": {"steps": {"fails": "no attribute cudagraph_manager"}}})
    runner, folder = live(site)
    with runner:
        runner.run(asked(site, 2, DECODE))
    (raw,) = folder.trials()
    assert raw.ended == "crash" and "no attribute cudagraph_manager" in raw.detail
    assert judge(raw).outcome == "crash"
    assert_nothing_left(raw)


def test_each_step_is_traced_on_the_first_engine_when_that_is_asked_for(site):
    site.bench.engine_faults({"all": {"steps": {"ms_per_token": 1.0}}})
    runner, folder = live(site)
    with runner:
        runner.run(msgspec.structs.replace(asked(site, 2, DECODE, PREFILL), traced=2))
    (raw,) = folder.trials()
    assert [(one.step, one.engine, one.refused) for one in raw.traces] == [(0, 0, ""), (1, 0, "")]
    assert [kernel.seconds for kernel in raw.traces[1].kernels] == pytest.approx([0.1, 0.1])
    assert step_rate(raw, 0).tok_per_s.value == pytest.approx(2000, rel=0.01)
    found = saturation(raw.traces[0], DECODE, site.place.manifest.model, 132, None)
    assert isinstance(found, Saturation) and found.steps == 2


def test_a_trace_that_cannot_be_taken_leaves_the_rates_as_they_are(site):
    site.bench.engine_faults({"all": {"steps": {"ms_per_token": 1.0, "trace_fails": "CUPTI is taken"}}})
    runner, folder = live(site)
    with runner:
        runner.run(msgspec.structs.replace(asked(site, 1, DECODE, mps=False), traced=2))
    (raw,) = folder.trials()
    assert saturation(raw.traces[0], DECODE, site.place.manifest.model, 132, None) == "CUPTI is taken"
    assert raw.ended == "completed" and step_rate(raw, 0).step_ms > 0


def test_the_development_endpoint_is_open_for_such_trials_only(site):
    def launched(spec):
        (launch,) = Start(site.place, site.nvml, spec)._launches({})
        return "--worker-extension-cls" in launch.argv, launch.environment.get("VLLM_SERVER_DEV_MODE")

    assert launched(site.spec(1, mps=False)) == (False, None)
    assert launched(asked(site, 1, DECODE, mps=False)) == (True, "1")


def test_what_runs_inside_vllm_needs_nothing_of_ours():
    tree = ast.parse(inspect.getsource(inside))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported <= {"torch", "vllm", *sys.stdlib_module_names}


# ---------------------------------------------------------------- rates


def trial(*marks: list[tuple[float, int]], tokens: int = 10, **row):

    rows = [
        RawStep(step=0, engine=number, tokens=tokens, graphed=True, marks=one, **row)
        for number, one in enumerate(marks)
    ]
    base = made.trial(len(marks))
    return msgspec.structs.replace(base, spec=msgspec.structs.replace(base.spec, kind="steps"), steps=rows)


def even(rate: float, start: float = 0.0, seconds: float = 4.0, every: int = 5) -> list[tuple[float, int]]:
    return [(start + number * every / rate, number * every) for number in range(int(seconds * rate / every) + 1)]


@given(st.lists(st.floats(20.0, 500.0), min_size=1, max_size=4), st.floats(0.0, 1.0))
def test_the_rates_of_engines_add_up_over_the_time_that_they_share(rates, late):
    marks = [even(rate, start=late if number else 0.0) for number, rate in enumerate(rates)]
    found = step_rate(trial(*marks), 0)
    assert found.tok_per_s.value == pytest.approx(10 * sum(rates), rel=1e-6)
    assert found.step_ms == pytest.approx(1000 * len(rates) / sum(rates), rel=1e-6)


def test_the_first_batch_which_began_before_the_others_did_is_left_out():
    slow = [(0.0, 0), (2.0, 1), *[(2.0 + n / 10, 1 + 5 * n) for n in range(1, 40)]]
    assert step_rate(trial(slow), 0).tok_per_s.value == pytest.approx(500.0, rel=1e-6)


def test_few_marks_make_few_blocks():
    rough = step_rate(trial(even(50.0)[:13]), 0)
    assert rough.mean.dof == 3 and step_rate(trial(even(50.0)), 0).mean.dof == 7


def test_two_engines_that_take_turns_overlap_nothing_and_two_that_do_not_double():
    alone = step_rate(trial(even(100.0)), 0)
    assert overlap(step_rate(trial(even(50.0), even(50.0)), 0), alone).value == pytest.approx(1.0)
    assert overlap(step_rate(trial(even(100.0), even(100.0)), 0), alone).value == pytest.approx(2.0)


def test_steps_that_swing_give_a_wide_interval():
    def swinging():
        at = 0.0
        for number in itertools.count():
            yield at, 5 * number
            at += 0.05 if at % 1.0 < 0.5 else 0.15

    rough = step_rate(trial(list(itertools.islice(swinging(), 40))), 0).tok_per_s
    calm = step_rate(trial(even(50.0)), 0).tok_per_s
    assert rough.high / rough.low > 1.1 > 1.001 > calm.high / calm.low


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (trial(even(50.0), even(50.0, start=100.0)), "at the same time"),
        (trial([(0.0, 0), (1.0, 5)]), "often enough"),
        (trial([(float(n), 0) for n in range(30)]), "stood still"),
        (trial(even(50.0), refused="no room"), "no room"),
    ],
)
def test_what_gives_no_rate_says_why(broken, why):
    assert why in step_rate(broken, 0)


def test_a_step_that_an_engine_did_not_run_gives_no_rate():
    two = trial(even(50.0), even(50.0))
    assert "1 of 2 engines" in step_rate(msgspec.structs.replace(two, steps=two.steps[:1]), 0)


def test_a_step_for_which_the_gpu_waited_for_python_has_no_rate():
    rows = trial(even(50.0))
    step = msgspec.structs.replace(rows.steps[0], graphed=False, detail="no graph fits")
    launched = msgspec.structs.replace(rows, steps=[step])
    assert step_rate(rows, 0).step_ms > 0
    assert step_rate(launched, 0) == "the GPU waited for Python: no graph fits"
