"""What of the benchmarks can be tested without a GPU."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from gpm_lag import best_lag_s, share_on
from variations import variation

from advisor.core.starts import same_start
from advisor.core.tried import key
from advisor.shell.store import RunFolder

MANIFEST = RunFolder(ROOT / "data" / "h200-qwen2.5-0.5b-serve-1024").manifest()


@pytest.mark.parametrize("lag", [0.0, 0.15, 0.4])
def test_the_lag_of_samples_behind_a_switched_load_is_found(lag):
    stretches = [(2.0 * n, 2.0 * n + 1.0) for n in range(15)]
    at_s = [2.5 + 0.1 * n for n in range(200)]
    values = [100 * share_on(stretches, at - 0.1 - lag, at - lag) for at in at_s]
    found, correlation = best_lag_s(stretches, at_s, [0.1] * len(at_s), values)
    assert found == pytest.approx(lag, abs=0.011)
    assert correlation > 0.99


def test_a_variation_is_what_its_name_says():
    spec = variation(MANIFEST, "1m+api2+idle2+cores2+window30+loaded64+split", 7)
    assert (spec.engines, spec.idle_engines, spec.mps, spec.repeat, spec.split_cores) == (1, 2, True, 7, True)
    assert spec.settings.api_server_count == 2
    assert [len(cores) for cores in spec.engine_cores] == [2, 2, 2]
    assert (spec.protocol.measure_min_s, spec.workload.concurrency) == (30.0, 64)


def test_another_window_of_a_start_shares_its_engines_but_not_its_prompts():
    first = variation(MANIFEST, "1+api2", 3)
    again = variation(MANIFEST, "1+api2+spread50+again", 4, first)
    with pytest.raises(ValueError, match="asks for other engines"):
        variation(MANIFEST, "1+again", 5, first)
    with pytest.raises(ValueError, match="is the first"):
        variation(MANIFEST, "1+again", 0)
    with pytest.raises(ValueError, match="without a core"):
        variation(MANIFEST, "4+load8", 0)
    assert same_start(first, again) and key(first) != key(again)
    assert (again.workload.osl_spread, again.workload.seed == first.workload.seed) == (64, False)
    assert not same_start(first, variation(MANIFEST, "1+api2", 4, first))


def test_cores_for_more_load_generators_are_taken_from_the_engine():
    usual, more, fewer = (variation(MANIFEST, name, 0) for name in ("1", "1+load8", "1+load2"))
    assert (len(usual.load_cores), len(more.load_cores), len(fewer.load_cores)) == (4, 8, 2)
    assert not set(more.load_cores) & set(more.engine_cores[0]) and len(more.engine_cores[0]) == 8
    assert fewer.engine_cores == usual.engine_cores


def test_a_variation_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="is no variation"):
        variation(MANIFEST, "1+turbo", 0)


@pytest.mark.parametrize("name", ["variations.py", "gpm_lag.py", "core_flicker.py", "gpu_steps.py", "fault_drill.py"])
def test_a_benchmark_explains_itself(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "python benchmarks/" in done.stdout


@pytest.mark.parametrize(
    ("fault", "code", "kept"),
    [
        ("core", 0, ["2-engines-mps crash", "2-engines-mps-repeat-1 completed"]),
        ("server", 0, ["2-engines-mps crash", "2-engines-mps-repeat-1 completed"]),
        ("ctrl-c", 130, []),
        ("killed", 0, ["2-engines-mps completed"]),
    ],
)
def test_a_drill_strikes_and_tells_what_became_of_it(bench, fault, code, kept):
    bench.engine_faults({"all": {"tokens_per_s": [1000, 550], "tokens_per_s_mps": [1000, 900]}})
    words = [sys.executable, str(ROOT / "benchmarks" / "fault_drill.py"), "--model", str(bench.tiny), "--out", "drill"]
    words += ["--fault", fault, "--ctx", "64", "--osl", "16", "--concurrency", "8", "--after-s", "0.3"]
    words += ["--vllm", shlex.join(bench.vllm), "--command", shlex.join(bench.command())]
    done = subprocess.run(
        words, env=bench.environment, cwd=bench.directory, capture_output=True, text=True, timeout=110, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    again = ["left", "end"] if fault == "killed" else []
    assert [line["at"] for line in lines] == ["before", "strike", "end", *again, "after"]
    end, after = lines[-2:]
    assert (end["exit_code"], end["traceback"], after["as_before"]) == (code, False, True), end
    told = [f"{one['trial'][4:-8]} {one['ended']}" for one in end["kept"]]
    assert told[:2] == ["1-engine-no-mps completed", "2-engines-no-mps completed"]
    assert [one for one in told if one.startswith("2-engines-mps")] == kept
    if fault == "killed":
        assert (lines[2]["exit_code"], lines[3]["as_before"], len(lines[3]["daemons"])) == (-9, False, 1)
        assert any("that is cleared away" in line for line in end["said"])
    assert (bench.processes(), bench.scratch(), bench.ledgers()) == ([], [], [])
