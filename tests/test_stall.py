"""How much of the GPU's idle time is the CPU's doing, and what is said of it."""

from __future__ import annotations

import re

import msgspec
import pytest
import raw as made
from hypothesis import given
from hypothesis import strategies as st
from test_search import SETTINGS, World, by_engines

from advisor.core.measure import measure
from advisor.core.records import CpuUse
from advisor.core.stall import cpu_stall_pct
from advisor.core.tried import Tried

TRIAL = made.trial(1, mps=False)
SEEN = measure(TRIAL)
LENGTH_S = TRIAL.window[1] - TRIAL.window[0]


def with_host(raw, core: float | None, api: float | None = None):
    """The trial with threads that work for these shares of the window."""
    shares = {"engine_core": core, "api_server": api}
    rows = [
        CpuUse(role=role, engine=0, pid=1, cpu_s=share * LENGTH_S, main_thread_s=share * LENGTH_S)
        for role, share in shares.items() if share is not None
    ]  # fmt: skip
    return msgspec.structs.replace(raw, cpu=rows)


def idle(pct: float | None):
    return msgspec.structs.replace(SEEN, gpu_idle_pct=pct)


@pytest.mark.parametrize(
    ("idle_pct", "core", "api", "stall"),
    [
        (72.0, 0.95, 0.9, 67.0),  # both can only miss each other for 5 % + 28 %
        (72.0, 0.2, 0.9, 62.0),  # the API server holds the GPU up as well
        (20.0, 0.5, None, 0.0),  # they may never coincide
        (30.0, 1.0, None, 30.0),
        (0.0, 1.0, 1.0, 0.0),
    ],
)
def test_the_stall_is_what_work_and_idleness_must_share(idle_pct, core, api, stall):
    assert cpu_stall_pct(with_host(TRIAL, core, api), idle(idle_pct)) == pytest.approx(stall)


@given(st.floats(0, 100), st.floats(0, 1.02), st.none() | st.floats(0, 1.02))
def test_the_stall_is_a_part_of_the_idle_time(idle_pct, core, api):
    assert 0 <= cpu_stall_pct(with_host(TRIAL, core, api), idle(idle_pct)) <= idle_pct


def test_what_was_not_recorded_is_left_open():
    assert cpu_stall_pct(with_host(TRIAL, 0.9), idle(None)) is None
    assert cpu_stall_pct(with_host(TRIAL, None), idle(50.0)) is None
    short = msgspec.structs.replace(idle(50.0), window_s=4.9)
    assert cpu_stall_pct(with_host(TRIAL, 0.9), short) is None


class Hosted(World):
    """A machine whose host threads work for the share `busy` of every window."""

    def __init__(self, rate, *, busy: float, **rest):
        super().__init__(rate, **rest)
        self.busy = busy

    def try_out(self, spec) -> Tried:
        one = super().try_out(spec)
        raw = msgspec.structs.replace(
            one.raw, cpu=[CpuUse(role="engine_core", engine=0, pid=1, cpu_s=0.0, main_thread_s=self.busy * 15.0)]
        )
        return msgspec.structs.replace(one, raw=raw)


def reason(report) -> str:
    return next(text for text in report.recommendation.because if text.startswith("One engine"))


@given(st.floats(0, 100), st.floats(0, 1))
def test_every_number_that_is_given_as_a_reason_stands_in_the_report(idle_pct, busy):
    report = Hosted(by_engines(1000, 1500, mps=1.3), idle=idle_pct, busy=busy).profile(max_engines=2)
    figures = [report.profile.gpu_idle_pct, report.profile.cpu_stall_pct]
    known = {f"{figure.value:.0f} %" for figure in figures if figure is not None}
    assert set(re.findall(r"\d+ %", reason(report))) <= known
    assert {figure.unit for figure in figures} == {"%"}


def test_opposite_profiles_give_opposite_reasons():
    waits = Hosted(by_engines(1000, 1500, mps=1.3), idle=72.0, busy=0.95).profile()
    works = Hosted(by_engines(1000, 1010), idle=2.0, busy=0.5).profile()
    assert "at least 67 % while its own CPU threads work: others fill that" in reason(waits)
    assert "others can fill that, and gain or lose by sharing it" in reason(works)


def test_the_profile_is_that_of_the_tuned_engine():
    def rate(spec):
        return by_engines(1000, 1500)(spec) * (1.2 if spec.settings.api_server_count == 2 else 1.0)

    class Tuned(Hosted):
        def try_out(self, spec) -> Tried:
            self.idle_of = lambda one: 40.0 if one.settings.api_server_count == 2 else 70.0
            return super().try_out(spec)

    report = Tuned(rate, busy=0.9).profile()
    assert SETTINGS.api_server_count == 1 and report.profile.gpu_idle_pct.value == 40.0
    assert report.profile.cpu_stall_pct.value == pytest.approx(30.0)
