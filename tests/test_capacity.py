"""GPUs for a demand: the sums, their intervals, what is refused, and the example in the documentation."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from test_terminal import advice, measured, report

from advisor.core.capacity import DEFAULT_HEADROOM, Asked, Demand, plan, read_demand, read_price
from advisor.core.errors import BadQuestion, DamagedRecord, NoHonestAnswer
from advisor.core.records import CurvePoint, Percentiles, Value
from advisor.report.as_json import dumps, loads
from advisor.report.capacity import as_json, lines

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "data" / "h200-qwen2.5-0.5b-serve-1024-call-2" / "report.json"
EARLIER = ROOT / "data" / "h200-qwen2.5-0.5b-serve-1024" / "report.json"
LARGE = ROOT / "data" / "h200-qwen2.5-3b-serve-1024-call-2" / "report.json"
PREFILL = ROOT / "data" / "h200-qwen2.5-0.5b-prefill-1024" / "report.json"
SHIPPED = sorted(set((ROOT / "data").glob("*/report.json")) - set((ROOT / "data").glob("*-ablate/*")))
ONE = Value(value=1.0, low=1.0, high=1.0)


def read(path):
    return loads(path.read_bytes(), str(path))


def rate(value, spread=0.02):
    return Value(value=value, low=value / (1 + spread), high=value * (1 + spread))


def invented(advised=20000.0, tuned=10000.0, default=8000.0, spread=0.02, **more):
    """A report that advises four engines under MPS over a tuned and a default one. Its figures are invented."""
    first = measured(1, False, default, throughput_tok_per_s=rate(default, spread), gain_vs_default=ONE)
    second = measured(1, False, tuned, throughput_tok_per_s=rate(tuned, spread), gain_vs_tuned=ONE)
    four = measured(4, True, advised, **{"throughput_tok_per_s": rate(advised, spread), **more})
    return report(candidates=[first, second, four], recommendation=advice())


def tokens(per_s):
    return Demand(counted="tokens", per_s=per_s, text=f"{per_s:g} tokens/s")


def planned(one, demand, headroom=0.3, price=None, slo=None):
    return plan([Asked(source="r.json", report=one, demand=demand, gpu_hour=price)], headroom, slo or {})


def bill(found, role, service=0):
    return next(way.bill for way in found.services[service].ways if role in way.roles)


def counts(found, service=0):
    return {role: way.bill and way.bill.gpus.value for way in found.services[service].ways for role in way.roles}


# ---------------------------------------------------------------- the demand


@pytest.mark.parametrize(
    ("text", "counted", "per_s"),
    [
        ("400/s", "requests", 400.0),
        ("400", "requests", 400.0),
        (" 400 / s ", "requests", 400.0),
        ("60/min", "requests", 1.0),
        ("7.2e3/h", "requests", 2.0),
        ("2e9/day", "tokens", 2e9 / 86400),
        ("3600/hour", "tokens", 1.0),
        ("1/day", "tokens", 1 / 86400),
        ("1e12/s", "tokens", 1e12),
        (".5/s", "tokens", 0.5),
    ],
)
def test_a_demand_is_read_per_second(text, counted, per_s):
    assert read_demand(text, counted).per_s == pytest.approx(per_s)


@pytest.mark.parametrize(
    "text",
    ["", "0/s", "-1/s", "nan/s", "inf/s", "1e30/s", "1e400/s", "1e-9/s", "0.9/day", "many/s", "400/fortnight", "4/s/s",
     "1_0/s", "٣/s", "/s", "0x10/s", "400 s"],
)  # fmt: skip
@pytest.mark.parametrize("counted", ["requests", "tokens"])
def test_a_demand_that_is_none_is_refused_with_what_is_expected(text, counted):
    with pytest.raises(ValueError, match=r"is no demand; .*(expected|can be asked)"):
        read_demand(text, counted)


def test_tokens_need_a_unit():
    with pytest.raises(ValueError, match="2e9/day is expected, per s, min, h, hour, day"):
        read_demand("2e9", "tokens")


@pytest.mark.parametrize("text", ["", "0", "-3", "nan", "inf", "1e30", "free", "3,50", "$3"])
def test_a_price_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="is no price; a number above zero like"):
        read_price(text)


# ---------------------------------------------------------------- the sums

rates = st.floats(1.0, 1e6)
demands = st.floats(1e-3, 1e9)
headrooms = st.floats(0.0, 0.95)


@given(rates, demands, headrooms, st.floats(0.0, 0.5))
def test_gpus_are_the_fewest_that_carry_the_demand_below_the_headroom(per_gpu, demand, headroom, spread):
    found = planned(invented(advised=per_gpu, spread=spread), tokens(demand), headroom)
    gpus = bill(found, "advised").gpus
    usable = per_gpu * (1 - headroom)
    assert gpus.value >= 1
    assert gpus.value * usable >= demand * (1 - 1e-6)
    assert gpus.value == 1 or (gpus.value - 1) * usable < demand * (1 + 1e-6)
    assert gpus.low <= gpus.value <= gpus.high


@given(rates, demands, st.floats(0.0, 0.5))
def test_the_interval_of_gpus_is_that_of_the_throughput(per_gpu, demand, spread):
    gpus = bill(planned(invented(advised=per_gpu, spread=spread), tokens(demand)), "advised").gpus
    low = bill(planned(invented(advised=per_gpu * (1 + spread)), tokens(demand)), "advised").gpus.value
    high = bill(planned(invented(advised=per_gpu / (1 + spread)), tokens(demand)), "advised").gpus.value
    assert (gpus.low, gpus.high) == (low, high)


@given(rates, demands, st.floats(1.0, 10.0))
def test_more_demand_or_more_headroom_never_takes_fewer_gpus(per_gpu, demand, factor):
    one = invented(advised=per_gpu)
    least = counts(planned(one, tokens(demand)))["advised"]
    assert counts(planned(one, tokens(demand * factor)))["advised"] >= least
    assert counts(planned(one, tokens(demand), headroom=0.5))["advised"] >= least


@given(rates, demands, st.floats(0.01, 1e4))
def test_money_follows_from_gpus(per_gpu, demand, price):
    found = bill(planned(invented(advised=per_gpu), tokens(demand), price=price), "advised")
    assert found.cost_per_month.value == pytest.approx(found.gpus.value * price * 730)
    assert found.cost_per_month.low == pytest.approx(found.gpus.low * price * 730)
    assert found.cost_per_month.high == pytest.approx(found.gpus.high * price * 730)
    assert found.cost_per_million.value == pytest.approx(found.gpus.value * price / (demand * 3600 / 1e6))


def test_a_whole_quotient_is_not_rounded_up_for_its_last_bits():
    for gpus in range(1, 200):
        assert counts(planned(invented(advised=1000.0), tokens(gpus * 700.0)))["advised"] == gpus
        assert counts(planned(invented(advised=1000.0), tokens(gpus * 700.1)))["advised"] == gpus + 1


def test_without_a_price_nothing_costs_and_without_an_interval_there_is_none():
    found = bill(planned(invented(throughput_tok_per_s=Value(value=20000.0)), tokens(5e4)), "advised")
    assert (found.cost_per_month, found.cost_per_million) == (None, None)
    assert (found.gpus.value, found.gpus.low, found.gpus.high) == (4, None, None)


def test_a_rate_of_requests_counts_the_tokens_that_were_measured_with():
    one = invented()
    by_rate, by_tokens = planned(one, read_demand("100/s", "requests")), planned(one, tokens(100 * 128.0))
    assert counts(by_rate) == counts(by_tokens) == {"advised": 1, "tuned": 2, "default": 3}
    assert by_rate.services[0].tokens_per_s == 12800.0
    assert [one.per_s for one in by_rate.services[0].over_demand] == [25.0, 50.0, 100.0, 200.0, 400.0, 800.0]


@pytest.mark.parametrize("unknown", [None, 0.0, -1.0, 1e-320])
def test_energy_is_unknown_where_it_was_not_measured(unknown):
    found = planned(invented(tokens_per_joule=unknown), tokens(1000.0))
    assert found.services[0].ways[0].energy_wh_per_million is None
    assert found.services[0].ways[1].energy_wh_per_million == pytest.approx(1e6 / 41.0 / 3600)


# ---------------------------------------------------------------- with the advice and without it


def test_a_candidate_in_several_roles_stands_once():
    found = planned(read(LARGE), tokens(1e5))
    assert [(way.roles, way.name) for way in found.services[0].ways] == [(["advised", "tuned", "default"], "1 engine")]


def test_the_best_without_mps_stands_beside_an_advice_of_mps():
    ways = planned(read(SMALL), tokens(1e5)).services[0].ways
    assert [way.roles for way in ways] == [["advised"], ["best_without_mps"], ["tuned"], ["default"]]
    assert ways[1].name == "4 engines without MPS"


def test_a_report_that_tuned_nothing_says_so():
    ways = planned(read(EARLIER), tokens(1e5)).services[0].ways
    [tuned] = [way for way in ways if "tuned" in way.roles]
    assert (tuned.bill, tuned.why) == (None, "the report looked for none")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_every_shipped_report_can_be_planned_with(path):
    found = planned(read(path), Demand(counted="requests", per_s=100.0, text="100 requests/s"), price=2.0)
    told = counts(found)
    assert told["advised"] <= told["default"]
    assert found.services[0].unit == ("prompts" if "prefill" in path.parent.name else "tokens")
    assert all(cell_len(line) <= 80 for line, _ in lines(found, 80))


def point(load, tok_per_s, ttft_p95):
    ttft = Percentiles(p50=1.0, p95=ttft_p95, p99=999.0)
    return CurvePoint(
        concurrency=load, throughput_tok_per_s=rate(tok_per_s), ttft_ms=ttft, itl_ms=None, e2e_ms=None, trial="t"
    )


CURVE = [point(64, 9000.0, 40.0), point(128, 15000.0, 90.0), point(256, 20000.0, 300.0)]


def test_objectives_count_on_the_fastest_load_that_keeps_to_them():
    one = invented(curve=CURVE)
    for limit, load, throughput in ((50.0, 64, 9000.0), (100.0, 128, 15000.0), (300.0, 256, 20000.0)):
        way = planned(one, tokens(1e5), slo={"ttft_p95": limit}).services[0].ways[0]
        assert (way.concurrency, way.throughput_tok_per_s.value) == (load, throughput)
        assert (way.energy_wh_per_million is None) == (load != 256)
    assert planned(one, tokens(1e5)).services[0].ways[0].concurrency == 256


def test_the_objectives_of_the_report_hold_where_none_are_given():
    one = invented(curve=CURVE)
    asked = msgspec.structs.replace(one, question=msgspec.structs.replace(one.question, slo={"ttft_p95": 100.0}))
    found = planned(asked, tokens(1e5)).services[0]
    assert (found.objectives, found.ways[0].concurrency) == ({"ttft_p95": 100.0}, 128)


def test_an_engine_that_misses_the_objectives_has_no_bill_and_no_place_in_the_total():
    one = invented(curve=CURVE)
    found = planned(one, tokens(1e5), slo={"ttft_p95": 45.0}, price=2.0)  # engines without a curve have 52 ms
    assert counts(found) == {"advised": 16, "tuned": None, "default": None}
    assert (found.total.tuned, found.total.default) == (None, None)
    assert found.total.advised.gpus.value == 16
    assert "kept to at no load that was measured" in " ".join(line for line, _ in lines(found, 80))


def test_an_advice_that_misses_the_objectives_is_no_answer():
    with pytest.raises(
        NoHonestAnswer, match=r"r\.json: 4 engines under MPS is advised, but TTFT p95 ≤ 9 ms is kept to"
    ):
        planned(invented(curve=CURVE), tokens(1e5), slo={"ttft_p95": 9.0})


@pytest.mark.parametrize("status", ["inconclusive", "infeasible", "no_slo"])
def test_every_report_that_recommends_nothing_is_named(status):
    none = report(recommendation=advice(status=status, sentence="So it is."))
    asked = [
        Asked(source=name, report=one, demand=tokens(1.0), gpu_hour=None)
        for name, one in (("a.json", none), ("b.json", invented()), ("c.json", none))
    ]
    with pytest.raises(NoHonestAnswer) as caught:
        plan(asked, 0.3, {})
    assert f"a.json is {status}: So it is." in str(caught.value) and "c.json is" in str(caught.value)
    assert "b.json" not in str(caught.value)


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-300, 1e308 * 10])
def test_a_throughput_that_no_gpu_has_is_damage(bad):
    with pytest.raises(DamagedRecord, match=r"r\.json: the throughput of 4 engines under MPS"):
        planned(invented(throughput_tok_per_s=Value(value=bad, low=bad, high=bad)), tokens(1.0))


def test_a_workload_answers_only_for_what_it_has():
    def of(kind):
        one = invented()
        return msgspec.structs.replace(one, workload=msgspec.structs.replace(one.workload, kind=kind))

    with pytest.raises(BadQuestion, match=r"measures prefill.*--rate"):
        planned(of("prefill"), tokens(1.0))
    with pytest.raises(BadQuestion, match=r"measures decode.*--tokens"):
        planned(of("decode"), read_demand("1/s", "requests"))
    assert any("no prefill" in note for note in planned(of("decode"), tokens(1.0)).notes)
    with pytest.raises(BadQuestion, match="shows no itl_p95"):
        planned(of("prefill"), read_demand("1/s", "requests"), slo={"itl_p95": 1.0})


# ---------------------------------------------------------------- several


def test_several_reports_add_up():
    asked = [
        Asked(source=name, report=read(path), demand=read_demand(text, "requests"), gpu_hour=price)
        for name, path, text, price in (("s", SMALL, "400/s", 3.0), ("l", LARGE, "25/s", 5.0))
    ]
    found = plan(asked, DEFAULT_HEADROOM, {})
    for role in ("advised", "tuned", "default"):
        total, bills = getattr(found.total, role), [bill(found, role, index) for index in (0, 1)]
        assert total.gpus.value == sum(one.gpus.value for one in bills)
        assert total.gpus.low == sum(one.gpus.low for one in bills)
        assert total.gpus.high == sum(one.gpus.high for one in bills)
        assert total.cost_per_month.value == pytest.approx(sum(one.cost_per_month.value for one in bills))
        millions = (400 + 25) * 128 * 3600 * 730 / 1e6
        assert total.cost_per_million.value == pytest.approx(total.cost_per_month.value / millions)


def test_one_model_twice_under_one_load_is_noted():
    asked = [Asked(source=name, report=read(SMALL), demand=tokens(1e5), gpu_hour=None) for name in "ab"]
    assert any("counted" in note for note in plan(asked, 0.3, {}).notes)
    assert not any("counted" in note for note in plan(asked[:1], 0.3, {}).notes)


def test_a_demand_per_day_is_noted_as_even():
    for text, noted in (("2e9/day", True), ("2e9/h", True), ("2e5/s", False)):
        assert any("peak" in note for note in planned(read(SMALL), read_demand(text, "tokens")).notes) == noted


# ---------------------------------------------------------------- on the screen


@given(st.floats(1 / 86400, 1e12), st.floats(1e-6, 1e6) | st.none(), headrooms)
def test_the_tables_fit_80_columns_and_the_json_is_json(demand, price, headroom):
    found = planned(read(SMALL), tokens(demand), headroom, price)
    assert max(cell_len(line) for line, _ in lines(found, 80)) <= 80
    assert json.loads(as_json(found))["services"][0]["tokens_per_s"] == demand


# ---------------------------------------------------------------- the real command


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "advisor", "plan", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_answers_with_a_table_or_json():
    done = run(SMALL, LARGE, "--rate", "400/s", "--rate", "25/s", "--gpu-hour", "3.50")
    assert done.returncode == 0, done.stderr
    assert "3 GPUs as advised, 7 (7–8) with the tuned engine" in done.stdout and "All together" in done.stdout
    assert max(map(cell_len, done.stdout.splitlines())) <= 80
    done = run(SMALL.parent, "--tokens", "2e9/day", "--format", "json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert list(data) == ["headroom", "hours_per_month", "services", "total", "notes"]
    assert data["total"]["advised"]["gpus"] == {"value": 2, "low": 2, "high": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "REPORT"),
        ((SMALL,), "--rate"),
        ((SMALL, "--rate", "1/s", "--tokens", "1/s"), "--rate"),
        ((SMALL, "--rate", "0/s"), "--rate: “0/s” is no demand"),
        ((SMALL, "--rate=-5/s"), "--rate: “-5/s” is no demand"),
        ((SMALL, "--rate", "nan"), "--rate: “nan” is no demand"),
        ((SMALL, "--tokens", "inf/s"), "--tokens: “inf/s” is no demand"),
        ((SMALL, "--tokens", "1e30/day"), "--tokens: “1e30/day” is no demand"),
        ((SMALL, "--tokens", "2e9"), "--tokens: “2e9” is no demand"),
        ((SMALL, "--rate", "1/s", "--gpu-hour", "free"), "--gpu-hour"),
        ((SMALL, "--rate", "1/s", "--headroom", "100%"), "--headroom"),
        ((SMALL, "--rate", "1/s", "--headroom=-1%"), "--headroom"),
        ((SMALL, "--rate", "1/s", "--slo", "fast"), "--slo"),
        ((SMALL, SMALL, SMALL, "--rate", "1/s", "--rate", "2/s"), "2 times for 3 reports"),
        (("nowhere.json", "--rate", "1/s"), "nowhere.json does not exist"),
        ((PREFILL, "--tokens", "1/s"), "--rate"),
    ],
)
def test_a_malformed_question_exits_2(words, said):
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr


def test_damage_exits_3_and_no_advice_exits_4(tmp_path):
    cut, none = tmp_path / "cut.json", tmp_path / "none.json"
    cut.write_bytes(SMALL.read_bytes()[:5000])
    none.write_text(dumps(report(recommendation=advice(status="inconclusive", sentence="No verdict: too noisy."))))
    for words, code, said in (
        ((cut,), 3, "cut.json"),
        ((none,), 4, "none.json is inconclusive: No verdict: too noisy."),
        ((SMALL, "--slo", "ttft_p95=1ms"), 4, "is kept to at no load"),
    ):
        done = run(*words, "--rate", "1/s")
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1)
        assert said in done.stderr


# ---------------------------------------------------------------- the example in the documentation

DOC = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
ROLES = {"advised": 0, "best without MPS": 1, "tuned": 2, "default": 3}


def number(text):
    return Fraction(text.replace(",", ""))


def test_every_plan_command_in_the_documentation_is_understood():
    commands = re.findall(r"^mps-advisor plan (.*)$", DOC, re.MULTILINE)
    assert len(commands) >= 4
    for words in commands:
        done = run(*shlex.split(re.sub(r"(?<!/)\b(report|small|large)\.json", str(SMALL), words)))
        assert done.returncode == 0, (words, done.stderr)


def test_the_example_that_is_worked_by_hand_is_right_and_is_what_the_command_says():
    """Once more by whole fractions from the figures in the text, which have to be the report's."""
    data = json.loads(SMALL.read_text())
    done = run(SMALL, "--rate", "400/s", "--gpu-hour", "3.50", "--format", "json")
    [service] = json.loads(done.stdout)["services"]
    assert service["tokens_per_s"] == 400 * 128 == 51200
    table = re.findall(r"^\| (advised|best without MPS|tuned|default): [^|]*\|(.*)\|$", DOC, re.MULTILINE)
    assert [name for name, _ in table] == list(ROLES)
    for name, cells in table:
        throughput, usable, need, gpus, ends, month = (cell.strip() for cell in cells.split("|"))
        value, low, high = (number(one) for one in re.findall(r"[\d,]+\.\d", throughput))
        measured = [one["throughput_tok_per_s"] for one in data["candidates"]]
        assert any(
            [f"{one[key]:.1f}" for key in ("value", "low", "high")] == [f"{float(n):.1f}" for n in (value, low, high)]
            for one in measured
            if one
        ), name
        wanted = {key: Fraction(51200) / (rate * Fraction(7, 10)) for key, rate in
                  (("value", value), ("low", high), ("high", low))}  # fmt: skip
        assert usable == f"{float(value * Fraction(7, 10)):,.1f}"
        assert need == f"{float(wanted['value']):.3f}"
        assert ends == ", ".join(f"{float(wanted[key]):.3f} → {math.ceil(wanted[key])}" for key in ("low", "high"))
        assert int(gpus) == math.ceil(wanted["value"])
        assert number(month) == int(gpus) * Fraction(7, 2) * 730
        found = service["ways"][ROLES[name]]["bill"]
        assert found["gpus"] == {key: math.ceil(wanted[key]) for key in ("value", "low", "high")}
        assert found["cost_per_month"]["value"] == pytest.approx(float(number(month)))
    millions = Fraction(51200 * 3600 * 730, 10**6)
    assert f"{float(millions):,.1f} million" in DOC
    for role, cost, energy in ((0, "0.0570", "5.57 Wh"), (2, "0.1329", "6.93 Wh")):
        way = service["ways"][role]
        assert f"{way['bill']['cost_per_month']['value'] / float(millions):.4f}" == cost
        assert f"{way['bill']['cost_per_million']['value']:.4f}" == cost and cost in DOC
        assert f"{way['energy_wh_per_million']:.2f} Wh" == energy and energy in DOC
    saved, more = (service["ways"][role]["bill"]["cost_per_month"]["value"] - 7665 for role in (2, 1))
    assert f"saves {saved:,.0f} a month" in DOC and f"cost {more:,.0f} a month more" in DOC
