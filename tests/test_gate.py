"""The gate: what passes, what fails, what cannot be told, and what each reader of it is given."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_terminal import advice, measured, report

from advisor.core.errors import DamagedRecord
from advisor.core.gate import DIFFERENCES, EXIT_CODES, Asked, judge, ratio, read_allowed, read_expected
from advisor.core.records import Percentiles, Value
from advisor.report.as_json import dumps, loads
from advisor.report.gate import as_annotations, as_json, as_junit, lines
from advisor.report.terminal import clean

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "data" / "h200-qwen2.5-0.5b-serve-1024-call-2" / "report.json"
EARLIER = ROOT / "data" / "h200-qwen2.5-0.5b-serve-1024" / "report.json"
LARGE = ROOT / "data" / "h200-qwen2.5-3b-serve-1024-call-2" / "report.json"
PREFILL = ROOT / "data" / "h200-qwen2.5-0.5b-prefill-1024" / "report.json"
SHIPPED = sorted(set((ROOT / "data").glob("*/report.json")) - set((ROOT / "data").glob("*-ablate/*")))


def read(path):
    return loads(path.read_bytes(), str(path))


def asked(**more):
    return Asked(**{"expect": {}, "min_gain": None, "max_regression": 0.05, "slo": {}, "allow": [], **more})


def of_rate(rate, spread=0.02, mps=True, **more):
    """A report that advises four engines with this throughput. Its figures are invented."""
    value = Value(value=rate, low=rate / (1 + spread), high=rate * (1 + spread))
    four = measured(4, mps, rate, **{"throughput_tok_per_s": value, **more})
    gain = four.gain_vs_best_without_mps
    return report(candidates=[four], recommendation=advice(mps=mps, gain_vs_best_without_mps=gain))


def state(gate, name):
    return next(check.state for check in gate.checks if check.name == name)


def changed(one, path, value):
    data = msgspec.to_builtins(one)
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return msgspec.convert(data, type(one))


rates = st.floats(1.0, 1e6)
spreads = st.floats(0.0, 0.5)
losses = st.floats(0.0, 0.9)


# ---------------------------------------------------------------- against a baseline


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_a_report_passes_against_itself_even_if_nothing_may_be_lost(path):
    gate = judge(read(path), read(path), asked(max_regression=0.0))
    assert (gate.verdict, gate.exit_code, gate.differences, gate.notes) == ("passed", 0, [], [])


@given(rates, spreads, losses)
def test_any_report_passes_against_itself(rate, spread, loss):
    assert judge(of_rate(rate, spread), of_rate(rate, spread), asked(max_regression=loss)).verdict == "passed"


@given(rates, rates, spreads, spreads, losses)
def test_what_passes_is_shown_and_what_fails_is_shown(rate, base, spread, base_spread, loss):
    """No interval that reaches below the limit passes, and none that reaches above it fails."""
    assume(rate != base)
    found = ratio(of_rate(rate, spread).candidates[0], of_rate(base, base_spread).candidates[0])
    got = state(judge(of_rate(rate, spread), of_rate(base, base_spread), asked(max_regression=loss)), "max-regression")
    least = 1.0 - loss
    assert got == ("passed" if found.low >= least else "failed" if found.high < least else "undecided")


@given(rates, spreads, st.floats(1.0, 100.0), losses)
def test_a_slower_report_never_fares_better(rate, spread, factor, loss):
    rank = {"failed": 0, "undecided": 1, "passed": 2}
    base = of_rate(rate * 1.01, spread)
    slower, faster = (
        judge(of_rate(one, spread), base, asked(max_regression=loss)).verdict for one in (rate / factor, rate)
    )
    assert rank[slower] <= rank[faster]


@given(rates, st.floats(0.0, 0.05), st.floats(0.01, 0.5))
def test_a_report_that_is_far_worse_fails(rate, spread, left):
    gate = judge(of_rate(rate * left, spread), of_rate(rate, spread), asked(max_regression=0.05))
    assert (gate.verdict, gate.exit_code) == ("failed", 1)


def test_a_loss_within_the_noise_is_neither_a_pass_nor_a_failure():
    gate = judge(of_rate(9600.0), of_rate(10000.0), asked(max_regression=0.05))
    assert (gate.verdict, gate.exit_code) == ("undecided", 4)
    assert judge(of_rate(9600.0), of_rate(10000.0), asked(max_regression=0.10)).verdict == "passed"
    assert judge(of_rate(9600.0), of_rate(10000.0), asked(max_regression=0.01)).verdict == "failed"


@given(rates, rates, spreads, spreads)
def test_the_interval_of_a_ratio_is_that_of_independent_errors(rate, base, spread, base_spread):
    assume(rate != base)
    found = ratio(of_rate(rate, spread).candidates[0], of_rate(base, base_spread).candidates[0])
    assert found.value == pytest.approx(rate / base)
    assert found.low * found.high == pytest.approx(found.value**2)
    wide = math.log(found.high / found.value)
    assert wide**2 == pytest.approx(math.log1p(spread) ** 2 + math.log1p(base_spread) ** 2, abs=1e-9)


@pytest.mark.parametrize(
    "rate",
    [None, Value(value=0.0, low=0.0, high=0.0), Value(value=-5.0, low=-6.0, high=-4.0), Value(value=9000.0),
     Value(value=9000.0, low=0.0, high=9100.0), Value(value=9000.0, low=9100.0, high=9200.0),
     Value(value=9000.0, low=1e-300, high=1e300)],
)  # fmt: skip
def test_a_rate_without_a_meaning_decides_nothing(rate):
    odd = of_rate(9000.0, throughput_tok_per_s=rate)
    for one, base in ((odd, of_rate(9500.0)), (of_rate(9500.0), odd)):
        assert state(judge(one, base, asked()), "max-regression") == "undecided"


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_no_rate_that_a_file_can_hold_is_a_surprise(rate, edge):
    odd = of_rate(1.0, throughput_tok_per_s=Value(value=rate, low=edge, high=rate))
    gate = judge(odd, of_rate(9500.0), asked())
    assert json.loads(as_json(gate, "r.json", "b.json"))["exit_code"] in (0, 1, 4)


DIFFERENT = [
    ("model", ["model", "name"], "acme/other"),
    ("model", ["model", "layers"], 25),
    ("model", ["model", "weights"], "dummy"),
    ("gpu", ["gpu", "name"], "NVIDIA H100"),
    ("gpu", ["gpu", "sms"], 114),
    ("gpu", ["gpu", "power_limit_w"], 350.0),
    ("driver", ["gpu", "driver"], "1.2.3"),
    ("vllm", ["software", "vllm"], "0.27.0"),
    ("vllm", ["software", "torch"], "2.99.0"),
    ("vllm", ["software", "environment"], {"VLLM_USE_FLASHINFER_SAMPLER": "1"}),
    ("precision", ["model", "dtype"], "float16"),
    ("precision", ["model", "quantization"], "fp8"),
    ("precision", ["model", "kv_cache_dtype"], "fp8"),
    ("workload", ["workload", "kind"], "prefill"),
    ("workload", ["workload", "isl"], 2048),
    ("workload", ["workload", "osl"], 64),
    ("workload", ["workload", "concurrency"], 64),
    ("workload", ["workload", "isl_range"], [512, 1536]),
    ("slo", ["question", "slo"], {"ttft_p95": 100.0}),
]


@pytest.mark.parametrize(("name", "path", "value"), DIFFERENT, ids=lambda one: str(one))
def test_what_was_measured_otherwise_is_not_comparable_unless_that_is_allowed(name, path, value):
    base = of_rate(9000.0)
    other = changed(base, path, value)
    gate = judge(other, base, asked())
    assert (gate.verdict, gate.exit_code) == ("not_comparable", 3)
    assert [one.name for one in gate.differences] == [name]
    assert state(gate, "max-regression") == "undecided"
    assert judge(other, base, asked(allow=[name])).verdict == "passed"
    others = [one for one in DIFFERENCES if one != name]
    assert judge(other, base, asked(allow=others)).verdict == "not_comparable"


def test_every_difference_is_named_with_both_sides():
    base = of_rate(9000.0)
    other = changed(changed(base, ["gpu", "name"], "NVIDIA H100"), ["gpu", "driver"], "1.2.3")
    found = judge(other, base, asked(allow=["gpu"])).differences
    assert [(one.name, one.allowed) for one in found] == [("gpu", True), ("driver", False)]
    assert "NVIDIA H100" in found[0].report and base.gpu.name in found[0].baseline
    assert "1.2.3" in found[1].report and base.gpu.driver in found[1].baseline


def test_a_setting_of_vllm_that_only_one_side_has_is_a_difference():
    base = changed(of_rate(9000.0), ["software", "environment"], {})
    other = changed(base, ["software", "environment"], {"VLLM_A": "1"})
    [found] = judge(other, base, asked()).differences
    assert (found.report, found.baseline) == ("VLLM_A 1", "VLLM_A not set")


def test_what_may_explain_a_loss_is_noted_and_decides_nothing():
    base = msgspec.structs.replace(of_rate(9000.0), core_s=0.018)
    other = changed(of_rate(9000.0), ["host", "cpu"], "slow chip")
    other = msgspec.structs.replace(other, core_s=0.036, protocol=msgspec.structs.replace(other.protocol, starts=3))
    gate = judge(other, base, asked())
    assert gate.verdict == "passed"
    told = " ".join(gate.notes)
    assert "slow chip" in told and "36.0 ms" in told and "other rules than the baseline: starts." in told


def test_a_change_of_the_advice_is_noted():
    two = of_rate(9000.0, mps=False)
    assert judge(two, of_rate(9000.0), asked()).notes == [
        "The advice has changed: 4 engines without MPS; the baseline's was 4 engines under MPS."
    ]


# ---------------------------------------------------------------- what else can be asked


@pytest.mark.parametrize("status", ["inconclusive", "infeasible", "no_slo"])
def test_a_report_without_a_recommendation_cannot_be_judged(status):
    none = report(recommendation=advice(status=status, engines=None, mps=None, settings=None, sentence="So it is."))
    everything = asked(expect={"engines": 4}, min_gain=0.1, slo={"ttft_p95": 200.0})
    alone, against, as_base = (
        judge(none, None, everything),
        judge(none, report(), everything),
        judge(report(), none, asked()),
    )
    for gate in (alone, against, as_base):
        assert (gate.verdict, gate.exit_code) == ("undecided", 4)
    assert f"{status}: So it is." in alone.checks[0].seen
    assert {check.state for check in alone.checks} == {"undecided"}


def test_a_recommendation_of_nothing_that_was_tried_is_damage():
    with pytest.raises(DamagedRecord, match="recommends 7 engines under MPS, which is not among its candidates"):
        judge(report(recommendation=advice(engines=7)), None, asked())


@pytest.mark.parametrize(
    ("expect", "verdict"),
    [
        ("engines=4", "passed"),
        ("engines=2", "failed"),
        ("mps=true", "passed"),
        ("MPS = false", "failed"),
        ("thread_percentage=50", "passed"),
        ("thread_percentage=none", "failed"),
        ("thread_percentage=25", "failed"),
        ("engines=4,mps=true,thread_percentage=50", "passed"),
        ("engines=4,mps=false", "failed"),
    ],
)
def test_an_expectation_holds_or_does_not(expect, verdict):
    assert judge(read(SMALL), None, asked(expect=read_expected(expect))).verdict == verdict


def test_no_thread_percentage_can_be_expected():
    assert judge(read(LARGE), None, asked(expect=read_expected("thread_percentage=none"))).verdict == "passed"


@pytest.mark.parametrize("text", ["", "engines", "engines=0", "engines=-1", "engines=two", "mps=1", "mps=", "gpu=1",
                                  "thread_percentage=101", "thread_percentage=0",
                                  "engines=1,engines=1", "engines=²"])  # fmt: skip
def test_what_cannot_be_expected_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|twice"):
        read_expected(text)


def test_differences_are_allowed_by_name():
    assert read_allowed(["gpu,driver", " vllm "]) == ["gpu", "driver", "vllm"]
    with pytest.raises(ValueError, match=r"“GPU” is no difference.*model, gpu, driver"):
        read_allowed(["GPU"])


@given(st.floats(0.5, 3.0), st.floats(0.0, 0.3), st.floats(0.0, 1.0))
def test_a_gain_counts_by_its_lower_bound(gain, spread, least):
    value = Value(value=gain, low=gain / (1 + spread), high=gain * (1 + spread))
    got = judge(of_rate(9000.0, gain_vs_best_without_mps=value), None, asked(min_gain=least))
    assert got.verdict == ("passed" if value.low >= 1.0 + least else "failed")


def test_a_gain_that_is_not_known_is_not_decided():
    for value in (None, Value(value=1.5)):
        assert judge(of_rate(9000.0, gain_vs_best_without_mps=value), None, asked(min_gain=0.1)).exit_code == 4


def test_no_gain_is_asked_of_what_needs_no_mps_or_has_no_rival():
    assert judge(of_rate(9000.0, mps=False), None, asked(min_gain=5.0)).verdict == "passed"
    alone = changed(of_rate(9000.0, gain_vs_best_without_mps=None), ["question", "slo"], {"ttft_p95": 100.0})
    assert judge(alone, None, asked(min_gain=0.1)).verdict == "passed"


@pytest.mark.parametrize(("limit", "verdict"), [(52.0, "passed"), (51.9, "failed")])
def test_a_latency_is_kept_to_or_not(limit, verdict):
    one = of_rate(9000.0, ttft_ms=Percentiles(p50=31.0, p95=52.0, p99=88.0))
    assert judge(one, None, asked(slo={"ttft_p95": limit})).verdict == verdict


def test_a_latency_that_was_not_seen_is_not_decided():
    gate = judge(of_rate(9000.0, ttft_ms=None), None, asked(slo={"ttft_p95": 50.0, "itl_p95": 50.0}))
    assert (state(gate, "slo ttft_p95"), state(gate, "slo itl_p95")) == ("undecided", "passed")
    assert gate.exit_code == 4


def test_a_failure_outweighs_what_cannot_be_told_and_another_machine_outweighs_both():
    base, slow = of_rate(9000.0), of_rate(8700.0, ttft_ms=None)
    both = asked(slo={"itl_p95": 1.0, "ttft_p95": 1.0})
    assert judge(slow, base, both).verdict == "failed"
    assert judge(changed(slow, ["gpu", "driver"], "1"), base, both).verdict == "not_comparable"


# ---------------------------------------------------------------- what readers are given

anything = st.text(max_size=30)


@given(anything, anything, anything)
@settings(max_examples=60, deadline=None)
def test_the_xml_can_be_parsed_whatever_a_report_holds(name, driver, sentence):
    base = of_rate(9000.0)
    odd = changed(changed(of_rate(4000.0), ["model", "name"], name), ["gpu", "driver"], driver)
    none = msgspec.structs.replace(base, recommendation=advice(status="inconclusive", sentence=sentence))
    for gate in (judge(odd, base, asked()), judge(none, base, asked(slo={"ttft_p95": 1.0}))):
        suite = ElementTree.fromstring(as_junit(gate, name, driver).encode()).find("testsuite")
        cases = suite.findall("testcase")
        assert [case.get("name") for case in cases] == [check.name for check in gate.checks]
        assert int(suite.get("tests")) == len(cases)
        for tag, wanted in (("failure", "failed"), ("error", "undecided")):
            names = [case.get("name") for case in cases if case.find(tag) is not None]
            assert names == [check.name for check in gate.checks if check.state == wanted]
            assert int(suite.get(tag + "s")) == len(names)


# As GitHub's runner reads a command: the properties end at the next "::", and these are put back in this order.
COMMAND = re.compile(r"::(error|warning|notice) title=([^:,]*)::(.*)")
DATA = (("%0D", "\r"), ("%0A", "\n"), ("%25", "%"))
PROPERTY = (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%"))


def put_back(text, table):
    for written, meant in table:
        text = text.replace(written, meant)
    return text


@given(anything, anything)
@settings(max_examples=60, deadline=None)
def test_annotations_are_one_command_a_line_whatever_a_report_holds(name, sentence):
    base = of_rate(9000.0)
    none = msgspec.structs.replace(base, recommendation=advice(status="inconclusive", sentence=sentence))
    for gate in (judge(changed(base, ["model", "name"], name), base, asked()), judge(none, None, asked())):
        told = as_annotations(gate, name, None).split("\n")
        assert all(COMMAND.fullmatch(line) for line in told)
        found = {put_back(COMMAND.fullmatch(line)[2], PROPERTY) for line in told}
        said = [put_back(COMMAND.fullmatch(line)[3], DATA) for line in told]
        for check in gate.checks:
            if check.state != "passed":
                assert f"mps-advisor gate: {check.name}" in found
                assert any(clean(check.seen) in one for one in said)


def test_what_means_something_to_github_is_escaped():
    none = report(recommendation=advice(status="inconclusive", sentence="50 %25 of it, ::error::really\r\nand more"))
    [line] = as_annotations(judge(none, None, asked()), "r.json", None).split("\n")
    assert line.startswith("::error title=mps-advisor gate%3A verdict::inconclusive: 50 %2525 of it, ::error::really ")
    told = put_back(COMMAND.fullmatch(line)[3], DATA)
    assert "50 %25 of it, ::error::really and more" in told


def test_an_annotation_is_an_error_where_it_decides():
    def levels(gate):
        return [COMMAND.fullmatch(line)[1] for line in as_annotations(gate, "r", "b").split("\n")]

    base = of_rate(9000.0)
    assert levels(judge(base, base, asked())) == ["notice"]
    assert levels(judge(of_rate(8600.0), base, asked())) == ["error"]
    assert levels(judge(of_rate(8600.0), base, asked(slo={"itl_p95": 1.0}))) == ["warning", "error"]
    assert levels(judge(changed(base, ["gpu", "driver"], "1"), base, asked())) == ["error", "warning"]


def test_the_table_fits_80_columns_and_names_every_check():
    base = changed(of_rate(9000.0), ["gpu", "driver"], "1.2.3")
    everything = asked(expect={"engines": 4, "mps": False}, min_gain=0.125, slo={"ttft_p95": 50.0})
    gate = judge(of_rate(8000.0), base, everything)
    text = [line for line, _ in lines(gate, "report.json", "main.json", 80)]
    assert max(map(len, text)) <= 80
    whole = " ".join(" ".join(text).split())
    assert all(check.name in whole for check in gate.checks)
    assert "1.2.3" in whole and "--allow driver" in whole and "1.125×" in whole


def test_json_holds_every_check_and_the_figures_that_decided():
    data = json.loads(as_json(judge(of_rate(4000.0), of_rate(9000.0), asked()), "r.json", "b.json"))
    assert list(data) == ["report", "baseline", "verdict", "exit_code", "checks", "differences", "notes"]
    assert data["verdict"] == "failed"
    check = data["checks"][-1]
    assert list(check) == ["name", "state", "asked", "seen", "value"]
    assert check["value"]["value"] == pytest.approx(4000 / 9000)


# ---------------------------------------------------------------- the real command


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "advisor", "gate", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def inconclusive(tmp_path):
    path = tmp_path / "inconclusive.json"
    path.write_text(dumps(report(recommendation=advice(status="inconclusive", sentence="No verdict: too noisy."))))
    return path


@pytest.mark.parametrize("format", ["table", "json", "junit", "github"])
def test_the_command_exits_0_where_everything_holds(format):
    done = run(SMALL, "--baseline", SMALL, "--expect", "engines=4,mps=true", "--min-gain", "10%",
               "--slo", "ttft_p95=200ms", "--format", format)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Gate passed" in done.stdout + done.stderr


@pytest.mark.parametrize("format", ["table", "json", "junit", "github"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((SMALL, "--expect", "engines=2"), 1),
        ((SMALL, "--min-gain", "30%"), 1),
        ((SMALL, "--slo", "itl_p95=20ms"), 1),
        ((LARGE, "--baseline", SMALL, "--allow", "model"), 1),
        ((LARGE, "--baseline", SMALL), 3),
        ((PREFILL, "--baseline", EARLIER, "--allow", "gpu,driver"), 3),
        ((SMALL, "--baseline", EARLIER), 4),
    ],
)
def test_the_command_exits_as_the_contract_says(words, code, format):
    done = run(*words, "--format", format)
    assert done.returncode == code, done.stderr
    match format:
        case "json":
            assert json.loads(done.stdout)["exit_code"] == code
        case "junit":
            assert (
                ElementTree.fromstring(done.stdout.encode()).find(".//failure" if code == 1 else ".//error") is not None
            )
        case "github":
            assert all(COMMAND.fullmatch(line) for line in done.stdout.splitlines())
        case _:
            assert max(map(len, done.stdout.splitlines())) <= 80 or str(ROOT) in done.stdout
    assert len(done.stderr.splitlines()) == (0 if format == "table" else 1)


def test_the_command_exits_4_for_an_inconclusive_report(inconclusive):
    done = run(inconclusive)
    assert (done.returncode, done.stderr) == (4, "")
    assert "No verdict: too noisy." in " ".join(done.stdout.split())
    assert run(SMALL, "--baseline", inconclusive, "--allow", "model,gpu,driver,vllm,workload").returncode == 4


def test_a_run_folder_is_replayed_and_equals_its_report():
    done = run(SMALL.parent, "--baseline", SMALL, "--max-regression", "0%", "--format", "json")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "REPORT"),
        (("nowhere.json",), "nowhere.json does not exist"),
        ((SMALL, "--baseline", "nowhere.json"), "nowhere.json does not exist"),
        ((SMALL, "--expect", "colour=red"), "colour=red"),
        ((SMALL, "--min-gain", "much"), "--min-gain"),
        ((SMALL, "--min-gain", "nan"), "--min-gain"),
        ((SMALL, "--baseline", SMALL, "--max-regression", "100%"), "--max-regression"),
        ((SMALL, "--baseline", SMALL, "--max-regression=-5%"), "--max-regression"),
        ((SMALL, "--max-regression", "5%"), "--baseline"),
        ((SMALL, "--allow", "gpu"), "--baseline"),
        ((SMALL, "--baseline", SMALL, "--allow", "cpu"), "cpu"),
        ((SMALL, "--slo", "ttft=1"), "--slo"),
        ((PREFILL, "--slo", "itl_p95=1ms"), "itl_p95"),
        ((SMALL, "--format", "html"), "html"),
    ],
)
def test_a_malformed_question_exits_2_with_one_line(words, said):
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("format", ["table", "json", "junit", "github"])
def test_a_file_whose_name_is_no_text_is_judged_all_the_same(tmp_path, format):
    path = os.fsencode(tmp_path) + b"/\xff.json"
    Path(os.fsdecode(path)).write_bytes(SMALL.read_bytes())
    done = run(os.fsdecode(path), "--format", format)
    assert done.returncode == 0, done.stderr
    assert "?.json" in done.stdout


def test_damaged_and_newer_reports_exit_3(tmp_path):
    cut, newer, folder = tmp_path / "cut.json", tmp_path / "newer.json", tmp_path / "empty"
    cut.write_bytes(SMALL.read_bytes()[:5000])
    newer.write_bytes(SMALL.read_bytes().replace(b'"schema_version": 1', b'"schema_version": 9', 1))
    folder.mkdir()
    for path, said in ((cut, "cut.json"), (newer, "install a newer mps-advisor"), (folder, "manifest.json")):
        for words in ((path,), (SMALL, "--baseline", path)):
            done = run(*words)
            assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (3, "", 1)
            assert said in done.stderr


CI = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")


def test_every_gate_command_in_the_documentation_is_understood(tmp_path):
    """With a report in the place of each file that is named, none is malformed."""
    commands = re.findall(r"^ *mps-advisor gate ((?:.*\\\n)*.*)$", CI, re.MULTILINE)
    assert len(commands) >= 3
    for words in commands:
        plain = words.replace("\\\n", " ").split(">")[0].split("||")[0]
        done = run(*shlex.split(re.sub(r"\S+\.json", str(SMALL), plain)))
        assert done.returncode in (0, 1), (words, done.stderr)


def test_the_workflow_in_the_documentation_is_yaml_that_gates():
    [workflow] = re.findall(r"```yaml\n(.*?)```", CI, re.DOTALL)
    jobs = yaml.safe_load(workflow)["jobs"]
    assert any("mps-advisor gate" in step.get("run", "") for step in jobs["gate"]["steps"])
    assert any("mps-advisor profile" in step.get("run", "") for step in jobs["profile"]["steps"])


def test_the_example_in_the_documentation_is_what_the_command_says():
    [command, told] = re.findall(r"```console\n\$ (.*?)\n(.*?)```", CI, re.DOTALL)[0]
    done = run(*shlex.split(command)[2:])
    assert (done.returncode, done.stdout) == (4, told)


def test_the_gate_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['mps-advisor', 'gate', sys.argv[1], '--format', 'junit']\n"
        "from advisor.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, *sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, SMALL], capture_output=True, text=True, timeout=60, check=True)
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert not {"pandas", "numpy", "aiohttp", "huggingface_hub", "psutil", "yaml", "pynvml"} & set(modules)


def test_every_exit_code_of_a_verdict_is_one_of_the_contract():
    assert set(EXIT_CODES.values()) == {0, 1, 3, 4}
