"""What a GPU can do at best: asked once, kept, and never in the way of a profile."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import msgspec
import pytest
from test_terminal import report

from advisor.core.records import Ceilings
from advisor.shell.ceilings import cache_folder, measured

GPU = report().gpu
ANSWER = {"copy_bytes_per_s": 4e12, "bf16_flops_per_s": 7e14}


def worker(tmp_path, code: str) -> list[str]:
    path = tmp_path / "worker.py"
    path.write_text(f"open({str(tmp_path / 'asked')!r}, 'a').write('x')\n{code}\n")
    return [str(path)]


def test_ceilings_are_measured_once_for_a_gpu_and_driver(tmp_path):
    told = worker(tmp_path, f"print('{json.dumps(ANSWER)}')")
    first, again = (measured(GPU, tmp_path / "cache", told) for _ in range(2))
    assert first == again == Ceilings(**ANSWER, source="measured")
    assert (tmp_path / "asked").read_text() == "x"
    assert measured(msgspec.structs.replace(GPU, driver="1.0"), tmp_path / "cache", told) == first
    assert (tmp_path / "asked").read_text() == "xx"


@pytest.mark.parametrize(
    "code", ["raise RuntimeError('no torch')", "print('hello')", "print('{\"copy_bytes_per_s\": 1e12}')",
             "print('{\"copy_bytes_per_s\": 1e12, \"bf16_flops_per_s\": 0}')"],
)  # fmt: skip
def test_what_cannot_be_measured_is_left_open_and_not_kept(tmp_path, code):
    assert measured(GPU, tmp_path / "cache", worker(tmp_path, code)) is None
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_measured_again(tmp_path):
    told = worker(tmp_path, f"print('{json.dumps(ANSWER)}')")
    measured(GPU, tmp_path / "cache", told)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    assert measured(GPU, tmp_path / "cache", told) == Ceilings(**ANSWER, source="measured")


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "cache").write_text("a file, no folder")
    assert measured(GPU, tmp_path / "cache", worker(tmp_path, f"print('{json.dumps(ANSWER)}')")) is not None


def test_the_cache_is_where_users_keep_theirs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mps-advisor"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "mps-advisor"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_the_worker_measures_a_cpu_too():
    argv = [sys.executable, "-m", "advisor.shell.ceilings_worker", "cpu"]
    found = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert found["copy_bytes_per_s"] > 1e6 and found["bf16_flops_per_s"] > 1e5
