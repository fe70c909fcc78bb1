"""The runs in data/ are live runs from an H200: what they say must stay computable, and must stay what they said."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path

import msgspec
import pytest
import raw as made
from rich.cells import cell_len
from rich.console import Console

from advisor import ablating, flow
from advisor.core import run_cautions
from advisor.core.errors import NotRecorded
from advisor.core.estimate import half_width
from advisor.core.records import Report, Workload
from advisor.core.tried import judge, slug
from advisor.report.as_json import dumps
from advisor.report.terminal import render
from advisor.shell.replay import Replay, choose, shipped_runs
from advisor.shell.store import RunFolder

ROOT = Path(__file__).parent.parent
RUNS = sorted(path.parent for path in (ROOT / "data").glob("*/manifest.json"))
ABLATED = [path for path in RUNS if RunFolder(path).manifest().ablation is not None]
SHIPPED = [path for path in RUNS if path not in ABLATED]  # profiles
STUDIES_AT = ROOT / "data" / "studies"
STUDIES = sorted(path.parent for path in STUDIES_AT.glob("*/manifest.json"))
STUDIES_OF_PROFILES = [path for path in STUDIES if "-call-" in path.name]
KILLED_ENGINE = ROOT / "tests" / "data" / "killed-engine"
LIMIT_BYTES = 700 * 1024


def replay(folder: Path) -> Report:
    run = RunFolder(folder)
    return flow.profile(run.manifest(), Replay(run), created="now", replayed=True)


def of(report: Report, engines: int, mps: bool, percentage: int | None = None):
    wanted = None if percentage is None else [percentage] * engines
    return next(
        one for one in report.candidates if (one.engines, one.mps, one.thread_percentages) == (engines, mps, wanted)
    )


def test_the_runs_that_users_are_promised_are_shipped():
    asked = {
        (m.model.name, m.question.workload.kind, m.question.workload.isl)
        for m in (folder.manifest() for folder in shipped_runs())
    }
    assert asked >= {
        ("Qwen/Qwen2.5-0.5B", "serve", 1024),
        ("Qwen/Qwen2.5-0.5B", "prefill", 1024),
        ("Qwen/Qwen2.5-3B", "serve", 1024),
    }


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_run_is_small_and_its_evidence_is_raw(folder: Path):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "report.json"]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    for raw in RunFolder(folder).trials():
        evidence = {"numerics": raw.numerics, "steps": raw.steps, "load": raw.loads and raw.loads[0].tokens}
        assert raw.ended != "completed" or evidence[raw.spec.kind]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_run_holds_every_kind_of_candidate(folder: Path):
    report = replay(folder)
    assert report.recommendation.status == "recommend"
    for engines, mps in ((1, False), (1, True), (2, False), (2, True)):
        assert of(report, engines, mps).trial is not None
    for engines in (3, 4):
        tried = [one for one in report.candidates if one.engines == engines and one.mps]
        stopped = [one for one in report.candidates if one.outcome in ("skipped", "infeasible") and one.why_not]
        assert tried or stopped
    restricted = [one for one in report.candidates if one.thread_percentages]
    assert any(one.outcome == "ok" for one in restricted)
    assert any(one.outcome == "wrong_results" and "matrix product" in one.why_not for one in restricted)


@pytest.mark.parametrize("folder", [path for path in SHIPPED if (path / "report.json").exists()], ids=lambda p: p.name)
def test_a_replay_says_what_the_live_run_said(folder: Path):
    """A later version may say more (what was null then) and in better words, never something else."""
    live = json.loads((folder / "report.json").read_text())
    now = json.loads(dumps(replay(folder)))
    assert (live.pop("replayed"), now.pop("replayed")) == (False, True)
    del live["created"], now["created"]
    assert list(contradictions(live, now)) == []


@pytest.mark.parametrize("folder", ABLATED, ids=lambda path: path.name)
def test_a_replayed_ablation_says_what_the_live_one_said(folder: Path):
    live = json.loads((folder / "report.json").read_text())
    now = json.loads(dumps(ablating.replayed(None, None, str(folder), lambda text: None)))
    assert (live.pop("replayed"), now.pop("replayed")) == (False, True)
    del live["created"], now["created"]
    assert list(contradictions(live, now)) == []


def test_of_the_shipped_ablation_the_parts_times_add_up_to_the_whole_model():
    report = ablating.replayed(
        "Qwen/Qwen2.5-3B", None, str(ROOT / "data" / "h100-qwen2.5-3b-ablate"), lambda text: None
    )
    assert [one.context for one in report.steps if one.kind == "decode"] == [128, 512, 1024, 2048, 4096]
    for one in report.steps:
        assert one.closure.value == pytest.approx(1.0, abs=0.03)
        assert one.expected_over_whole.value == pytest.approx(1.0, abs=0.03)
    assert report.warnings == []


def contradictions(then, now, where="report"):
    if isinstance(then, dict):
        for key, value in then.items():
            if key == "cost_of_mps":  # words too; what has to be in them: test_deployment.py
                if bool(value) != bool(now.get(key)):
                    yield f"{where}.{key} is {now.get(key)!r}, not {value!r}"
                continue
            if key in ("sentence", "because", "why_not", "text", "remedy", "limit_evidence"):
                continue
            yield from contradictions(value, now.get(key), f"{where}.{key}")
    elif isinstance(then, list):
        if len(then) != len(now):
            yield f"{where} has {len(now)} entries, not {len(then)}"
        for index, pair in enumerate(zip(then, now, strict=False)):
            yield from contradictions(*pair, f"{where}[{index}]")
    elif then is not None and then != now:
        yield f"{where} is {now!r}, not {then!r}"


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_every_measured_candidate_says_what_limited_it(folder: Path):
    report = replay(folder)
    measured = [one for one in report.candidates if one.throughput_tok_per_s]
    assert measured and all(one.limited_by and one.limit_evidence for one in measured)
    assert all(one.limited_by == "gpu" for one in measured if one.gpu_idle_pct < 10)
    assert not {caution.code for caution in report.warnings} & {"cpu_contention"}


@pytest.mark.parametrize("folder", [*RUNS, *STUDIES], ids=lambda path: path.name)
def test_nobody_is_said_to_have_disturbed_what_ran_alone(folder: Path):
    judged = [judge(raw) for raw in RunFolder(folder).trials()]
    told = [(slug(one.spec), caution.text) for one in judged for caution in one.cautions]
    assert not [text for _, text in told if "cannot be seen from here" in text or "PID" in text], told


def test_every_recorded_start_counts_also_one_that_todays_rules_would_not_ask_for():
    run = RunFolder(STUDIES_AT / "h200-qwen2.5-3b-serve-1024-first-full")
    manifest, asked = run.manifest(), []
    content = msgspec.structs.replace(manifest, protocol=msgspec.structs.replace(manifest.protocol, more_starts=0))
    report = flow.profile(content, Replay(run), created="now", replayed=True, on_trial=asked.append)
    assert len(asked) == len(run.trials()) - 2
    assert [one.starts for one in report.candidates if one.engines == 1 and not one.mps and one.starts] == [3, 3]
    assert report.candidates == replay(run.path).candidates


def test_what_keeps_the_gpu_busy_decides_though_other_starts_differ_by_a_tenth():
    small = replay(STUDIES_AT / "h200-qwen2.5-0.5b-serve-1024-call-1")
    advice = small.recommendation
    assert (advice.status, advice.engines, advice.mps, advice.thread_percentages) == ("recommend", 4, True, None)
    assert advice.gain_vs_best_without_mps.low > 1.10 and half_width(advice.gain_vs_best_without_mps) < 0.05
    without = next(one for one in small.candidates if one.engines == 4 and not one.mps and one.starts == 4)
    assert half_width(without.throughput_tok_per_s) < 0.01
    large = replay(STUDIES_AT / "h200-qwen2.5-3b-serve-1024-call-1").recommendation
    assert (large.status, large.engines, large.mps) == ("recommend", 1, False)


def test_starts_that_differ_are_named_and_with_them_the_slower_host():
    report = replay(STUDIES_AT / "h200-qwen2.5-0.5b-serve-1024-call-1")
    told = {one.text.split(" gave ")[0]: one.text for one in report.warnings if one.code == "drift"}
    four = told["6 starts of 4-engines-mps-api2"]
    assert "26,963 to 29,624" in four and "load generators, on cores of their own, needed 17% more" in four
    # Those that keep the GPU busy repeat.
    assert not any("no-mps" in which and which.startswith("4 starts of 4-engines") for which in told)


def test_a_run_with_forked_and_started_engines_says_so():
    run = RunFolder(STUDIES_AT / "h200-qwen2.5-0.5b-serve-1024-cut-short-c")
    tried = [judge(raw) for raw in run.trials()]
    (told,) = run_cautions._mixed(tried)
    assert told.text.startswith("In 10 of 18 trials engines were forked")
    assert not list(run_cautions._mixed([one for one in tried if one.raw.engines and one.raw.engines[0].forked]))


def test_two_engines_that_repeat_within_one_percent_are_known_as_well_as_that():
    report = replay(STUDIES_AT / "h200-qwen2.5-3b-serve-1024-first-full")
    with_mps, without = of(report, 2, True), of(report, 2, False)
    assert half_width(with_mps.throughput_tok_per_s) < 0.03 and half_width(without.throughput_tok_per_s) < 0.03
    step = next(one for one in report.waterfall if one.step == "mps")
    assert step.factor.low > 1.05 and half_width(step.factor) < 0.03
    tuned = next(one for one in report.waterfall if one.step == "tuned")
    assert tuned.factor.value == pytest.approx(0.97, abs=0.01) and half_width(tuned.factor) > 0.1


def test_what_was_found_on_the_h200_stays_found():
    small = replay(ROOT / "data" / "h200-qwen2.5-0.5b-serve-1024")
    assert (small.recommendation.engines, small.recommendation.mps) == (4, True)
    assert small.recommendation.gain_vs_best_without_mps.low > 1.10
    assert of(small, 4, True, 37).outcome == "wrong_results"
    large = replay(ROOT / "data" / "h200-qwen2.5-3b-serve-1024")
    assert (large.recommendation.engines, large.recommendation.mps) == (2, False)


def test_slower_cores_of_the_host_change_what_waits_for_them_and_nothing_else():
    slow = replay(ROOT / "data" / "h200-qwen2.5-0.5b-prefill-1024")
    fast = replay(ROOT / "data" / "h200-qwen2.5-0.5b-prefill-1024-faster-host")
    ratio = {
        engines: of(fast, engines, True).throughput_tok_per_s.value / of(slow, engines, True).throughput_tok_per_s.value
        for engines in (1, 4)
    }
    assert of(slow, 4, True).gpu_idle_pct < 1 < 30 < of(fast, 1, True).gpu_idle_pct
    assert ratio[4] == pytest.approx(1.0, abs=0.1)
    assert ratio[1] > 1.5


def test_an_engine_killed_under_load_is_a_crash_and_without_its_repeat_there_is_no_verdict_on_mps():
    report = replay(KILLED_ENGINE)
    killed = of(report, 2, True)
    assert killed.outcome == "crash"
    assert "engine core ended" in killed.why_not
    # It was the only trial of several engines under MPS: neither yes nor no can be said.
    assert report.recommendation.status == "inconclusive"
    assert "under MPS" in report.recommendation.sentence
    assert any(caution.code == "not_measured" and "2-engines-mps" in caution.text for caution in report.warnings)
    raw = next(raw for raw in RunFolder(KILLED_ENGINE).trials() if raw.spec.mps and raw.spec.engines == 2)
    assert raw.teardown.left_pids == [] and not raw.teardown.daemon_left


def crashed(folder: Path, *names: str) -> Report:
    """The replay of a run in which these trials had crashed."""

    class Crashing(Replay):
        def run(self, spec):
            raw = super().run(spec)
            return msgspec.structs.replace(raw, ended="crash", detail="gone") if slug(spec) in names else raw

    run = RunFolder(folder)
    return flow.profile(run.manifest(), Crashing(run), created="now", replayed=True)


CRASHED = ROOT / "data" / "h200-qwen2.5-0.5b-serve-1024-faster-host"


@pytest.mark.parametrize(
    ("names", "side"),
    [
        (("2-engines-no-mps", "3-engines-no-mps"), "without MPS"),
        (("2-engines-mps", "3-engines-mps", "4-engines-mps"), "under MPS"),
        (("1-engine-no-mps",), "default engine"),
    ],
)
def test_no_verdict_is_reached_when_one_side_of_the_comparison_failed(names, side):
    report = crashed(CRASHED, *names)
    assert report.recommendation.status == "inconclusive"
    assert side in report.recommendation.sentence


def test_a_missing_rival_is_named_in_the_sentence():
    sentence = replay(CRASHED).recommendation.sentence
    assert "3 engines without MPS could not be measured" in sentence


@pytest.mark.parametrize("min_gain", [0.0, 0.01, 0.02, 0.05])
def test_one_engine_under_mps_is_never_advised_and_never_forbids_a_verdict(min_gain):
    for folder in SHIPPED:
        run = RunFolder(folder)
        manifest = run.manifest()
        question = msgspec.structs.replace(manifest.question, min_gain=min_gain)
        report = flow.profile(
            msgspec.structs.replace(manifest, question=question), Replay(run), created="now", replayed=True
        )
        assert (report.recommendation.engines, report.recommendation.mps) != (1, True)
        assert "1 engine under MPS gives" not in report.recommendation.sentence


def test_what_stood_in_while_measuring_is_not_in_the_commands():
    for folder in SHIPPED:
        report = replay(folder)
        for command in report.recommendation.commands[report.recommendation.mps * 2 :]:
            assert "DecodeBench" not in command and "--load-format auto" in command
            assert f"CUDA_VISIBLE_DEVICES={report.gpu.uuid}" in command


def test_a_decode_wave_that_was_load_bound_is_rejected_not_reported():
    tried = [judge(raw) for raw in RunFolder(ROOT / "tests" / "data" / "decode").trials()]
    bound = [one for one in tried if "load generator" in one.why]
    assert bound and all(one.outcome == "invalid" and one.measurement is None for one in bound)


def test_a_change_of_one_raw_sample_changes_the_report(tmp_path: Path):
    source = ROOT / "data" / "h200-qwen2.5-3b-serve-1024"
    before = replay(source)
    for path in source.rglob("*"):
        if path.is_file() and path.name != "report.json":
            copy = tmp_path / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    trial = tmp_path / "trials" / "000-1-engine-no-mps.json.gz"
    raw = json.loads(gzip.decompress(trial.read_bytes()))
    load = raw["loads"][0]
    middle = int(((raw["window"][0] + raw["window"][1]) / 2 - load["bins_start_s"]) / load["bin_s"])
    load["tokens"][middle] += 400
    trial.write_bytes(gzip.compress(json.dumps(raw).encode()))
    after = replay(tmp_path)
    assert of(after, 1, False).throughput_tok_per_s != of(before, 1, False).throughput_tok_per_s
    assert of(after, 2, True).gain_vs_default != of(before, 2, True).gain_vs_default


def test_a_stored_report_is_never_read(tmp_path: Path):
    source = ROOT / "data" / "h200-qwen2.5-3b-serve-1024"
    for path in [source / "manifest.json", *(source / "trials").iterdir()]:
        copy = tmp_path / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "report.json").write_text("not even JSON")
    assert replay(tmp_path) == msgspec.structs.replace(replay(source))


def test_a_run_older_than_the_repeating_of_trials_is_judged_on_its_first_attempt():
    folder = CRASHED
    assert of(replay(folder), 3, False).outcome == "crash"
    assert sum(raw.ended == "crash" for raw in RunFolder(folder).trials()) == 1


def test_a_second_start_that_was_not_recorded_is_never_replaced_by_another_trial():
    run = RunFolder(ROOT / "data" / "h200-qwen2.5-3b-serve-1024")
    manifest = run.manifest()
    protocol = msgspec.structs.replace(manifest.protocol, starts=2)
    with pytest.raises(NotRecorded, match="repeat-1"):
        flow.profile(msgspec.structs.replace(manifest, protocol=protocol), Replay(run), created="now", replayed=True)


def test_auto_prefers_the_run_that_was_made_as_runs_are_made_now():
    manifest = RunFolder(ROOT / "data" / "h200-qwen2.5-0.5b-serve-1024").manifest()
    workload = msgspec.structs.replace(manifest.question.workload, osl_spread=0)
    chosen = choose("qwen2.5-0.5b", workload).manifest()
    assert chosen.question.workload.osl_spread > 0 and chosen.protocol.starts == 2


class OneStart(Replay):
    """The replay of a run whose trials are given as windows of one start: all times count from its beginning."""

    keeps_a_teardown = True

    def run(self, spec):
        found = super().run(spec)
        last = self.keeps_a_teardown and spec.kind == "load" and spec.engines == 1 and spec.mps
        moved = made.shifted(found, 100.0) if spec.kind == "load" else found
        return msgspec.structs.replace(
            moved, started="monday" if spec.kind == "load" else None, teardown=found.teardown if last else None
        )


def test_windows_of_one_start_lie_one_after_another_in_the_timeline():
    run = RunFolder(CRASHED)
    alone, together = replay(CRASHED), flow.profile(run.manifest(), OneStart(run), created="now", replayed=True)

    assert [stage.name for stage in together.timeline] == [stage.name for stage in alone.timeline]
    for one, other in zip(together.timeline, alone.timeline, strict=True):
        assert (one.start_s, one.end_s) == pytest.approx((other.start_s, other.end_s), abs=0.1)


def test_one_teardown_proves_the_end_of_all_windows_of_a_start():
    run = RunFolder(CRASHED)
    runner = OneStart(run)

    def unproven():
        report = flow.profile(run.manifest(), runner, created="now", replayed=True)
        return [caution for caution in report.warnings if caution.code == "teardown_unproven"]

    assert unproven() == []
    runner.keeps_a_teardown = False
    (caution,) = unproven()
    assert "more trials" in caution.text


COLUMNS = [
    f"h200-qwen2.5-{run}{host}"
    for run in ("0.5b-serve-1024", "0.5b-prefill-1024", "3b-serve-1024")
    for host in ("-faster-host", "")
]
ROWS = {
    "1 engine, default": (1, False, None),
    "1 engine under MPS": (1, True, None),
    "2 engines, no MPS": (2, False, None),
    "2 engines under MPS": (2, True, None),
    "3 engines, no MPS": (3, False, None),
    "3 engines under MPS": (3, True, None),
    "4 engines, no MPS": (4, False, None),
    "4 engines under MPS": (4, True, None),
    "5 engines under MPS": (5, True, None),
}


def test_the_table_of_both_hosts_says_what_the_runs_say():
    reports = [replay(ROOT / "data" / name) for name in COLUMNS]
    checked = 0
    engines = 0
    text = (ROOT / "docs" / "measurement.md").read_text()
    for line in text[text.index("| candidate | 0.5B serve, A") :].partition("\n\n")[0].splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else [""]
        if name in ROWS:
            engines, mps, percentage = ROWS[name]
        elif name.startswith("… at "):
            mps, percentage = True, int(name.removeprefix("… at ").removesuffix(" %"))
        else:
            continue
        for cell, report in zip(cells, reports, strict=True):
            found = re.fullmatch(r"([\d,]+) ±(<?\d+) %", cell)
            if found is None:
                assert cell in ("–", "crashed"), cell
                continue
            value = of(report, engines, mps, percentage).throughput_tok_per_s
            half = (value.high - value.low) / 2 / value.value * 100
            assert found[1] == f"{value.value:,.0f}"
            assert found[2] == ("<1" if half < 0.5 else f"{half:.0f}"), (name, cell, half)
            checked += 1
    assert checked > 35


@pytest.mark.parametrize("folder", [*SHIPPED, *STUDIES_OF_PROFILES], ids=lambda path: path.name)
def test_no_line_of_a_report_is_wider_than_80_columns(folder: Path):
    page = io.StringIO()
    render(replay(folder), Console(file=page, width=80))
    assert [line for line in page.getvalue().splitlines() if cell_len(line) > 80] == []


CALLS = [
    f"{place}h200-qwen2.5-{model}-serve-1024-call-{number}"
    for model in ("0.5b", "3b")
    for number, place in ((1, "studies/"), (2, ""))
]
STEPS = {
    "× tuned": "tuned",
    "× N engines without MPS": "engines",
    "× under MPS": "mps",
    "× 50 % of the threads each": "thread_percentages",
}


def credited(report: Report) -> dict[str, str]:
    """The cells of one profile in the README's table."""

    def times(value) -> str:
        return f"{value.value:.2f}× ({value.low:.2f}–{value.high:.2f})"

    found = {step.step: times(step.factor) for step in report.waterfall}
    cells = {row: found.get(step, "–") for row, step in STEPS.items()}
    default, advice = report.candidates[0].throughput_tok_per_s, report.recommendation
    half = (default.high - default.low) / 2 / default.value * 100
    best = of(report, 2, True)
    if advice.mps:
        advised = (advice.engines, True, advice.thread_percentages, advice.settings)
        best = next(
            one for one in report.candidates if (one.engines, one.mps, one.thread_percentages, one.settings) == advised
        )
    also = [f"{best.thread_percentages[0]} %"] if best.thread_percentages else []
    also += ["2 API servers each"] if best.settings.api_server_count == 2 else []
    return cells | {
        "default engine, tokens/s": f"{default.value:,.0f} ±{half:.0f} %",
        "MPS over the best without it": times(best.gain_vs_best_without_mps),
        "**advised**": ", ".join([str(advice.engines), *(["MPS", *also] if advice.mps else [])]),
    }


def test_the_credit_in_the_readme_is_what_the_calls_say():
    told = [credited(replay(ROOT / "data" / name)) for name in CALLS]
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| Qwen2.5 | 0.5B, 1st") :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0] for row in rows] == [
        "default engine, tokens/s",
        *STEPS,
        "MPS over the best without it",
        "**advised**",
    ]
    for name, *cells in rows:
        assert cells == [one[name] for one in told], name


def test_the_screen_in_the_readme_is_how_the_first_command_begins():
    readme = (ROOT / "README.md").read_text()
    start = readme.index("```\nQwen/Qwen2.5-0.5B on") + 4
    shown = readme[start : readme.index("\n```", start)]
    page = io.StringIO()
    asked = Workload(kind="serve", isl=1024, osl=128, concurrency=256)
    render(replay(choose("Qwen/Qwen2.5-0.5B", asked).path), Console(file=page, width=80))
    assert page.getvalue().startswith(shown)
