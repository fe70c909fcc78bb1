"""A bench for tests of the whole tool: stub programs and an NVML module, installed where the tool looks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from stubs import fake_nvml, nvidia_cuda_mps_control  # noqa: E402


@dataclass
class Bench:
    """Where the stubs live and what the tool is run with."""

    directory: Path
    environment: dict[str, str]

    def engine_faults(self, faults: dict[str, Any]) -> None:
        (self.directory / "vllm_faults.json").write_text(json.dumps(faults))

    def mps_faults(self, faults: dict[str, Any]) -> None:
        (self.directory / "bin" / "mps_stub_faults.json").write_text(json.dumps(faults))

    def gpu_processes(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "nvml.json").read_text())["processes"])

    def arguments(self, *more: str) -> list[str]:
        server = f"{sys.executable} {HERE / 'stubs' / 'vllm_server.py'}"
        return [sys.executable, str(HERE / "stubs" / "advise.py"), "profile", "--vllm", server, *more]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.arguments(*more),
            env=self.environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(*more),
            env=self.environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    def processes(self, words: Sequence[str] = ("vllm_server.py", "load_worker", "mps_control")) -> list[str]:
        """Command lines of processes of this bench that are still there."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (path / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if any(word in line for word in words) and str(self.directory) in environment + line:
                found.append(line)
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    modules = tmp_path / "modules"
    programs = tmp_path / "bin"
    modules.mkdir()
    programs.mkdir()
    fake_nvml.install(modules)
    nvidia_cuda_mps_control.install(programs)
    state = tmp_path / "nvml.json"
    state.write_text(json.dumps({"processes": {}}))
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
    environment = {
        **kept,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{modules}:{ROOT}",
        "FAKE_NVML_STATE": str(state),
        "VLLM_STUB_FAULTS": str(tmp_path / "vllm_faults.json"),
        "HF_HUB_OFFLINE": "1",
    }
    yield Bench(tmp_path, environment)
