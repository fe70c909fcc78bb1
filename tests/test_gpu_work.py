"""How a gain divides into the GPU's part and the host's, and what the report says of it."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console
from test_search import World, by_engines

from advisor import flow
from advisor.core.candidates import Field
from advisor.core.contenders import contenders
from advisor.core.gpu_work import GpuWork, gpu_work
from advisor.core.outline import Outline
from advisor.core.overlap import rate_alone
from advisor.core.records import FULL, Profile, Step, Workload
from advisor.core.specs import fixed_steps
from advisor.core.tried import judge
from advisor.core.wording import of_the_gpu
from advisor.report.terminal import render
from advisor.shell.replay import Replay
from advisor.shell.store import RunFolder

DATA = Path(__file__).parents[1] / "data"
STUDIES = DATA / "studies"
SERVE = Workload(kind="serve", isl=1024, osl=128, concurrency=256)


def alone(factor: float):
    """Machines whose GPU gives several engines `factor` of what it gives one."""
    return lambda spec, step: (60_000.0 if step.decode else 500_000.0) * (factor if spec.engines > 1 else 1.0)


def profiled(factor: float, *rates: float, mps: float = 1.3, **question):
    world = World(by_engines(*(rates or (1000, 1500))), noise=0.002)
    world.rate = by_engines(*(rates or (1000, 1500)), mps=mps)
    world.alone = alone(factor)
    return world, world.profile(**question)


def test_the_tuned_engine_and_the_best_several_run_fixed_steps_last_and_once():
    world, _ = profiled(1.0)
    steps = [spec for spec in world.asked if spec.kind == "steps"]
    assert [(spec.engines, spec.mps, spec.traced) for spec in steps] == [(1, False, 3), (2, False, 0), (2, True, 0)]
    assert world.asked[-3:] == steps
    assert all(spec.settings.api_server_count == 1 for spec in steps)


def test_older_protocols_and_lone_engines_have_no_fixed_steps():
    world = World(by_engines(1000, 1500, mps=1.3))
    report = world.profile(protocol=msgspec.structs.replace(FULL, gpu_alone=False))
    assert all(spec.kind == "load" for spec in world.asked)
    assert report.profile.overlap is None and report.profile.overlaps == []
    single = World(by_engines(1000))
    single.profile(max_engines=1)
    assert all(spec.kind == "load" for spec in single.asked)


def test_the_gain_is_overlap_times_host():
    _, report = profiled(0.8)
    told = report.recommendation
    assert (told.engines, told.mps) == (2, True)
    assert report.profile.overlap.value == pytest.approx(0.8, rel=1e-3)
    assert report.profile.overlap.value * report.profile.host.value == pytest.approx(told.gain_vs_tuned.value, rel=1e-6)
    # The host's part is known no better than the gain is.
    host = report.profile.host
    assert math.log(host.high / host.low) >= math.log(told.gain_vs_tuned.high / told.gain_vs_tuned.low) * 0.99
    without, under = report.profile.overlaps
    assert (without.mps, under.mps) == (False, True) and report.profile.overlap == under.overlap


def test_how_much_busier_the_gpu_is_is_told_only_where_it_was_measured():
    def told(idle):
        world = World(by_engines(1000, 1500, mps=1.3), noise=0.002)
        world.alone, world.idle_of = alone(0.8), lambda spec: idle if spec.engines == 1 else 2.0
        report = world.profile()
        return report.profile.overlaps[-1], " ".join(report.recommendation.because)

    one, text = told(idle=51.0)
    assert one.busy.value == pytest.approx(98 / 49) and one.overlap.value == pytest.approx(0.8, rel=1e-3)
    assert one.rest.value == pytest.approx(1500 * 1.3 / 1000 / 0.8 / 2, rel=0.01)
    assert "the GPU is busy 2.00×" in text
    one, text = told(idle=None)
    assert (one.busy, one.rest) == (None, None) and one.host is not None
    assert "The rest of the gain, the host's with phases that overlap, is 2.44×" in text


def test_opposite_profiles_give_opposite_reasons():
    overlapping, losing = (" ".join(profiled(factor)[1].recommendation.because) for factor in (1.25, 0.75))
    assert "their kernels overlap" in overlapping and "smaller batches cost more" not in overlapping
    assert "smaller batches cost more than overlap brings" in losing and "their kernels overlap" not in losing


def test_a_request_takes_its_prompt_and_all_but_its_first_token():
    _, report = profiled(1.0)
    seconds = 1024 / 500_000 + 127 / 60_000
    assert report.profile.gpu_throughput.value == pytest.approx(128 / seconds, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "tokens"), [("prefill", 1024 / 500_000), ("decode", 1 / 60_000)]
)  # fmt: skip
def test_a_workload_of_one_sort_has_steps_of_one_sort(kind, tokens):
    world, _ = profiled(1.0)
    workload = msgspec.structs.replace(SERVE, kind=kind, osl=1 if kind == "prefill" else 128)
    spec = next(spec for spec in world.asked if spec.kind == "steps")
    steps = fixed_steps(workload, 1, spec.settings)
    (step,) = steps
    assert bool(step.decode) == (kind == "decode")
    raw = world.try_out(msgspec.structs.replace(spec, steps=steps)).raw
    assert math.exp(-rate_alone(raw, workload).log_mean) == pytest.approx(tokens, rel=1e-3)


def test_each_engine_decodes_its_share_half_way_through_its_outputs():
    settings = World(by_engines(1000)).profile(max_engines=1).recommendation.settings
    assert fixed_steps(SERVE, 4, settings) == [
        Step(decode=64, decode_context=1024 + 64), Step(prefill=8, prefill_tokens=1024),
    ]  # fmt: skip
    assert fixed_steps(msgspec.structs.replace(SERVE, isl=20000), 1, settings)[1] == Step(
        prefill=1, prefill_tokens=settings.max_num_batched_tokens, prefill_context=5904
    )


def test_steps_that_fail_leave_the_verdict_as_it_is():
    world = World(by_engines(1000, 1500, mps=1.3), fails=[lambda spec: spec.kind == "steps"])
    report = world.profile()
    assert report.recommendation.mps and report.profile.overlap is None
    told = [one.text for one in report.warnings if one.code == "not_measured"]
    assert [text.partition(" could")[0] for text in told] == [
        "steps-1-engine-no-mps", "steps-2-engines-no-mps", "steps-2-engines-mps",
    ]  # fmt: skip
    assert all("no verdict rests on it" in text for text in told)


def of_the_recorded_run() -> GpuWork:
    loads = RunFolder(STUDIES / "h200-qwen2.5-0.5b-serve-1024-call-1")
    judged = [judge(raw) for raw in loads.trials() if raw.spec.kind == "load"]
    tuned = next(one.spec.settings for one in judged if one.spec.settings.api_server_count == 2)
    outline = Outline(concurrency=256, tuned=tuned, several=tuned, shown_by=2, left_out=[])
    steps = [judge(raw) for raw in RunFolder(STUDIES / "h200-qwen2.5-0.5b-steps-1024").trials()]
    return gpu_work(Field(loads.manifest(), outline, contenders(judged, 256, {})), steps, "tokens/s")


def test_on_an_h200_four_small_engines_lose_on_the_gpu_and_the_host_makes_up_for_it():
    found = of_the_recorded_run()
    assert found.throughput.value == pytest.approx(43_240, rel=0.01)
    four = next(one for one in found.overlaps if one.engines == 4)
    assert four.overlap.high < 0.75 and four.host.low > 2.3
    assert list(found.decode.kernels)[:2] == ["attention", "mlp"] and found.decode.why is None
    assert found.decode.kernels["attention"].share.value == pytest.approx(53.5, abs=0.5)
    assert found.prefill.kernels["mlp"].of_roofline.value == pytest.approx(88.6, abs=1)
    for step in (found.decode, found.prefill):
        assert sum(part.share.value for part in step.kernels.values()) == pytest.approx(100)


@pytest.mark.parametrize(("model", "rest"), [("0.5b", 0.95), ("3b", 1.04)])
def test_on_an_h200_overlap_and_a_busier_gpu_nearly_make_the_gain(model, rest):
    run = RunFolder(DATA / f"h200-qwen2.5-{model}-serve-1024-call-2")
    report = flow.profile(run.manifest(), Replay(run), created="", replayed=True)
    without, under = report.profile.overlaps
    assert (without.mps, under.mps) == (False, True)
    for one in (without, under):
        assert one.rest.value == pytest.approx(rest, abs=0.01) and one.rest.low > 0.88 and one.rest.high < 1.08
        assert one.busy.value * one.rest.value == pytest.approx(one.host.value, rel=1e-6)
        assert one.busy.low > 1.0  # several leave the GPU less time to wait
    told = " ".join(report.recommendation.because)
    assert f"{rest:.2f}× (" in told and "is neither, for steps under load are not those alone" in told
    gained = next(one for one in report.candidates if (one.engines, one.mps, one.starts) == (under.engines, True, 4))
    assert under.overlap.value * under.busy.value * under.rest.value == pytest.approx(
        gained.gain_vs_tuned.value, rel=1e-6
    )


def test_the_screen_shows_where_the_time_of_a_step_goes_in_80_columns():
    found = of_the_recorded_run()
    _, plain = profiled(1.0)
    shown = msgspec.structs.replace(plain, profile=Profile(decode=found.decode, prefill=found.prefill))
    console = Console(file=io.StringIO(), width=80)
    render(shown, console)
    text = console.file.getvalue()
    at = text.index("Where the GPU's time goes")
    rows = text[at : text.index("\n\n", at)].splitlines()
    assert max(map(len, rows)) <= 80
    assert "256 decode at 1,024" in rows[1] and "8 prompts of 1,024" in rows[1]
    assert rows[2].split() == ["a", "step", "2.45", "ms", "13.96", "ms"]
    assert rows[3].split()[:3] == ["attention", "54", "%"] and "57 % of its roofline" in rows[3]
    silent = Console(file=io.StringIO(), width=80)
    render(msgspec.structs.replace(plain, profile=None), silent)
    assert "Where the GPU's time goes" not in silent.file.getvalue()


def figures(told) -> set[float]:
    """Every number in a report, and what its texts may make of it: thresholds and counts."""
    if isinstance(told, dict):
        return set().union(*map(figures, told.values()), set())
    if isinstance(told, list):
        return set().union(*map(figures, told), set())
    return {float(told)} if isinstance(told, int | float) and not isinstance(told, bool) else set()


def made_up(text: str, known: set[float]) -> list[str]:
    """The numbers in a text that are none of those known, rounded as they are written."""
    found = []
    for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text):
        value, digits = float(number.replace(",", "")), len(number.partition(".")[2])
        if not any(abs(one - value) <= 0.5 * 10**-digits + 1e-9 for one in known):
            found.append(number)
    return found


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    factor=st.floats(0.5, 1.6),
    second=st.floats(0.8, 2.0),
    mps=st.floats(0.8, 1.6),
    idle=st.floats(0.0, 90.0),
)
def test_every_number_in_a_reason_is_a_figure_of_the_report(factor, second, mps, idle):
    world = World(by_engines(1013, 1013 * second, mps=mps), noise=0.004, idle=idle)
    world.alone = alone(factor)
    report = world.profile()
    known = figures(msgspec.to_builtins(report)) | {1 + report.question.min_gain, 3.0}  # 3 %: the rule, not a figure
    for text in [report.recommendation.sentence, *report.recommendation.because]:
        assert not made_up(text, known), text


def test_every_number_about_kernels_is_a_figure_of_the_profile():
    found = of_the_recorded_run()
    profile = Profile(decode=found.decode, prefill=found.prefill, overlaps=list(found.overlaps))
    reasons = of_the_gpu(profile)
    assert len(reasons) == 5
    for text in reasons:
        assert not made_up(text.replace("0.5B", ""), figures(msgspec.to_builtins(profile))), text
