"""The one door to NVML: what the GPU is, who is on it, and how busy it was during a trial.

pynvml is imported when a connection is opened, so importing this module needs neither driver nor GPU.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from advisor.core.errors import BadQuestion, Unfit
from advisor.core.records import GpuFacts, GpuSamples
from advisor.shell.patience import SAMPLER_STOP_S as _STOP_TIMEOUT_S

Answer = TypeVar("Answer")

PCI_DEVICES = Path("/sys/bus/pci/devices")

# FP32 lanes per SM: 64 on these compute capabilities, 128 on the others that vLLM supports (CUDA C++ Programming
# Guide, throughput of native arithmetic instructions). NVML counts lanes, not SMs.
_LANES_64 = {(6, 0), (7, 0), (7, 2), (7, 5), (8, 0)}
_COMPUTE_MODES = {0: "Default", 1: "Exclusive_Thread", 2: "Prohibited", 3: "Exclusive_Process"}
# "not supported", "no permission", "function not found": the driver has no answer, now or later.
_NO_ANSWER = {3, 4, 13}
# Graphics active, SM active, SM occupancy, any tensor active, DRAM bandwidth; the order of GpuSamples' lists.
_GPM_METRICS = (1, 2, 3, 5, 10)
# NVML wants the two samples of a pair at least this far apart.
_GPM_INTERVAL_MIN_S = 0.1


class Nvml:
    """A connection to the driver, for use in `with`. Every failure leaves as an AdvisorError of one line."""

    def __init__(self, pci_devices: Path = PCI_DEVICES) -> None:
        self._pci_devices = pci_devices
        self._handles: dict[str, object] = {}
        self._lib: Any = None

    def __enter__(self) -> Self:
        """Raises Unfit when no driver answers."""
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise Unfit(
                f"no NVIDIA driver answers here (NVML: {error}); "
                "run on a GPU machine, or add --replay auto to see a recorded run"
            ) from error
        self._lib = pynvml
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lib, self._lib = self._lib, None
        self._handles.clear()
        if lib is not None:
            with suppress(lib.NVMLError):
                lib.nvmlShutdown()

    def find(self, selector: str | None = None) -> GpuFacts:
        """The GPU that `selector` means: None the first, "1" an index, "GPU-…" a UUID or a prefix of just one.

        Raises BadQuestion, listing the GPUs there are, for a selector that means none or several; Unfit when
        the driver shows no GPU or does not describe it.
        """
        with self._unfit("listing the GPUs"):
            count = int(self._lib.nvmlDeviceGetCount())
        if count == 0:
            raise Unfit(
                "the NVIDIA driver answers but shows no GPU; give this machine or container a GPU, "
                "or add --replay auto to see a recorded run"
            )
        index = self._index(selector, count)
        with self._unfit(f"describing GPU {index}"):
            return self._describe(index)

    def compute_processes(self, uuid: str) -> dict[int, int | None]:
        """Every process with a context on the GPU, clients of MPS included: PID to bytes, None where unknown."""
        held: dict[int, int | None] = {}
        with self._unfit(f"listing the processes on {uuid}"):
            handle = self._handle(uuid)
            for listing in (
                self._lib.nvmlDeviceGetComputeRunningProcesses,
                self._lib.nvmlDeviceGetMPSComputeRunningProcesses,
                self._lib.nvmlDeviceGetGraphicsRunningProcesses,
            ):
                for process in self._optional(listing, handle) or []:
                    known = held.get(process.pid)
                    used = process.usedGpuMemory
                    held[process.pid] = known if used is None else max(used, known or 0)
        return held

    def memory_used_bytes(self, uuid: str) -> int | None:
        """Memory in use on the GPU, what the driver reserves for itself included."""
        with self._unfit(f"reading the memory of {uuid}"):
            memory = self._optional(self._lib.nvmlDeviceGetMemoryInfo, self._handle(uuid))
        return None if memory is None else int(memory.used)

    def energy_j(self, uuid: str) -> float | None:
        """Energy drawn since the driver was loaded, in joules."""
        with self._unfit(f"reading the energy of {uuid}"):
            millijoules = self._optional(self._lib.nvmlDeviceGetTotalEnergyConsumption, self._handle(uuid))
        return None if millijoules is None else millijoules / 1000

    def numa_node(self, uuid: str) -> int | None:
        """The NUMA node the GPU's PCI slot hangs on, None where the platform does not say."""
        with self._unfit(f"reading the PCI address of {uuid}"):
            pci = self._optional(self._lib.nvmlDeviceGetPciInfo, self._handle(uuid))
        if pci is None:
            return None
        # NVML writes eight digits of domain, sysfs four.
        domain, slot = _text(pci.busId).lower().split(":", 1)
        try:
            node = int((self._pci_devices / f"{int(domain, 16):04x}:{slot}" / "numa_node").read_text())
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None

    # Used by Sampler, which wants NVML's own error to know when to stop.

    def device_row(self, uuid: str) -> tuple[float | None, int | None, int | None, int | None]:
        """Power in watts, SM clock in MHz, memory used in bytes, clock event reasons. Raises pynvml.NVMLError."""
        handle = self._handle(uuid)
        power = self._optional(self._lib.nvmlDeviceGetPowerUsage, handle)
        memory = self._optional(self._lib.nvmlDeviceGetMemoryInfo, handle)
        return (
            None if power is None else power / 1000,
            self._optional(self._lib.nvmlDeviceGetClockInfo, handle, self._lib.NVML_CLOCK_SM),
            None if memory is None else int(memory.used),
            self._optional(self._lib.nvmlDeviceGetCurrentClocksEventReasons, handle),
        )

    def gpm_alloc(self) -> object:
        sample: object = self._lib.nvmlGpmSampleAlloc()
        return sample

    def gpm_free(self, sample: object) -> None:
        self._lib.nvmlGpmSampleFree(sample)

    def gpm_take(self, uuid: str, sample: object) -> None:
        self._lib.nvmlGpmSampleGet(self._handle(uuid), sample)

    def gpm_between(self, earlier: object, later: object) -> tuple[float, ...] | None:
        """The five metrics between two samples, in percent, or None when any of them is not to be trusted."""
        ask = self._lib.c_nvmlGpmMetricsGet_t()
        ask.version = self._lib.NVML_GPM_METRICS_GET_VERSION
        ask.numMetrics = len(_GPM_METRICS)
        ask.sample1, ask.sample2 = earlier, later
        for place, metric in enumerate(_GPM_METRICS):
            ask.metrics[place].metricId = metric
        self._lib.nvmlGpmMetricsGet(ask)
        answers = [ask.metrics[place] for place in range(len(_GPM_METRICS))]
        if any(a.nvmlReturn != 0 or not math.isfinite(a.value) or a.value < 0 for a in answers):
            return None
        return tuple(float(a.value) for a in answers)

    @property
    def failure(self) -> type[Exception]:
        """The class of NVML's own errors."""
        failure: type[Exception] = self._lib.NVMLError
        return failure

    def _handle(self, uuid: str) -> object:
        if uuid not in self._handles:
            self._handles[uuid] = self._lib.nvmlDeviceGetHandleByUUID(uuid.encode())
        return self._handles[uuid]

    def _index(self, selector: str | None, count: int) -> int:
        if selector is None:
            return 0
        if selector.isascii() and selector.isdecimal() and int(selector) < count:
            return int(selector)
        known = [self._name_and_uuid(index) for index in range(count)]
        fits = [
            index for index, (_, uuid) in enumerate(known) if selector.startswith("GPU-") and uuid.startswith(selector)
        ]
        if len(fits) == 1:
            return fits[0]
        gpus = "; ".join(f"{index}: {name} {uuid}" for index, (name, uuid) in enumerate(known))
        wrong = "several GPUs' UUIDs begin with" if fits else "there is no GPU"
        raise BadQuestion(f"--gpu: {wrong} {selector!r}, expected an index or a UUID; choose from {gpus}")

    def _name_and_uuid(self, index: int) -> tuple[str, str]:
        # One broken GPU must not hide its neighbours.
        try:
            handle = self._lib.nvmlDeviceGetHandleByIndex(index)
            return _text(self._lib.nvmlDeviceGetName(handle)), _text(self._lib.nvmlDeviceGetUUID(handle))
        except self.failure as error:
            return f"unusable ({error})", "-"

    def _describe(self, index: int) -> GpuFacts:
        lib = self._lib
        handle = lib.nvmlDeviceGetHandleByIndex(index)
        major, minor = lib.nvmlDeviceGetCudaComputeCapability(handle)
        lanes = 64 if (major, minor) in _LANES_64 else 128
        cuda = int(lib.nvmlSystemGetCudaDriverVersion_v2())
        mode = int(lib.nvmlDeviceGetComputeMode(handle))
        mig = self._optional(lib.nvmlDeviceGetMigMode, handle)
        gpm = self._optional(lib.nvmlGpmQueryDeviceSupport, handle)
        limit_mw = self._optional(lib.nvmlDeviceGetEnforcedPowerLimit, handle)
        return GpuFacts(
            index=index,
            uuid=_text(lib.nvmlDeviceGetUUID(handle)),
            name=_text(lib.nvmlDeviceGetName(handle)),
            sms=int(lib.nvmlDeviceGetNumGpuCores(handle)) // lanes,
            memory_total_bytes=int(lib.nvmlDeviceGetMemoryInfo(handle).total),
            compute_capability=f"{major}.{minor}",
            driver=_text(lib.nvmlSystemGetDriverVersion()),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
            compute_mode=_COMPUTE_MODES.get(mode, f"unknown ({mode})"),
            mig=mig is not None and bool(mig[0]),
            gpm=gpm is not None and bool(gpm.isSupportedDevice),
            power_limit_w=None if limit_mw is None else limit_mw / 1000,
        )

    def _optional(self, call: Callable[..., Answer], *arguments: object) -> Answer | None:
        """The call's answer, or None where this chip or driver has none to give."""
        try:
            return call(*arguments)
        except self._lib.NVMLLibraryMismatchError:  # the driver is too old for this call's structures
            return None
        except self.failure as error:
            if getattr(error, "value", None) in _NO_ANSWER:
                return None
            raise

    @contextmanager
    def _unfit(self, doing: str) -> Iterator[None]:
        try:
            yield
        except self.failure as error:
            raise Unfit(f"NVML failed in {doing}: {error}; see what nvidia-smi says about this GPU") from error


class Sampler:
    """Records a GPU in the background. Two streams, each ended for good by its first NVML error.

    `origin_s` is the time.monotonic() value that recorded times count from. Power, clocks and memory are read
    every `nvml_interval_s`; with `gpm`, activity is read over windows of `gpm_interval_s` (at least 0.1 s).
    `errors` tells which streams ended early, and why.
    """

    def __init__(self, uuid: str, origin_s: float, nvml_interval_s: float, gpm_interval_s: float, gpm: bool) -> None:
        self._uuid = uuid
        self._origin_s = origin_s
        self._nvml_interval_s = nvml_interval_s
        self._gpm_interval_s = max(gpm_interval_s, _GPM_INTERVAL_MIN_S)
        self._gpm = gpm
        self._nvml = Nvml()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        # One tuple per row: appending is atomic, so a copy never holds half a row.
        self._rows: list[tuple[float, float | None, int | None, int | None, int | None]] = []
        self._gpm_rows: list[tuple[float, float, tuple[float, ...]]] = []
        self._energy_start_j: float | None = None
        self._energy_end_j: float | None = None
        self._ended = False
        self.errors: list[str] = []

    def start(self) -> None:
        """Raises Unfit when no driver answers; whatever NVML does afterwards only shortens the record."""
        self._nvml.__enter__()
        self._energy_start_j = self._energy_j()
        self._thread = threading.Thread(target=self._record, name="gpu-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> GpuSamples:
        """Ends sampling and returns all that was recorded. May be called again, and without a start."""
        if self._thread is not None and not self._ended:
            self._ended = True
            self._stop.set()
            self._thread.join(_STOP_TIMEOUT_S)
            # A thread that hangs in the driver still uses the connection; it dies with the process.
            if self._thread.is_alive():
                self.errors.append(f"NVML did not return within {_STOP_TIMEOUT_S:.0f} s")
            else:
                self._energy_end_j = self._energy_j()
                self._nvml.__exit__(None, None, None)
        return self._samples()

    def _samples(self) -> GpuSamples:
        rows, gpm_rows = list(self._rows), list(self._gpm_rows)
        graphics, active, occupancy, tensor, dram = ([row[2][place] for row in gpm_rows] for place in range(5))
        return GpuSamples(
            at_s=[row[0] for row in rows],
            power_w=[row[1] for row in rows],
            sm_clock_mhz=[row[2] for row in rows],
            memory_used_bytes=[row[3] for row in rows],
            throttle_reasons=[row[4] for row in rows],
            gpm_at_s=[row[0] for row in gpm_rows],
            gpm_interval_s=[row[1] for row in gpm_rows],
            graphics_active_pct=graphics,
            sm_active_pct=active,
            sm_occupancy_pct=occupancy,
            tensor_active_pct=tensor,
            dram_active_pct=dram,
            energy_start_j=self._energy_start_j,
            energy_end_j=self._energy_end_j,
        )

    def _energy_j(self) -> float | None:
        try:
            return self._nvml.energy_j(self._uuid)
        except Unfit as error:
            self.errors.append(str(error))
            return None

    def _record(self) -> None:
        pair = _GpmPair(self._nvml, self._uuid)
        ticks: list[tuple[Callable[[], None], float]] = [(self._read_device, self._nvml_interval_s)]
        if self._gpm:
            ticks.append((lambda: self._read_gpm(pair), self._gpm_interval_s))
        due_s = [time.monotonic()] * len(ticks)
        try:
            while min(due_s) < math.inf and not self._stop.wait(max(0.0, min(due_s) - time.monotonic())):
                for place, (tick, interval_s) in enumerate(ticks):
                    if due_s[place] > time.monotonic():
                        continue
                    try:
                        tick()
                        # Counted from now, not from when it was due: a late sample must not shorten the next one.
                        due_s[place] = time.monotonic() + interval_s
                    except self._nvml.failure as error:
                        self.errors.append(f"sampling ended early: {error}")
                        due_s[place] = math.inf
        finally:
            pair.free()

    def _read_device(self) -> None:
        row = self._nvml.device_row(self._uuid)
        self._rows.append((time.monotonic() - self._origin_s, *row))

    def _read_gpm(self, pair: _GpmPair) -> None:
        at_s = time.monotonic() - self._origin_s
        taken = pair.take(at_s)
        if taken is not None:
            interval_s, metrics = taken
            self._gpm_rows.append((at_s, interval_s, metrics))


class _GpmPair:
    """The last GPM sample and the next one, whose difference is a row."""

    def __init__(self, nvml: Nvml, uuid: str) -> None:
        self._nvml = nvml
        self._uuid = uuid
        self._samples: list[object] = []
        self._last_at_s: float | None = None

    def take(self, at_s: float) -> tuple[float, tuple[float, ...]] | None:
        """Samples now. The seconds since the last sample and the metrics between them; None if there are none."""
        while len(self._samples) < 2:
            self._samples.append(self._nvml.gpm_alloc())
        earlier, later = self._samples
        self._nvml.gpm_take(self._uuid, later)
        last_at_s, self._last_at_s = self._last_at_s, at_s
        self._samples = [later, earlier]
        if last_at_s is None:
            return None
        metrics = self._nvml.gpm_between(earlier, later)
        return None if metrics is None else (at_s - last_at_s, metrics)

    def free(self) -> None:
        for sample in self._samples:
            with suppress(self._nvml.failure):
                self._nvml.gpm_free(sample)


def _text(value: bytes | str) -> str:
    """Older pynvml gives bytes, newer ones text."""
    return value.decode() if isinstance(value, bytes) else value
