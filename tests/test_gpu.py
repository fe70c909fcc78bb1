"""The door to NVML, opened on a stand-in driver."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time

import pytest
from stubs import fake_nvml

from advisor.core.errors import BadQuestion, Unfit
from advisor.shell import gpu as door
from advisor.shell.gpu import Nvml, Sampler

FIRST = fake_nvml.UUIDS[0]


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The stand-in driver; call it with the state it should have from now on."""
    state = tmp_path / "state.json"
    monkeypatch.setenv("FAKE_NVML_STATE", str(state))
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)

    def become(**keys):
        state.with_suffix(".new").write_text(json.dumps(keys))
        state.with_suffix(".new").replace(state)

    become()
    return become


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def sampler(gpm=True, origin_s=None):
    return Sampler(FIRST, time.monotonic() if origin_s is None else origin_s, 0.02, 0.1, gpm)


def test_importing_the_module_does_not_import_pynvml():
    code = "import sys, advisor.shell.gpu; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def test_every_call_exists_in_the_real_pynvml_with_the_parameters_that_the_stand_in_has():
    real = importlib.import_module("pynvml")
    used = set(re.findall(r"(?:pynvml|lib)\.(\w+)", inspect.getsource(door)))
    assert len(used) > 20
    for name in used:
        assert hasattr(real, name) and hasattr(fake_nvml, name), name
        if inspect.isfunction(getattr(fake_nvml, name)):
            inspect.signature(getattr(real, name)).bind(*inspect.signature(getattr(fake_nvml, name)).parameters)


def test_the_real_structures_take_what_is_asked_of_gpm():
    real = importlib.import_module("pynvml")
    ask = real.c_nvmlGpmMetricsGet_t()
    ask.sample1 = ask.sample2 = real.c_nvmlGpmSample_t()
    ask.metrics[4].metricId = 10
    assert (ask.metrics[4].metricId, ask.metrics[4].nvmlReturn, ask.metrics[4].value) == (10, 0, 0.0)


def test_without_a_driver_the_line_says_what_to_do(driver):
    driver(init_error=9)
    with pytest.raises(Unfit) as raised, Nvml():
        pass
    assert str(raised.value) == (
        "no NVIDIA driver answers here (NVML: Driver Not Loaded); "
        "run on a GPU machine, or add --replay auto to see a recorded run"
    )


def test_a_connection_that_was_never_made_can_be_closed(driver):
    driver(init_error=9)
    nvml = Nvml()
    with pytest.raises(Unfit):
        nvml.__enter__()
    nvml.__exit__(None, None, None)


def test_a_driver_without_a_gpu_is_unfit(driver):
    driver(gpus=0)
    with Nvml() as nvml, pytest.raises(Unfit, match=r"shows no GPU.*--replay"):
        nvml.find()


def test_the_facts_of_an_h200_are_read(driver):
    with Nvml() as nvml:
        gpu = nvml.find()
    assert (gpu.index, gpu.uuid, gpu.name, gpu.sms) == (0, FIRST, "NVIDIA H200", 132)
    assert (gpu.compute_capability, gpu.driver, gpu.cuda) == ("9.0", "580.159.04", "13.0")
    assert (gpu.compute_mode, gpu.mig, gpu.gpm, gpu.power_limit_w) == ("Default", False, True, 700.0)
    assert gpu.memory_total_bytes == 150754820096


def test_a_chip_with_64_lanes_per_sm_is_counted_as_such(driver, monkeypatch):
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: (8, 0))
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetNumGpuCores", lambda handle: 6912)
    with Nvml() as nvml:
        assert nvml.find().sms == 108  # an A100


def test_modes_that_were_set_are_seen(driver):
    driver(mig=True, compute_mode=3, gpm=False)
    with Nvml() as nvml:
        gpu = nvml.find()
    assert (gpu.compute_mode, gpu.mig, gpu.gpm) == ("Exclusive_Process", True, False)


def test_what_a_chip_does_not_support_is_absent_rather_than_an_error(driver):
    driver(
        unsupported=[
            "nvmlDeviceGetMigMode",
            "nvmlGpmQueryDeviceSupport",
            "nvmlDeviceGetEnforcedPowerLimit",
            "nvmlDeviceGetTotalEnergyConsumption",
        ]
    )
    with Nvml() as nvml:
        gpu = nvml.find()
        assert nvml.energy_j(gpu.uuid) is None
    assert (gpu.mig, gpu.gpm, gpu.power_limit_w) == (False, False, None)


@pytest.mark.parametrize(
    ("selector", "index"), [(None, 0), ("0", 0), ("1", 1), (fake_nvml.UUIDS[1], 1), (fake_nvml.UUIDS[1][:12], 1)]
)
def test_a_gpu_is_found_by_index_uuid_or_prefix(driver, selector, index):
    driver(gpus=2)
    with Nvml() as nvml:
        assert nvml.find(selector).uuid == fake_nvml.UUIDS[index]


@pytest.mark.parametrize("selector", ["2", "-1", "", "H200", "GPU-dead", "GPU-ecda", "²"])
def test_a_selector_that_means_no_single_gpu_lists_those_there_are(driver, selector):
    driver(gpus=2)
    with Nvml() as nvml, pytest.raises(BadQuestion) as raised:
        nvml.find(selector)
    line = str(raised.value)
    assert repr(selector) in line and "\n" not in line
    assert all(uuid in line for uuid in fake_nvml.UUIDS[:2])


def test_a_gpu_that_is_lost_is_one_line_and_not_a_traceback(driver):
    with Nvml() as nvml:
        driver(error=15)
        with pytest.raises(Unfit, match="GPU is lost"):
            nvml.memory_used_bytes(FIRST)
        with pytest.raises(Unfit, match="GPU is lost"):
            nvml.find()


def test_processes_of_all_three_lists_are_united(driver, monkeypatch):
    driver(processes={"11": 1000})
    shown = fake_nvml.SimpleNamespace
    monkeypatch.setattr(
        fake_nvml,
        "nvmlDeviceGetMPSComputeRunningProcesses",
        lambda handle: [shown(pid=11, usedGpuMemory=None), shown(pid=12, usedGpuMemory=2000)],
    )
    monkeypatch.setattr(
        fake_nvml, "nvmlDeviceGetGraphicsRunningProcesses", lambda handle: [shown(pid=13, usedGpuMemory=None)]
    )
    with Nvml() as nvml:
        assert nvml.compute_processes(FIRST) == {11: 1000, 12: 2000, 13: None}


def test_memory_and_energy_are_in_bytes_and_joules(driver):
    driver(memory_used_bytes=12345)
    with Nvml() as nvml:
        assert nvml.memory_used_bytes(FIRST) == 12345
        before = nvml.energy_j(FIRST)
        time.sleep(0.1)
        assert nvml.energy_j(FIRST) - before > 350 * 0.09  # the stand-in draws 350 W


@pytest.mark.parametrize(("written", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), (None, None)])
def test_the_numa_node_comes_from_the_pci_slot(driver, tmp_path, written, node):
    driver(pci_bus_id="00000000:3B:00.0")
    slot = tmp_path / "0000:3b:00.0"
    slot.mkdir()
    if written is not None:
        (slot / "numa_node").write_text(written)
    with Nvml(pci_devices=tmp_path) as nvml:
        assert nvml.numa_node(FIRST) == node


def test_a_sampler_yields_rows_with_increasing_times(driver):
    driver(memory_used_bytes=777)
    origin_s = time.monotonic()
    running = sampler(origin_s=origin_s)
    running.start()
    time.sleep(0.6)
    samples = running.stop()
    end_s = time.monotonic() - origin_s
    assert len(samples.at_s) > 3 and len(samples.gpm_at_s) >= 2
    for times in (samples.at_s, samples.gpm_at_s):
        assert times == sorted(set(times)) and times[0] >= 0 and times[-1] <= end_s
    assert set(samples.power_w) == {350.0} and set(samples.sm_clock_mhz) == {1980}
    assert set(samples.memory_used_bytes) == {777} and set(samples.throttle_reasons) == {0}
    assert samples.energy_end_j > samples.energy_start_j
    assert running.errors == []


def test_gpm_rows_name_the_metrics_and_their_true_intervals(driver):
    driver(gpm_values=[95.0, 60.0, 20.0, 10.0, 30.0])
    running = sampler()
    running.start()
    wait_until(lambda: len(running._gpm_rows) >= 3)
    samples = running.stop()
    rows = len(samples.gpm_at_s)
    assert samples.graphics_active_pct == [95.0] * rows
    assert samples.sm_active_pct == [60.0] * rows
    assert samples.sm_occupancy_pct == [20.0] * rows
    assert samples.tensor_active_pct == [10.0] * rows
    assert samples.dram_active_pct == [30.0] * rows
    assert all(interval_s >= 0.1 for interval_s in samples.gpm_interval_s)
    gaps_s = [later - earlier for earlier, later in zip(samples.gpm_at_s, samples.gpm_at_s[1:], strict=False)]
    assert samples.gpm_interval_s[1:] == pytest.approx(gaps_s)


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_a_gpm_row_with_a_senseless_metric_is_dropped(driver, bad):
    driver(gpm_values=[95.0, bad, 20.0, 10.0, 30.0])
    running = sampler()
    running.start()
    wait_until(lambda: len(running._rows) >= 15)
    assert running._gpm_rows == []
    driver()
    wait_until(lambda: running._gpm_rows)
    assert running.stop().sm_active_pct[0] == 60.0
    assert running.errors == []


def test_without_gpm_only_the_other_rows_are_recorded(driver):
    running = sampler(gpm=False)
    running.start()
    wait_until(lambda: len(running._rows) >= 10)
    samples = running.stop()
    assert samples.gpm_at_s == [] and samples.sm_active_pct == []


def test_a_gpu_that_falls_off_in_mid_run_leaves_the_earlier_rows(driver):
    running = sampler()
    running.start()
    wait_until(lambda: len(running._gpm_rows) >= 1)
    driver(error=15)
    wait_until(lambda: len(running.errors) == 2)
    samples = running.stop()
    assert samples.at_s and samples.gpm_at_s
    assert len(samples.at_s) == len(samples.power_w) == len(samples.throttle_reasons)
    assert samples.energy_start_j is not None and samples.energy_end_j is None
    assert all("GPU is lost" in error for error in running.errors)


def test_gpm_that_fails_leaves_the_power_record_running(driver):
    running = sampler()
    running.start()
    wait_until(lambda: len(running._gpm_rows) >= 1)
    driver(gpm=False)
    wait_until(lambda: len(running.errors) == 1)
    before = len(running._rows)
    wait_until(lambda: len(running._rows) > before + 3)
    assert running.stop().energy_end_j is not None


def test_a_sampler_that_was_stopped_twice_or_never_started_still_answers(driver):
    assert sampler().stop().at_s == []
    running = sampler()
    running.start()
    wait_until(lambda: running._rows)
    assert running.stop() == running.stop()


def test_the_stand_in_serves_child_processes_and_drops_dead_ones(tmp_path):
    fake_nvml.install(tmp_path / "path")
    held = tmp_path / "held"
    held.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(30)
    (held / str(dead.pid)).write_text("100")
    (held / str(os.getpid())).write_text("200")
    (tmp_path / "state.json").write_text(json.dumps({"processes_dir": str(held)}))
    code = f"from advisor.shell.gpu import Nvml\nwith Nvml() as n: print(n.compute_processes('{FIRST}'))"
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), *sys.path]),
        "FAKE_NVML_STATE": str(tmp_path / "state.json"),
    }
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert child.stdout.strip() == str({os.getpid(): 200}), child.stderr
