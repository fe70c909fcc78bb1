"""`mps-advisor profile` as a user runs it: exit codes, streams, run folders, replay, Ctrl-C. Engines are stand-ins."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT, Bench, make_bench

SCHEMA = json.loads((ROOT / "advisor" / "report" / "report.schema.json").read_text())
WORKLOAD = ("--ctx", "64", "--osl", "16", "--concurrency", "8")
SMALL = (*WORKLOAD, "--thread-percentages", "none", "--max-engines", "1")  # two trials
Finished = subprocess.CompletedProcess[str]


def assert_refused(done: Finished, code: int, *words: str) -> None:
    """One line on stderr that holds these words, nothing on stdout, no traceback."""
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("mps-advisor: ")
    for word in words:
        assert word in line


def report_of(done: Finished) -> dict[str, Any]:
    """The report on stdout, checked against the schema."""
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    jsonschema.validate(report, SCHEMA)
    return dict(report)


def trials(run: Path) -> list[Path]:
    return sorted((run / "trials").glob("*.json.gz"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads(gzip.decompress(path.read_bytes()))
    change(raw)
    path.write_bytes(gzip.compress(json.dumps(raw).encode()))


def without_stamp(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in ("created", "replayed")}


# ---------------------------------------------------------------- a whole run, and its replay


@dataclass
class Recorded:
    bench: Bench
    question: tuple[str, ...]
    done: Finished

    @property
    def path(self) -> Path:
        return self.bench.directory / "run"

    def replay(self, folder: Path, *more: str) -> Finished:
        return self.bench.run("--replay", str(folder), "--format", "json", *more)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """Up to two engines, where the second one pays only under MPS."""
    with make_bench(tmp_path_factory.mktemp("recorded")) as bench:
        bench.engine_faults({"all": {"tokens_per_s": [1000, 550], "tokens_per_s_mps": [1000, 900]}})
        question = ("--model", str(bench.tiny), *WORKLOAD, "--thread-percentages", "none", "--max-engines", "2")
        yield Recorded(bench, question, bench.run(*question, "--out", "run", "--format", "json"))


@pytest.fixture
def run(recorded: Recorded, tmp_path: Path) -> Path:
    """A copy of the recorded run, to be damaged."""
    return Path(shutil.copytree(recorded.path, tmp_path / "copy"))


def test_a_whole_profile_ends_with_a_verdict_and_leaves_nothing(recorded):
    report = report_of(recorded.done)

    assert recorded.done.returncode == 0
    best = report["recommendation"]
    assert (best["status"], best["engines"], best["mps"]) == ("recommend", 2, True)
    assert best["gain_vs_best_without_mps"]["low"] > 1.1
    assert {one["outcome"] for one in report["candidates"]} == {"ok", "skipped"}
    assert [path.name for path in trials(recorded.path)] == [
        "000-1-engine-no-mps.json.gz",
        "001-2-engines-no-mps.json.gz",
        "002-2-engines-mps.json.gz",
        "003-1-engine-mps.json.gz",
    ]
    assert json.loads((recorded.path / "report.json").read_text()) == report
    assert (recorded.bench.processes(), recorded.bench.gpu_processes(), recorded.bench.scratch()) == ([], [], [])


def test_the_evidence_names_no_place_of_this_machine(recorded):
    for path in trials(recorded.path):
        text = gzip.decompress(path.read_bytes()).decode()
        assert "<model>" in text
        assert not [place for place in (recorded.bench.temporary, recorded.bench.directory) if str(place) in text]


def test_progress_goes_to_stderr_with_one_line_per_trial(recorded):
    lines = recorded.done.stderr.splitlines()
    assert lines[0] == "recording in run"
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "1-engine-no-mps", "2-engines-no-mps", "2-engines-mps", "1-engine-mps",
    ]  # fmt: skip


def test_a_replay_gives_the_same_report(recorded):
    replayed = recorded.replay(recorded.path)
    assert (replayed.returncode, replayed.stderr) == (0, "")
    report = report_of(replayed)
    assert report["replayed"] is True
    assert without_stamp(report) == without_stamp(report_of(recorded.done))


def test_a_replay_needs_neither_gpu_nor_vllm_nor_mps(recorded):
    bare = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "advisor", "profile", "--replay", str(recorded.path), "--format", "json"]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=60, check=False)
    assert without_stamp(report_of(done)) == without_stamp(report_of(recorded.done))


def test_the_table_and_the_json_say_the_same(recorded):
    done = recorded.bench.run("--replay", str(recorded.path))
    assert (done.returncode, done.stderr) == (0, "")
    sentence = report_of(recorded.done)["recommendation"]["sentence"]
    assert " ".join(sentence.split()) in " ".join(done.stdout.split())


def test_a_profile_with_tuning_second_starts_and_curves_says_live_what_its_replay_says(bench):
    out = bench.directory / "full"
    asked = ("--model", str(bench.tiny), *WORKLOAD, "--thread-percentages", "none", "--max-engines", "2")
    bench.engine_faults({"all": {"tokens_per_s": 800, "steps": {"ms_per_token": 0.02}}})
    bench.gpu(gpm_values=[40.0, 30.0, 20.0, 10.0, 30.0])  # idle enough that the CPU may be the limit
    full = bench.environment | {"ADVISE_FULL": "1"}
    live = bench.run(*asked, "--out", str(out), "--format", "json", environment=full)
    assert live.returncode in (0, 4), live.stderr
    report = report_of(live)
    replayed = report_of(bench.run("--replay", str(out), *asked, "--format", "json", environment=full))
    assert without_stamp(replayed) == without_stamp(report)
    assert report["recommendation"]["status"] in ("recommend", "inconclusive"), report["recommendation"]["sentence"]
    assert report["core_s"] > 0
    # How many of its starts count depends on how fast the cores of this machine were meanwhile.
    several = [one for one in report["candidates"] if one["engines"] == 2 and len(one["curve"]) > 1]
    assert several and all([point["concurrency"] for point in one["curve"]] == [2, 4, 8] for one in several)
    assert {step["step"] for step in report["waterfall"]} <= {"tuned", "engines", "mps"}
    assert {(one["engines"], one["mps"]) for one in report["profile"]["overlaps"]} == {(2, False), (2, True)}
    assert report["profile"]["decode"]["step_ms"]["value"] > 0 and report["profile"]["host"]["low"] > 0
    rust = next(one for one in report["candidates"] if one["settings"] and one["settings"]["rust_front_end"])
    assert rust["outcome"] == "ok", rust["why_not"]
    assert all(one["limited_by"] for one in report["candidates"] if one["outcome"] == "ok")
    names = [path.name for path in trials(out)]
    assert any("1-engine-no-mps-repeat-1" in name for name in names)
    assert any("api2" in name for name in names) and any("load4" in name for name in names)
    assert bench.processes() == []


def test_the_fast_protocol_says_live_what_its_replay_says_and_starts_engines_twice(bench):
    out = bench.directory / "fast"
    asked = ("--model", str(bench.tiny), *WORKLOAD, "--thread-percentages", "none", "--max-engines", "2")
    bench.gpu(gpm_values=[40.0, 30.0, 20.0, 10.0, 30.0])
    live = bench.run(*asked, "--protocol", "fast", "--out", str(out), "--format", "json")
    assert live.returncode in (0, 4), live.stderr
    report = report_of(live)
    names = [path.name for path in trials(out)]
    assert names[:3] == [
        "000-1-engine-no-mps-of-2.json.gz", "001-2-engines-no-mps.json.gz", "002-2-engines-mps.json.gz",
    ]  # fmt: skip
    began = [json.loads(gzip.decompress(path.read_bytes()))["started"] for path in trials(out)[:3]]
    assert began[0] == began[1] != began[2]
    assert report["protocol"]["quick"] and "single_starts" in {one["code"] for one in report["warnings"]}
    assert {(one["engines"], one["mps"]) for one in report["candidates"] if one["outcome"] == "ok"} >= {
        (1, False), (2, False), (2, True),
    }  # fmt: skip
    replayed = bench.run("--replay", str(out), *asked, "--protocol", "fast", "--format", "json")
    assert without_stamp(report_of(replayed)) == without_stamp(report)
    other = bench.run("--replay", str(out), *asked, "--protocol", "full")
    assert_refused(other, 3, "--protocol fast, not full")
    assert (bench.processes(), bench.gpu_processes(), bench.scratch()) == ([], [], [])


def test_lengths_may_be_mixed_and_an_objective_that_nothing_meets_is_exit_4(bench):
    out = bench.directory / "mixed"
    asked = ("--model", str(bench.tiny), "--ctx", "32:96", "--osl", "8:24", "--concurrency", "8")
    asked += ("--thread-percentages", "none", "--max-engines", "1")
    live = bench.run(*asked, "--out", str(out), "--format", "json", "--slo", "ttft_p95=0.001ms")
    assert live.returncode == 4, live.stderr
    report = report_of(live)
    assert report["recommendation"]["status"] == "no_slo"
    assert "The nearest is 1 engine" in report["recommendation"]["sentence"]
    assert (report["workload"]["isl_range"], report["workload"]["osl_range"]) == ([32, 96], [8, 24])
    met = bench.run("--replay", str(out), *asked, "--format", "json", "--slo", "ttft_p95=60s")
    assert (met.returncode, report_of(met)["recommendation"]["engines"]) == (0, 1)


def test_the_report_on_disk_is_never_read(recorded, run):
    want = without_stamp(report_of(recorded.done))
    (run / "report.json").write_text("{ this is no report")
    assert without_stamp(report_of(recorded.replay(run))) == want
    (run / "report.json").unlink()
    assert without_stamp(report_of(recorded.replay(run))) == want


def test_one_changed_bin_changes_the_replayed_report(recorded, run):
    before = report_of(recorded.done)["candidates"][0]

    def add(raw: dict[str, Any]) -> None:
        load = raw["loads"][0]
        middle = (raw["window"][0] + raw["window"][1]) / 2
        load["tokens"][int((middle - load["bins_start_s"]) / load["bin_s"])] += 40.0

    rewrite(trials(run)[0], add)
    after = report_of(recorded.replay(run))["candidates"][0]

    assert (before["engines"], before["mps"], after["outcome"]) == (1, False, "ok")
    assert after["throughput_tok_per_s"]["value"] > before["throughput_tok_per_s"]["value"]


def test_evidence_that_is_not_attached_changes_the_verdict(recorded, run):
    rewrite(trials(run)[2], lambda raw: raw["mps"].update(clients_end=raw["mps"]["clients_end"][:1]))
    done = recorded.replay(run)
    report = report_of(done)
    under_mps = next(one for one in report["candidates"] if one["engines"] == 2 and one["mps"])
    assert (under_mps["outcome"], under_mps["throughput_tok_per_s"]) == ("not_attached", None)
    assert report["recommendation"]["mps"] is not True


def test_the_threshold_of_a_replay_is_the_one_that_is_asked_now(recorded):
    done = recorded.replay(recorded.path, "--min-gain", "300%")
    best = report_of(done)["recommendation"]
    assert (done.returncode, best["status"], best["mps"]) == (0, "recommend", False)
    assert "4.00×" in best["sentence"]


def test_a_replay_of_another_question_is_refused(recorded):
    for other in (("--model", "Qwen/Qwen2.5-0.5B"), ("--ctx", "128", *WORKLOAD[2:])):
        assert_refused(recorded.replay(recorded.path, *other), 3, "answers another question", "--ctx 64")


def test_a_trial_that_was_not_recorded_is_never_made_up(recorded, run):
    trials(run)[2].unlink()
    assert_refused(recorded.replay(run), 3, "holds no trial “2-engines-mps”", "it holds: 1-engine-no-mps, ")


def test_an_unfinished_file_is_ignored(recorded, run):
    (run / "trials" / ".004-2-engines-mps.json.gz.4711.tmp").write_bytes(b"\x1f\x8b half a tri")
    assert without_stamp(report_of(recorded.replay(run))) == without_stamp(report_of(recorded.done))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda data: data[: len(data) // 2], "cut short", id="cut short"),
        pytest.param(lambda data: b"", "", id="empty"),
        pytest.param(lambda data: data[:200] + b"\xff\xfe\xfd" + data[203:], "", id="flipped bytes"),
        pytest.param(lambda data: gzip.compress(b'{"schema_version": 1'), "damaged", id="half a JSON"),
        pytest.param(lambda data: gzip.compress(b'{"schema_version": 1}'), "`spec`", id="a field missing"),
        pytest.param(
            lambda data: gzip.compress(gzip.decompress(data).replace(b'"sent":', b'"Sent":')),
            "$.loads[0]",
            id="a field renamed",
        ),
    ],
)
def test_a_damaged_trial_is_named(recorded, run, damage, words):
    path = trials(run)[1]
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(recorded.replay(run), 3, str(path), words)


def test_a_newer_record_is_called_newer_and_not_damaged(recorded, run):
    for path, change in ((trials(run)[0], rewrite), (run / "manifest.json", rewrite_plain)):
        kept = path.read_bytes()
        change(path, lambda raw: raw.update(schema_version=99, unheard_of=True))
        assert_refused(recorded.replay(run), 3, str(path), "schema version 99", "update mps-advisor")
        path.write_bytes(kept)


def rewrite_plain(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_damaged_manifest_is_named(recorded, run):
    rewrite_plain(run / "manifest.json", lambda raw: raw["question"].update(min_gain="much"))
    assert_refused(recorded.replay(run), 3, "manifest.json", "$.question.min_gain")


def test_a_folder_without_a_run_is_named(recorded, tmp_path):
    assert_refused(recorded.replay(tmp_path / "nowhere"), 3, "nowhere", "manifest.json")


def test_replay_auto_without_a_fitting_run_lists_what_there_is(bench):
    done = bench.run("--model", str(bench.tiny), *WORKLOAD, "--replay", "auto")
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr
    head, *listed = done.stderr.splitlines()
    assert head.startswith("mps-advisor: no recorded run fits this question") and listed
    assert all(line.startswith("  ") for line in listed)


def test_replay_auto_needs_a_question(bench):
    assert_refused(bench.run("--replay", "auto"), 2, "--model and --ctx")


# ---------------------------------------------------------------- going on with a run


def test_a_run_folder_is_never_overwritten(recorded, run):
    before = (run / "manifest.json").read_bytes()
    done = recorded.bench.run("--model", str(recorded.bench.tiny), *SMALL, "--out", str(run))
    assert_refused(done, 3, "already holds a run", "--resume")
    assert (run / "manifest.json").read_bytes() == before


def test_resuming_with_another_question_is_refused(recorded, run):
    done = recorded.bench.run(
        "--model", str(recorded.bench.tiny), *SMALL, "--min-gain", "20%", "--resume", "--out", str(run)
    )
    assert_refused(done, 3, str(run), "another question")


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(recorded, run):
    bench, want = recorded.bench, [path.name for path in trials(run)]
    trials(run)[-1].unlink()
    kept = contents(run)
    process = bench.start(*recorded.question, "--out", str(run), "--resume")
    try:
        wait_for(bench.gpu_processes, process)  # in the middle of the trial that is missing
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # impatience must not leave a GPU behind
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()

    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "mps-advisor: interrupted; what was measured is kept, go on with --resume"
    assert (bench.processes(), bench.gpu_processes(), bench.scratch()) == ([], [], [])
    assert contents(run) == kept

    done = bench.run(*recorded.question, "--out", str(run), "--resume", "--format", "json")
    assert done.returncode == 0
    assert report_of(done)["recommendation"]["engines"] == 2
    assert [path.name for path in trials(run)] == want
    assert contents(run).items() >= kept.items()


def test_an_engine_killed_in_mid_trial_is_recorded_and_tried_once_more_and_the_verdict_stands(recorded, run):
    # Only the trial of two engines under MPS is still to do; one of its engine cores is killed under load.
    (doomed,) = [path for path in trials(run) if path.name.endswith("2-engines-mps.json.gz")]
    doomed.unlink()
    process = recorded.bench.start(*recorded.question, "--out", str(run), "--resume", "--format", "json")
    try:
        wait_for(lambda: any("load_worker" in line for line in recorded.bench.processes()), process)
        victims = recorded.bench.gpu_processes()
        os.kill(victims[0], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()

    assert process.returncode == 0
    report = json.loads(out)
    assert report["recommendation"]["status"] == "recommend"
    assert "Traceback" not in err
    names = [path.name[4:] for path in trials(run)]
    assert "2-engines-mps.json.gz" in names and "2-engines-mps-repeat-1.json.gz" in names
    killed = json.loads(
        gzip.decompress(next(p for p in trials(run) if p.name[4:] == "2-engines-mps.json.gz").read_bytes())
    )
    assert killed["ended"] == "crash"
    assert any(warning["code"] == "repeated" and "crash" in err for warning in report["warnings"])
    assert (recorded.bench.processes(), recorded.bench.gpu_processes(), recorded.bench.scratch()) == ([], [], [])


def test_resuming_a_finished_run_measures_nothing(recorded, run):
    kept = contents(run)
    # A program that ends at once could serve nothing.
    done = recorded.bench.run(*recorded.question, "--out", str(run), "--resume", "--format", "json", "--vllm", "false")
    assert done.returncode == 0
    assert without_stamp(report_of(done)) == without_stamp(report_of(recorded.done))
    assert contents(run) == kept


def contents(run: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in trials(run)}


def test_resuming_needs_a_folder(bench):
    assert_refused(bench.run("--model", str(bench.tiny), *SMALL, "--resume"), 2, "--resume needs --out")


def test_resuming_into_a_new_folder_that_cannot_be_written_is_one_line(bench):
    (bench.directory / "file").write_text("")
    done = bench.run("--model", str(bench.tiny), *SMALL, "--out", "file/run", "--resume")
    assert_refused(done, 3, "cannot write to file/run", "--out")


def test_sigterm_ends_a_run_as_ctrl_c_does(bench):
    process = bench.start("--model", str(bench.tiny), *SMALL, "--out", "run")
    try:
        wait_for(bench.gpu_processes, process)
        process.terminate()
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("mps-advisor: interrupted")
    assert (bench.processes(), bench.gpu_processes(), bench.scratch()) == ([], [], [])


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], limit_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.05)


def test_a_machine_that_doctor_calls_unfit_is_refused_before_anything_is_written(bench):
    wanted = bench.arguments("--model", str(bench.tiny), *SMALL, "--out", "run")
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 1024; exec "$@"', "limited", *wanted],
        env=bench.environment,
        cwd=bench.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert_refused(done, 3, "open files: limit 1024", "ulimit -n 65536", "doctor")
    assert not (bench.directory / "run").exists()


# ---------------------------------------------------------------- no honest answer


def test_engines_that_never_start_give_no_verdict_and_the_reason(bench):
    bench.engine_faults({"all": {"die_at_start": "oom"}})
    done = bench.run("--model", str(bench.tiny), *SMALL, "--out", "run", "--format", "json")

    assert done.returncode == 4
    report = report_of(done)
    assert report["recommendation"]["status"] == "inconclusive"
    assert {one["outcome"] for one in report["candidates"]} == {"oom", "skipped"}
    assert "ran out of GPU memory" in done.stderr
    assert (bench.processes(), bench.scratch()) == ([], [])


def test_a_model_that_does_not_fit_once_gives_the_sums(bench):
    giant = bench.model("giant", hidden_size=16384, intermediate_size=65536, num_hidden_layers=100)
    for more in ((), ("--dry-run",)):
        done = bench.run("--model", str(giant), *SMALL, "--out", "run", *more)
        assert_refused(done, 4, "one engine does not fit on NVIDIA H200", "weights + ", " GiB usable")
    assert not (bench.directory / "run").exists()


# ---------------------------------------------------------------- questions that are malformed


def test_an_unknown_model_is_one_line(bench):
    assert_refused(bench.run("--model", "nobody/nothing", *SMALL), 2, "unknown model 'nobody/nothing'", "Qwen2.5-0.5B")


def test_malformed_configurations_are_one_line(bench):
    folder = bench.model("broken")
    for text, word in (("{", "cannot be read as JSON"), ("[1]", "must hold a JSON object"), ("{}", "architectures")):
        (folder / "config.json").write_text(text)
        assert_refused(bench.run("--model", str(folder), *SMALL), 2, "config.json", word)


def test_an_unsupported_architecture_names_those_that_are(bench):
    folder = bench.model("other", architectures=["MambaForCausalLM"])
    assert_refused(bench.run("--model", str(folder), *SMALL), 3, "MambaForCausalLM", "Qwen2ForCausalLM")


def test_a_context_beyond_the_models_is_refused(bench):
    done = bench.run("--model", str(bench.tiny), "--ctx", "4090", "--osl", "16")
    assert_refused(done, 2, "4090 + 16 = 4106", "4096", "lower --ctx or --osl")


def test_a_tokenizer_without_plain_words_is_refused(bench):
    for text in ('{"model": null}', '{"model": {"vocab": {"Ġword": 0}}}', "["):
        (bench.tiny / "tokenizer.json").write_text(text)
        refused_here(bench, "tokenizer.json of this model cannot be used")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--ctx", "0"), "--ctx"),
        (("--ctx", "96:32"), "--ctx"),
        (("--ctx", "64", "--osl", "a"), "--osl"),
        (("--ctx", "64", "--concurrency", "many"), "--concurrency"),
        (("--ctx", "64", "--slo", "fast"), "--slo"),
        (("--ctx", "64", "--workload", "prefill", "--slo", "itl_p95=20ms"), "leave out itl_p95"),
        (("--ctx", "32:64", "--workload", "decode"), "--workload decode"),
        (("--ctx", "64", "--thread-percentages", "40,x"), "--thread-percentages"),
        (("--ctx", "64", "--thread-percentages", "0"), "--thread-percentages"),
        (("--ctx", "64", "--min-gain", "much"), "--min-gain"),
        (("--ctx", "64", "--gpu", "7"), "--gpu"),
        (("--ctx", "64", "--dtype", "int3"), "--dtype"),
        (("--ctx", "64", "--no-such-option"), "--no-such-option"),
        ((), "--ctx"),
    ],
)
def test_a_malformed_option_is_named(bench, options, word):
    done = bench.run("--model", str(bench.tiny), *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- machines that are unfit


def refused_here(bench: Bench, *words: str, environment: dict[str, str] | None = None) -> None:
    done = bench.run("--model", str(bench.tiny), *SMALL, "--out", "run", environment=environment)
    assert_refused(done, 3, *words)
    assert not (bench.directory / "run").exists()
    assert bench.scratch() == []


def test_a_machine_without_mps_programs_is_refused(bench):
    refused_here(
        bench, "nvidia-cuda-mps-control", "--replay", environment=bench.environment | {"PATH": "/usr/bin:/bin"}
    )


def test_a_gpu_in_mig_mode_is_refused(bench):
    bench.gpu(mig=True)
    refused_here(bench, "MIG is on", "--gpu")


def test_a_gpu_in_an_exclusive_mode_is_refused(bench):
    bench.gpu(compute_mode=3)
    refused_here(bench, "Exclusive_Process", "nvidia-smi -c DEFAULT")


def test_someone_elses_daemon_is_refused_and_left_alone(bench):
    pipe = bench.temporary / "their"
    pipe.mkdir()
    environment = bench.environment | {
        "CUDA_MPS_PIPE_DIRECTORY": str(pipe),
        "CUDA_MPS_LOG_DIRECTORY": str(pipe),
        "CUDA_VISIBLE_DEVICES": bench.gpu_uuid,
    }
    control = str(bench.programs / "nvidia-cuda-mps-control")
    subprocess.run([control, "-d"], env=environment, timeout=20, check=True)
    try:
        done = bench.run("--model", str(bench.tiny), *SMALL, "--out", "run")
        assert_refused(done, 3, "an MPS daemon", str(pipe), "quit it first")
        answer = subprocess.run(
            [control],
            env=environment,
            input="get_server_list\n",
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        assert answer.stdout == ""
    finally:
        subprocess.run([control], env=environment, input="quit\n", text=True, timeout=20, check=True)


def test_someone_elses_process_is_refused_and_left_alone(bench):
    bench.gpu(processes={str(os.getpid()): 1 << 30})
    done = bench.run("--model", str(bench.tiny), *SMALL, "--out", "run")
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr
    assert f"other processes use this GPU (PID {os.getpid()})" in done.stderr.splitlines()[-1]


def test_without_a_driver_the_line_names_the_replay(bench):
    bench.gpu(init_error=9)
    refused_here(bench, "no NVIDIA driver answers here", "--replay auto")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
def test_without_a_driver_the_real_nvml_says_so_too(bench):
    refused_here(bench, "no NVIDIA driver", "--replay auto", environment=bench.environment | {"PYTHONPATH": str(ROOT)})


# ---------------------------------------------------------------- what needs nothing


def test_a_dry_run_without_a_gpu_plans_for_one_and_touches_nothing(bench):
    bench.gpu(init_error=9)
    before = sorted(bench.directory.rglob("*"))
    environment = bench.environment | {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    question = ("--model", "qwen2.5-0.5b", "--ctx", "1024", "--dry-run")
    table = bench.run(*question, environment=environment)
    plan = bench.run(*question, "--format", "json", environment=environment)

    assert (table.returncode, table.stderr, plan.returncode, plan.stderr) == (0, "", 0, "")
    assert "No GPU here: planned for one NVIDIA H200" in " ".join(table.stdout.split())
    assert json.loads(plan.stdout)
    assert sorted(bench.directory.rglob("*")) == before
    assert list(bench.temporary.iterdir()) == []


def test_a_dry_run_beside_someone_elses_work_is_no_trouble(bench):
    bench.gpu(processes={str(os.getpid()): 1 << 30})
    done = bench.run("--model", str(bench.tiny), *SMALL, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")


def test_help_and_replay_import_nothing_heavy(recorded):
    for options, shown in ((("--help",), "Example: "), (("--replay", str(recorded.path)), "To run it:")):
        command = [sys.executable, "-X", "importtime", "-m", "advisor", "profile", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert shown in done.stdout
        assert "typer" in imported  # the listing is there
        assert not imported & {"pandas", "sklearn", "torch", "vllm", "aiohttp", "huggingface_hub", "pynvml"}


def test_a_reader_that_goes_away_is_no_traceback(recorded):
    process = recorded.bench.start("--replay", str(recorded.path), "--format", "json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 1
    assert err == ""
