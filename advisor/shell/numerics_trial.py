"""The numerics trial: the model's own matrix products in real MPS clients, one percentage after another."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from advisor.core import numerics as products
from advisor.core.errors import Unfit
from advisor.core.records import SCHEMA_VERSION, MpsEvidence, RawNumerics, RawTrial, Teardown, TrialSpec
from advisor.shell import mps, numerics
from advisor.shell.clock import Clock, now
from advisor.shell.gpu import Nvml
from advisor.shell.interrupts import Say, uninterrupted, whole
from advisor.shell.patience import DRIVER_FORGETS_S, NUMERICS_QUIT_S, NUMERICS_S
from advisor.shell.place import Place
from advisor.shell.processes import child_environment


def numerics_trial(place: Place, nvml: Nvml, spec: TrialSpec, say: Say) -> tuple[RawTrial, bool]:
    """The raw record, and whether somebody asked to stop while the daemon was being ended. Nothing else may run."""
    if place.control is None or spec.settings is None:
        raise Unfit("nvidia-cuda-mps-control is not on PATH; install the NVIDIA driver's MPS programs")
    uuid = place.gpu_uuid
    clock = Clock()
    before = nvml.memory_used_bytes(uuid)
    raw: RawNumerics | None = None
    detail, steps, daemon_left, stop = "", [], False, False
    clock.stage("check products")
    daemon: mps.Daemon | None = None
    try:
        with whole():
            directory = Path(tempfile.mkdtemp(prefix="t", dir=place.scratch))
            daemon = mps.Daemon.start(directory, place.control, uuid)
            place.note([daemon.pid] if daemon.pid else [])
        say(f"checking matrix products at {', '.join(f'{p} %' for p in spec.percentages)}")
        raw = numerics.check(
            spec.percentages,
            products.products(place.manifest.model, spec.settings, spec.batch_sizes),
            daemon.client_environment,
            child_environment({"CUDA_VISIBLE_DEVICES": uuid}),
            sys.executable,
            NUMERICS_S,
            dtype=place.manifest.model.dtype,
        )
    except mps.MpsQueryError as failure:
        detail = f"MPS: {failure}"
    finally:
        if daemon is not None:
            with uninterrupted(say) as interrupted:
                steps = daemon.quit(NUMERICS_QUIT_S)
                daemon_left = not daemon.gone()
            stop = interrupted.asked
    clock.stage("teardown")
    deadline = time.monotonic() + DRIVER_FORGETS_S
    while nvml.compute_processes(uuid) and time.monotonic() < deadline:
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
        mps=MpsEvidence(daemon=daemon is not None, servers_start=[], servers_end=[], clients_start=[], clients_end=[]),
        foreign_pids=[],
        teardown=Teardown(
            seconds=0.0,
            steps=steps,
            left_pids=[],
            daemon_left=daemon_left,
            memory_before_bytes=before,
            memory_after_bytes=nvml.memory_used_bytes(uuid),
        ),
        numerics=raw,
        timeline=clock.stages,
    )
    return raw_trial, stop
