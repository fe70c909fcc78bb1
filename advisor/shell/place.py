"""Where trials run and what they are made of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advisor.core.records import Manifest


@dataclass
class Place:
    """The same for all trials of a profile."""

    manifest: Manifest
    model_folder: Path
    tokenizer: Path
    words: Sequence[str]
    vllm_command: Sequence[str]
    scratch: Path
    control: Path | None
    scrub: Mapping[str, str]
    # Where processes of ours are written down, for whoever has to clear up after a run that was killed.
    note: Callable[[Iterable[int]], None] = lambda pids: None

    @property
    def gpu_uuid(self) -> str:
        return self.manifest.gpu.uuid


def default_vllm_command() -> list[str]:
    """vLLM's own entry point, run by this interpreter."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]
