"""A place to run trials in, on a bench: what `profile` prepares, without the command line."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import psutil
import pytest
from conftest import TINY, Bench
from stubs import advise

from advisor.core import specs, validity
from advisor.core.model import facts
from advisor.core.records import (
    SCHEMA_VERSION,
    EngineSettings,
    Manifest,
    Protocol,
    Question,
    RawTrial,
    Software,
    Workload,
)
from advisor.core.vocabulary import build_tokenizer, words_of
from advisor.shell import hub, mps
from advisor.shell.gpu import Nvml
from advisor.shell.live import Live
from advisor.shell.place import Place
from advisor.shell.start import Start
from advisor.shell.store import RunFolder
from advisor.shell.trial import EngineTrial

SETTINGS = EngineSettings(
    max_num_batched_tokens=2048,
    max_num_seqs=64,
    max_cudagraph_capture_size=128,
    enable_prefix_caching=True,
    async_scheduling=True,
    kv_cache_memory_bytes=0,
    max_model_len=4096,
    gpu_memory_utilization=0.05,
    dtype="bfloat16",
    quantization=None,
    kv_cache_dtype="auto",
    load_format="auto",
)
QUESTION = Question(
    workload=Workload(kind="serve", isl=64, osl=16, concurrency=8, osl_spread=3),
    max_engines=4,
    thread_percentages="none",
    min_gain=0.1,
)


@dataclass
class Site:
    """A place to run trials in, and the trials."""

    bench: Bench
    place: Place
    nvml: Nvml

    def spec(self, engines: int, *, mps: bool = True, **protocol: float):
        spec = specs.load_spec(self.place.manifest, engines, mps=mps)
        assert spec.protocol is not None
        return msgspec.structs.replace(spec, protocol=msgspec.structs.replace(spec.protocol, **protocol))

    def renew(self) -> None:
        """What a run that goes on prepares again: the scratch directory, with the model's folder in it."""
        hub.prepare_folder(self.place.manifest.model, None, self.place.model_folder)

    def run(self, engines: int = 1, *, mps: bool = True, say=lambda text: None, **protocol: float) -> RawTrial:
        spec = self.spec(engines, mps=mps, **protocol)
        start = Start(self.place, self.nvml, spec)
        try:
            raw = EngineTrial(start, spec, "now", say).run()
        finally:
            ended = start.end(say)
        return ended.complete(raw)


def short(**changes: float) -> Protocol:
    return msgspec.structs.replace(advise.protocol(), **changes)


@contextmanager
def make_site(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(mps, "_SIGNAL_WAIT_S", 0.5)  # the stand-ins end at once
    for name in ("PATH", "PYTHONPATH", "TMPDIR", "FAKE_NVML_STATE", "VLLM_STUB_FAULTS"):
        monkeypatch.setenv(name, bench.environment[name])
    monkeypatch.setattr(tempfile, "tempdir", str(bench.temporary))
    found = importlib.util.spec_from_file_location("pynvml", bench.directory / "modules" / "pynvml.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "pynvml", module)

    model = facts("tiny", TINY)
    scratch = bench.temporary / "s"
    folder = hub.prepare_folder(model, None, scratch / "model")
    with Nvml() as nvml:
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            created="now",
            question=QUESTION,
            protocol=short(stall_timeout_s=1.0, teardown_timeout_s=2.0),
            model=model,
            gpu=nvml.find(),
            host=advise.host_facts(None),
            software=Software(advisor="test", python="3", vllm="0.26.0", torch=None, environment={}),
            settings=SETTINGS,
        )
        place = Place(
            manifest=manifest,
            model_folder=folder,
            tokenizer=folder / "tokenizer.json",
            words=words_of(build_tokenizer(model.vocab_size)[0]),
            vllm_command=bench.vllm,
            scratch=scratch,
            control=mps.binaries().control,
            scrub={str(folder): "<model>", str(scratch): "<scratch>"},
        )
        yield Site(bench, place, nvml)
    # However a trial ended: no process, and nothing on the GPU.
    assert bench.processes() == []
    assert bench.gpu_processes() == []


def codes(raw: RawTrial) -> list[str]:
    return [fault.code for fault in validity.judge(raw)]


def engine_cores(bench: Bench) -> list[psutil.Process]:
    found = []
    for pid in bench.gpu_processes():
        process = psutil.Process(pid)
        assert "VLLM::EngineCore" in process.cmdline()
        found.append(process)
    return found


def assert_nothing_left(raw: RawTrial) -> None:
    done = raw.teardown
    assert done is not None
    assert (done.left_pids, done.daemon_left) == ([], False)
    assert done.memory_before_bytes == done.memory_after_bytes


def wait_for(condition, limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def live(site: Site, say=lambda text: None) -> tuple[Live, RunFolder]:
    folder = RunFolder(site.bench.directory / "run")
    if not folder.exists:
        folder.create(site.place.manifest)
    return Live(site.place, folder, say), folder
