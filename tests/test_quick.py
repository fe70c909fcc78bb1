"""The fast protocol on machines made up of rules: what it asks for, what it leaves out, and what it concludes."""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import pytest
from test_search import MACHINE, World, by_engines, made

from advisor.core import tuning
from advisor.core.estimate import ASSUMED, assumed, half_width
from advisor.core.quick import Quick
from advisor.core.recommend import conclude
from advisor.core.records import FAST, NumericsResult, RawNumerics
from advisor.core.starts import same_start
from advisor.core.tried import key


class Machine(World):
    """Percentages are right or wrong by `wrong`; log-probabilities are alike everywhere."""

    wrong: tuple[int, ...] = ()

    def try_out(self, spec):
        if spec.kind != "numerics":
            one = super().try_out(spec)
            engines = [
                msgspec.structs.replace(engine(), engine=number, prompt_logprobs=[[-1.0, -2.0]])
                for number in range(spec.engines)
            ]
            return msgspec.structs.replace(one, raw=msgspec.structs.replace(one.raw, engines=engines))
        one = super().try_out(msgspec.structs.replace(spec, kind="steps"))
        rows = [
            NumericsResult(
                percentage=percentage, sms=percentage * 132 // 100, product=product, rows=1, columns=64, inner=64,
                worst_error=0.5 if percentage in self.wrong else 0.001, unstable=False,
            )
            for percentage in spec.percentages for product in ("qkv", "o", "gate_up", "down", "lm_head")
        ]  # fmt: skip
        raw = msgspec.structs.replace(one.raw, spec=spec, numerics=RawNumerics(results=rows, failed={}, seconds=1.0))
        return msgspec.structs.replace(one, spec=spec, raw=raw)

    def fast(self, **changes):
        manifest = msgspec.structs.replace(made(protocol=FAST, **changes), gpu=self.gpu)
        manifest = msgspec.structs.replace(
            manifest, settings=msgspec.structs.replace(manifest.settings, load_format="auto")
        )
        tried, story = [], Quick(manifest).story()
        spec = next(story)
        try:
            while True:
                tried.append(self.try_out(spec))
                spec = story.send(tried[-1])
        except StopIteration as end:
            return conclude(manifest, tried, end.value, created="", replayed=False)

    def shape(self):
        return [(s.engines, s.idle_engines, s.mps, s.thread_percentage) for s in self.asked if s.kind == "load"]

    def starts(self) -> int:
        loads = [spec for spec in self.asked if spec.kind == "load"]
        return 1 + sum(not same_start(one, other) for one, other in pairwise(loads))


def engine():
    from advisor.core.records import RawEngine

    return RawEngine(
        engine=0, port=1, api_server_pid=None, engine_core_pid=None, ready_s=1.0, kv_cache_tokens=None,
        num_gpu_blocks=None, block_size=None, resolved={}, counters_start=None, counters_end=None, prompt_logprobs=[],
        exit_code=None, died_s=None, log_tail=[],
    )  # fmt: skip


SMALL = by_engines(1000, 1900, 2300, 2400, mps=1.25)


def test_a_small_model_takes_two_starts_and_as_many_engines_as_its_idle_gpu_asks_for():
    world = Machine(SMALL, idle=71.0)
    report = world.fast()
    assert world.shape() == [(1, 3, False, None), (4, 0, False, None), (4, 0, True, None)]
    assert world.starts() == 2
    told = report.recommendation
    assert (told.status, told.engines, told.mps) == ("recommend", 4, True)
    assert told.gain_vs_best_without_mps.value == pytest.approx(1.25)


def test_the_largest_percentage_that_computes_correctly_is_tried_at_once():
    world = Machine(lambda spec: SMALL(spec) * (1.1 if spec.thread_percentage else 1.0), idle=71.0)
    report = world.fast(thread_percentages="auto")
    assert world.shape()[-1] == (4, 0, True, 50) and world.starts() == 2
    assert report.recommendation.thread_percentages == [50] * 4
    # MPS and percentages are one step of the credit, and all steps multiply to the gain.
    steps = {one.step: one.factor.value for one in report.waterfall}
    assert set(steps) == {"engines", "mps"}
    assert math.prod(steps.values()) == pytest.approx(report.recommendation.gain_vs_default.value)
    whys = [one.why_not for one in report.candidates if one.outcome == "skipped"]
    assert any("37" not in why and "tries 50 % at once" in why for why in whys)


def test_a_percentage_that_computes_wrongly_is_not_tried_and_one_that_does_not_takes_its_place():
    world = Machine(SMALL, idle=71.0)
    world.wrong = (50,)
    report = world.fast(thread_percentages="auto")
    assert world.shape()[-1] == (4, 0, True, 37)
    assert [one.outcome for one in report.candidates if one.thread_percentages == [50] * 4] == ["wrong_results"]
    world = Machine(SMALL, idle=71.0)
    world.wrong = (37, 50)
    world.fast(thread_percentages="auto")
    assert world.shape()[-1] == (4, 0, True, None)


def test_a_gpu_that_one_engine_keeps_busy_gets_a_second_one_and_no_more():
    world = Machine(by_engines(1000, 1010, 1015, mps=1.02), idle=5.0)
    world.idle_of = lambda spec: 5.0 if spec.engines == 1 else 0.5
    report = world.fast(thread_percentages="auto")
    assert [shape for shape in world.shape() if shape[0] > 1] == [(2, 2, False, None), (2, 0, True, None)]
    told = report.recommendation
    assert (told.status, told.engines, told.mps) == ("recommend", 1, False)


def test_one_more_is_tried_without_mps_while_the_gpu_still_waits():
    world = Machine(by_engines(1000, 1500, 1700, 1710, mps=1.2), idle=45.0)
    world.idle_of = lambda spec: {1: 45.0, 2: 20.0}.get(spec.engines, 1.0)
    world.fast()
    assert [shape[0] for shape in world.shape() if not shape[2]][:3] == [1, 2, 3]


def test_mps_is_tried_with_no_more_engines_than_were_measured_without_it():
    for two in (1.5, 30.0):
        world = Machine(by_engines(1000, 1500, 1950, 2000), idle=45.0)
        world.idle_of = lambda spec, two=two: {1: 45.0, 2: two}.get(spec.engines, 1.0)
        for load in (256, 2048):
            world.asked.clear()
            told = world.fast(concurrency=load).recommendation
            assert {shape[0] for shape in world.shape() if shape[2]} <= {s[0] for s in world.shape() if not s[2]}
            assert not told.mps


def test_a_small_listed_percentage_does_not_stand_for_mps():
    world = Machine(lambda spec: SMALL(spec) * (0.4 if spec.thread_percentage else 1.0), idle=71.0)
    told = world.fast(thread_percentages=[10]).recommendation
    assert told.mps and told.thread_percentages is None


def test_mps_that_ran_out_of_memory_is_no_verdict_against_it():
    class Full(Machine):
        def try_out(self, spec):
            one = super().try_out(spec)
            if not spec.mps:
                return one
            return msgspec.structs.replace(one, outcome="oom", measurement=None, why="out of memory")

    assert Full(SMALL, idle=71.0).fast().recommendation.status == "inconclusive"


def test_a_setting_is_tried_unless_several_engines_are_beyond_it():
    world = Machine(by_engines(1000, 1100, mps=1.2), idle=40.0)
    report = world.fast()
    changed = [s for s in world.asked if s.engines == 1 and tuning.bare(s.settings) != tuning.bare(made().settings)]
    assert len(changed) == 1
    assert all(one.source is None for one in report.candidates if one.outcome == "skipped")
    world = Machine(SMALL, idle=71.0)
    report = world.fast()
    assert any("2.4 times what one does" in (one.why_not or "") for one in report.candidates)


def test_a_large_model_that_fits_only_once_with_all_its_requests_is_started_by_itself():
    world = Machine(by_engines(1000, 1010, mps=1.02), idle=5.0)
    world.gpu = msgspec.structs.replace(MACHINE.gpu, memory_total_bytes=18 << 30)
    world.fast()
    assert world.shape()[0] == (1, 0, False, None)


def test_every_interval_says_that_starts_were_assumed_to_differ():
    report = Machine(SMALL, idle=71.0).fast()
    single = next(one for one in report.candidates if one.engines == 1 and one.outcome == "ok")
    several = next(one for one in report.candidates if one.engines == 4 and one.outcome == "ok")
    # The windows of this machine are all alike: what is left is what starts are taken to differ by.
    assert half_width(single.throughput_tok_per_s) == pytest.approx(0.121, abs=0.003)
    assert half_width(several.throughput_tok_per_s) == pytest.approx(0.0053, abs=0.0003)
    assert [one.code for one in report.warnings if one.code == "single_starts"]
    assert "0.3 %, 4.5 %, 6.8 %" in next(one.text for one in report.warnings if one.code == "single_starts")


def test_what_is_not_known_to_be_busy_is_taken_to_differ_most():
    assert assumed(None) is ASSUMED[-1] and assumed(2.0) is ASSUMED[0] and assumed(2.1) is ASSUMED[1]


def test_what_single_starts_cannot_tell_apart_is_a_tie_that_the_report_names():
    world = Machine(by_engines(1000, 1020, mps=1.0), idle=20.0)
    report = world.fast()
    told = report.recommendation
    assert (told.status, told.engines, told.mps) == ("recommend", 1, False)
    assert any("not told apart by single starts; the simpler is advised" in reason for reason in told.because)


def test_objectives_are_looked_at_in_the_same_starts():
    world = Machine(SMALL, idle=71.0, itl_ms=lambda spec: spec.workload.concurrency / 8)
    report = world.fast(slo={"itl_p95": 20.0})
    assert world.starts() == 2
    told = report.recommendation
    assert told.concurrency == 128 and told.engines == 4
    assert len({key(spec) for spec in world.asked}) == len(world.asked)


def test_one_engine_at_most_asks_for_one_start():
    world = Machine(SMALL, idle=5.0)
    report = world.fast(max_engines=1)
    assert world.shape()[0] == (1, 0, False, None)
    assert {one.why_not for one in report.candidates if one.engines == 2} == {"--max-engines is 1"}
