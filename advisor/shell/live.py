"""The Runner that measures on this machine, and everything that has to be true before it may."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from advisor.core import numerics as products
from advisor.core.errors import Unfit
from advisor.core.records import SCHEMA_VERSION, MpsEvidence, RawNumerics, RawTrial, Teardown, TrialSpec
from advisor.core.tried import key, slug
from advisor.shell import mps, numerics
from advisor.shell.clock import now
from advisor.shell.gpu import Nvml
from advisor.shell.lock import GpuLock
from advisor.shell.processes import child_environment
from advisor.shell.store import RunFolder
from advisor.shell.trial import Clock, LoadTrial, Place, uninterrupted, whole

NUMERICS_TIMEOUT_S = 240.0


def scratch_directory() -> Path:
    """A directory with a short path: sockets live in it, and their paths may hold 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="mpsa-"))


class Live:
    """Measures each spec once; what the run folder already holds is not measured again."""

    def __init__(self, place: Place, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._place, self._folder, self._say = place, folder, say
        self._recorded = folder.recorded()
        self._lock = GpuLock(place.manifest.gpu.uuid)
        self._nvml = Nvml()

    def __enter__(self) -> Self:
        self._lock.__enter__()
        try:
            self._nvml.__enter__()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._nvml.__exit__(kind, error, trace)
        self._lock.__exit__(kind, error, trace)
        shutil.rmtree(self._place.scratch, ignore_errors=True)

    def run(self, spec: TrialSpec) -> RawTrial:
        """The recorded trial, or a fresh one, recorded before it is returned."""
        if found := self._recorded.get(key(spec)):
            if found.gpu_uuid != self._place.manifest.gpu.uuid:
                raise Unfit(
                    f"trial “{slug(spec)}” was recorded on another GPU ({found.gpu_uuid}); choose another --out"
                )
            return found

        def say(text: str) -> None:
            self._say(f"{slug(spec)}: {text}")

        if spec.kind == "numerics":
            raw, interrupted = self._numerics(spec, say)
        else:
            trial = LoadTrial(self._place, self._nvml, spec, now(), say)
            raw = trial.run()
            interrupted = trial.interrupted
        self._folder.append(raw)
        self._recorded[key(spec)] = raw
        self._refuse_leftovers(raw)
        if interrupted:
            raise KeyboardInterrupt
        return raw

    def _refuse_leftovers(self, raw: RawTrial) -> None:
        left = raw.teardown
        if left is not None and (left.left_pids or left.daemon_left):
            what = f"PID {', '.join(map(str, left.left_pids))}" if left.left_pids else "the MPS daemon"
            raise Unfit(f"{what} could not be ended after trial “{slug(raw.spec)}”; end it, then go on with --resume")

    def _numerics(self, spec: TrialSpec, say: Callable[[str], None]) -> tuple[RawTrial, bool]:
        """The model's own matrix products in real MPS clients, one percentage after another.

        The second value says whether somebody asked to stop while the daemon was being ended.
        """
        if self._place.control is None or spec.settings is None:
            raise Unfit("nvidia-cuda-mps-control is not on PATH; install the NVIDIA driver's MPS programs")
        uuid = self._place.manifest.gpu.uuid
        clock = Clock()
        before = self._nvml.memory_used_bytes(uuid)
        raw: RawNumerics | None = None
        detail, steps, daemon_left, stop = "", [], False, False
        clock.stage("check products")
        daemon: mps.Daemon | None = None
        try:
            with whole():
                directory = Path(tempfile.mkdtemp(prefix="t", dir=self._place.scratch))
                daemon = mps.Daemon.start(directory, self._place.control, uuid)
            say(f"checking matrix products at {', '.join(f'{p} %' for p in spec.percentages)}")
            raw = numerics.check(
                spec.percentages,
                products.products(self._place.manifest.model, spec.settings, spec.batch_sizes),
                daemon.client_environment,
                child_environment({"CUDA_VISIBLE_DEVICES": uuid}),
                sys.executable,
                NUMERICS_TIMEOUT_S,
                dtype=self._place.manifest.model.dtype,
            )
        except mps.MpsQueryError as failure:
            detail = f"MPS: {failure}"
        finally:
            if daemon is not None:
                with uninterrupted(say) as interrupted:
                    steps = daemon.quit(20.0)
                    daemon_left = not daemon.gone()
                stop = interrupted.asked
        clock.stage("teardown")
        deadline = time.monotonic() + 20.0
        while self._nvml.compute_processes(uuid) and time.monotonic() < deadline:
            time.sleep(0.1)
        clock.close()
        raw_trial = RawTrial(
            schema_version=SCHEMA_VERSION,
            spec=spec,
            created=now(),
            ended="crash" if raw is None else "completed",
            detail=detail,
            gpu_uuid=uuid,
            window=None,
            engines=[],
            loads=[],
            cpu=[],
            steal_s=None,
            gpu=None,
            mps=MpsEvidence(
                daemon=daemon is not None, servers_start=[], servers_end=[], clients_start=[], clients_end=[]
            ),
            foreign_pids=[],
            teardown=Teardown(
                seconds=0.0,
                steps=steps,
                left_pids=[],
                daemon_left=daemon_left,
                memory_before_bytes=before,
                memory_after_bytes=self._nvml.memory_used_bytes(uuid),
            ),
            numerics=raw,
            timeline=clock.stages,
        )
        return raw_trial, stop


def refuse_unfit(control: Path | None, others: Sequence[mps.ForeignDaemon]) -> None:
    """Refuse a machine whose MPS is missing or in someone else's hands."""
    if control is None:
        raise Unfit(
            "nvidia-cuda-mps-control is not on PATH; install the NVIDIA driver's MPS programs, or see --replay auto"
        )
    if others:
        first = others[0]
        where = f" in {first.pipe_directory}" if first.pipe_directory else ""
        raise Unfit(
            f"an MPS daemon of {first.user} already runs{where} (PID {first.pid}); clients of two daemons only take "
            "turns, so nothing measured would be true: quit it first"
        )
