"""A bench for tests of the whole tool: stub programs and an NVML module, installed where the tool looks."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

HERE = Path(__file__).parent
# A shell starts background jobs with interrupts ignored, and children inherit that: tests that send one would hang.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from stubs import fake_nvml, nvidia_cuda_mps_control  # noqa: E402

TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutations", type=int, default=0, help="how many damaged records to try (test_damage.py)")
    parser.addoption("--soak", type=int, default=0, help="how many profiles with random faults to run (test_soak.py)")


@dataclass
class Bench:
    """Where the stubs live and what the tool is run with. Its GPU is its own, so that benches do not meet."""

    directory: Path
    temporary: Path  # TMPDIR of the tool; short, since sockets live there
    gpu_uuid: str
    environment: dict[str, str]

    @property
    def vllm(self) -> list[str]:
        return [sys.executable, str(HERE / "stubs" / "vllm_server.py")]

    @property
    def programs(self) -> Path:
        return self.directory / "bin"

    @property
    def tiny(self) -> Path:
        """A folder with the config.json of a very small model; its weights have to be made up."""
        return self.model("tiny")

    def model(self, name: str, **changes: Any) -> Path:
        """A model's folder: the tiny configuration with some fields changed."""
        folder = self.directory / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(TINY | changes))
        return folder

    def engine_faults(self, faults: dict[str, Any]) -> None:
        (self.directory / "vllm_faults.json").write_text(json.dumps(faults))

    def mps_faults(self, **faults: int) -> None:
        nvidia_cuda_mps_control.set_faults(self.programs, **faults)

    def gpu(self, **state: Any) -> None:
        """Change what the GPU's driver says (see fake_nvml)."""
        path = self.directory / "nvml.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | state))

    def gpu_processes(self) -> list[int]:
        """Engine cores that hold memory on the GPU."""
        told = [int(path.name) for path in (self.directory / "gpu_processes").iterdir() if path.name.isdecimal()]
        return [pid for pid in told if _runs(pid)]

    def arguments(self, *more: str) -> list[str]:
        return self.command("profile", "--vllm", shlex.join(self.vllm), *more)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, str(HERE / "stubs" / "advise.py"), *words]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.arguments(*more),
            env=self.environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *more: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(*more),
            env=self.environment if environment is None else environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    def processes(self) -> list[str]:
        """Command lines of all processes that were started here and are still there."""
        found = []
        for process in psutil.process_iter():
            try:
                words = [*process.cmdline(), *process.environ().values()]
                if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found += [" ".join(process.cmdline())] if any(str(self.directory) in word for word in words) else []
            except psutil.Error:
                continue
        return found

    def ledgers(self) -> list[str]:
        """What the tool wrote down of runs that are not over, or were killed."""
        return [path.name for path in self.temporary.glob("mps-advisor-*/*.run")]

    def scratch(self) -> list[str]:
        """What the tool left in its directory for temporary files, the lock apart."""
        return [path.name for path in self.temporary.iterdir() if not path.name.startswith("mps-advisor-")]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def make_bench(directory: Path) -> Iterator[Bench]:
    modules, programs, held = directory / "modules", directory / "bin", directory / "gpu_processes"
    for folder in (modules, programs, held):
        folder.mkdir()
    gpu_uuid = f"GPU-{uuid.uuid4()}"
    module = fake_nvml.install(modules)
    module.write_text(module.read_text() + f"\nUUIDS = [{gpu_uuid!r}, *UUIDS[1:]]\n")
    nvidia_cuda_mps_control.install(programs)
    state = directory / "nvml.json"
    state.write_text(json.dumps({"processes_dir": str(held)}))
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="b", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        environment = {
            **kept,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{modules}:{ROOT}",
            "TMPDIR": temporary,
            "FAKE_NVML_STATE": str(state),
            "VLLM_STUB_FAULTS": str(directory / "vllm_faults.json"),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(directory / "hf"),
        }
        bench = Bench(directory, Path(temporary), gpu_uuid, environment)
        # Slow enough that a busy machine keeps up: what is tested is the path, not the speed.
        bench.engine_faults({"all": {"tokens_per_s": 1000}})
        yield bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with make_bench(tmp_path) as made:
        yield made


@pytest.fixture
def site(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from sites import make_site

    with make_site(bench, monkeypatch) as made:
        yield made
