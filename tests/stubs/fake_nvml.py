"""A stand-in for pynvml with one H200-like GPU, for machines that have none.

`install(directory)` puts it there as `pynvml.py`; with that directory first on PYTHONPATH, child processes see it too.
What it answers can be changed while it runs, through the JSON file named by FAKE_NVML_STATE (all keys optional):

    processes           {"PID": bytes}: listed as they are, alive or not
    processes_dir       folder of files named by PID, each holding a number of bytes; a dead process is not listed,
                        just as a driver drops it, so a stub engine only has to write its file
    memory_used_bytes   default: 600 MiB and the processes' bytes
    mig                 true or false
    compute_mode        NVML's number: 0 default, 2 prohibited, 3 exclusive process
    gpm                 true or false
    gpm_values          five percentages, in the order the metrics are asked for
    throttle            NVML's bits of reasons why clocks are lowered; default 0
    gpus                how many there are; default 1
    pci_bus_id          default "00000000:00:06.0"
    unsupported         names of functions that answer "not supported"
    init_error          NVML's error number for nvmlInit
    error               NVML's error number for every call on a GPU
"""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

NVML_CLOCK_SM = 1
NVML_GPM_METRICS_GET_VERSION = 1
NVML_ERROR_NOT_SUPPORTED = 3
UUIDS = [f"GPU-ecda{n:04x}-60bd-e0a2-3800-5218d868c814" for n in range(8)]
_DRIVER_RESERVES = 600 * 2**20
_GIB_141 = 150754820096


_ERROR_TEXTS = {2: "Invalid Argument", 3: "Not Supported", 6: "Not Found", 9: "Driver Not Loaded", 15: "GPU is lost"}


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(value)
        self.value = value

    def __str__(self):
        return _ERROR_TEXTS.get(self.value, f"NVML Error with code {self.value}")


class NVMLLibraryMismatchError(Exception):
    pass


class c_nvmlGpmMetricsGet_t:
    def __init__(self):
        self.version = self.numMetrics = 0
        self.sample1 = self.sample2 = None
        self.metrics = [SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(32)]


def install(directory):
    """Copies this file to `directory`/pynvml.py and returns that path."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(__file__, directory / "pynvml.py"))


def _state():
    path = os.environ.get("FAKE_NVML_STATE")
    for _ in range(50):
        try:
            return json.loads(Path(path).read_text()) if path and Path(path).exists() else {}
        except ValueError:  # met in the middle of being written
            time.sleep(0.01)
    raise RuntimeError(f"{path} holds no JSON")


def _ask(function):
    state = _state()
    if "error" in state:
        raise NVMLError(state["error"])
    if function in state.get("unsupported", []):
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return state


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _processes(state):
    found = {int(pid): held for pid, held in state.get("processes", {}).items()}
    if "processes_dir" in state:
        for file in Path(state["processes_dir"]).iterdir():
            if file.name.isdecimal() and _alive(file.name):
                with suppress(FileNotFoundError):  # it ended meanwhile
                    found[int(file.name)] = int(file.read_text() or 0)
    return found


def nvmlInit():
    state = _state()
    if "init_error" in state:
        raise NVMLError(state["init_error"])


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return _ask("nvmlDeviceGetCount").get("gpus", 1)


def nvmlDeviceGetHandleByIndex(index):
    if not 0 <= index < _ask("nvmlDeviceGetHandleByIndex").get("gpus", 1):
        raise NVMLError(2)
    return index


def nvmlDeviceGetHandleByUUID(uuid):
    uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
    if uuid not in UUIDS[: _ask("nvmlDeviceGetHandleByUUID").get("gpus", 1)]:
        raise NVMLError(6)
    return UUIDS.index(uuid)


def nvmlDeviceGetName(handle):
    _ask("nvmlDeviceGetName")
    return "NVIDIA H200"


def nvmlDeviceGetUUID(handle):
    _ask("nvmlDeviceGetUUID")
    return UUIDS[handle].encode()  # older pynvml gives bytes


def nvmlDeviceGetNumGpuCores(handle):
    _ask("nvmlDeviceGetNumGpuCores")
    return 16896


def nvmlDeviceGetCudaComputeCapability(handle):
    _ask("nvmlDeviceGetCudaComputeCapability")
    return (9, 0)


def nvmlSystemGetDriverVersion():
    return "580.159.04"


def nvmlSystemGetCudaDriverVersion_v2():
    return 13000


def nvmlDeviceGetComputeMode(handle):
    return _ask("nvmlDeviceGetComputeMode").get("compute_mode", 0)


def nvmlDeviceGetMigMode(handle):
    on = int(_ask("nvmlDeviceGetMigMode").get("mig", False))
    return [on, on]


def nvmlDeviceGetEnforcedPowerLimit(handle):
    _ask("nvmlDeviceGetEnforcedPowerLimit")
    return 700000


def nvmlDeviceGetMemoryInfo(handle):
    state = _ask("nvmlDeviceGetMemoryInfo")
    used = state.get("memory_used_bytes", _DRIVER_RESERVES + sum(_processes(state).values()))
    return SimpleNamespace(total=_GIB_141, used=used, free=_GIB_141 - used)


def nvmlDeviceGetPciInfo(handle):
    return SimpleNamespace(busId=_ask("nvmlDeviceGetPciInfo").get("pci_bus_id", "00000000:00:06.0").encode())


def nvmlDeviceGetPowerUsage(handle):
    _ask("nvmlDeviceGetPowerUsage")
    return 350000


def nvmlDeviceGetClockInfo(handle, kind):
    _ask("nvmlDeviceGetClockInfo")
    return 1980


def nvmlDeviceGetCurrentClocksEventReasons(handle):
    return int(_ask("nvmlDeviceGetCurrentClocksEventReasons").get("throttle", 0))


def nvmlDeviceGetTotalEnergyConsumption(handle):
    _ask("nvmlDeviceGetTotalEnergyConsumption")
    return int(time.monotonic() * 350 * 1000)  # 350 W


def nvmlDeviceGetComputeRunningProcesses(handle):
    state = _ask("nvmlDeviceGetComputeRunningProcesses")
    return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in _processes(state).items()]


def nvmlDeviceGetMPSComputeRunningProcesses(handle):
    _ask("nvmlDeviceGetMPSComputeRunningProcesses")
    return []


def nvmlDeviceGetGraphicsRunningProcesses(handle):
    _ask("nvmlDeviceGetGraphicsRunningProcesses")
    return []


def nvmlGpmQueryDeviceSupport(handle):
    return SimpleNamespace(isSupportedDevice=int(_ask("nvmlGpmQueryDeviceSupport").get("gpm", True)))


def nvmlGpmSampleAlloc():
    return SimpleNamespace(at_s=None)


def nvmlGpmSampleFree(sample):
    sample.at_s = None


def nvmlGpmSampleGet(handle, sample):
    if not _ask("nvmlGpmSampleGet").get("gpm", True):
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    sample.at_s = time.monotonic()


def nvmlGpmMetricsGet(ask):
    values = _ask("nvmlGpmMetricsGet").get("gpm_values", [95.0, 60.0, 20.0, 10.0, 30.0])
    # As the driver does, refuse a pair that is out of order or closer than 100 ms (less the clocks' granularity).
    apart = ask.sample1.at_s is not None and ask.sample2.at_s - ask.sample1.at_s >= 0.099
    for place in range(ask.numMetrics):
        ask.metrics[place].nvmlReturn = 0 if apart else 2
        ask.metrics[place].value = values[place]
    return ask
