"""Is this machine fit: every check in both directions, the table, and the gathering of facts."""

import io
import json
import os
import subprocess
import sys

import msgspec
import pytest
from rich.console import Console
from stubs import fake_nvml

from advisor.core.doctor import Folder, ForeignDaemon, GpuProcess, MachineFacts, fit, judge
from advisor.core.records import GpuFacts, HostFacts
from advisor.report.doctor import as_json, table

GPU = GpuFacts(
    index=0,
    uuid="GPU-ecdad917-60bd-e0a2-3800-5218d868c814",
    name="NVIDIA H200",
    sms=132,
    memory_total_bytes=150754820096,
    compute_capability="9.0",
    driver="580.159.04",
    cuda="13.0",
    compute_mode="Default",
    mig=False,
    gpm=True,
    power_limit_w=700.0,
)
HOST = HostFacts(
    cpu="Made-up CPU 9000",
    cores=list(range(16)),
    threads_per_core=1,
    memory_bytes=2**37,
    kernel="6.18",
    numa_node=None,
)
FIT = MachineFacts(
    gpu=GPU,
    gpu_error=None,
    daemons=[],
    processes=[],
    mps_control="/usr/bin/nvidia-cuda-mps-control",
    mps_server="/usr/bin/nvidia-cuda-mps-server",
    vllm="0.26.0",
    torch="2.11.0+cu130",
    host=HOST,
    cores_near_gpu=None,
    cpu_quota=None,
    open_files=20000,
    folders=[
        Folder(purpose="run", path="/tmp", free_bytes=2**36),
        Folder(purpose="vLLM cache", path="/c", free_bytes=2**36),
    ],
    shm_free_bytes=2**33,
    inherited={},
)
DRIVER_MISSING = (
    "no NVIDIA driver answers here (NVML: Driver Not Loaded); "
    "run on a GPU machine, or add --replay auto to see a recorded run"
)


def but(**changes):
    return msgspec.structs.replace(FIT, **changes)


def but_gpu(**changes):
    return but(gpu=msgspec.structs.replace(GPU, **changes))


def but_host(numa_node=None, cores=16, **changes):
    return but(host=msgspec.structs.replace(HOST, cores=list(range(cores)), numa_node=numa_node), **changes)


def with_disk(free_bytes):
    return but(folders=[Folder(purpose="run", path="/tmp", free_bytes=free_bytes), FIT.folders[1]])


def check_of(facts, name):
    (check,) = [check for check in judge(facts) if check.name == name]
    return check


def rendered(facts, width=80):
    checks = judge(facts)
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table(checks, fit(checks)))
    return out.getvalue()


WORST = but(
    gpu=msgspec.structs.replace(GPU, compute_mode="Exclusive_Process", mig=True, gpm=False),
    daemons=[ForeignDaemon(pid=4242, user="alice", pipe_directory="/very/long/path/" + "without-a-space" * 8)],
    processes=[GpuProcess(pid=pid, name="VLLM::EngineCore", memory_bytes=2**35) for pid in range(70000, 70006)],
    mps_control=None,
    mps_server=None,
    vllm=None,
    torch=None,
    host=msgspec.structs.replace(HOST, cores=[0], cpu="A CPU whose name is rather long, as they are @ 3.00GHz"),
    open_files=1024,
    folders=[Folder(purpose="run", path="/tmp/" + "x" * 100, free_bytes=2**20)],
    shm_free_bytes=None,
    inherited={"CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps"},
)


def test_a_machine_with_everything_is_fit_and_asks_for_nothing():
    checks = judge(FIT)
    assert [(check.name, check.state, check.remedy) for check in checks if check.state != "ok" or check.remedy] == []
    assert fit(checks)
    assert len({check.name for check in checks}) == len(checks)


FAILURES = [
    ("driver", but(gpu=None, gpu_error=DRIVER_MISSING), "--replay auto"),
    ("driver", but_gpu(driver="570.1", cuda="12.8"), "install a driver for CUDA 13"),
    ("GPU", but_gpu(compute_capability="6.0"), "7.0"),
    ("compute mode", but_gpu(compute_mode="Exclusive_Process"), "sudo nvidia-smi -i 0 -c DEFAULT"),
    ("compute mode", but_gpu(compute_mode="Prohibited"), "sudo nvidia-smi -i 0 -c DEFAULT"),
    ("MIG", but_gpu(mig=True), "-mig 0"),
    ("GPU processes", but(processes=[GpuProcess(pid=7, name=None, memory_bytes=None)]), "end them"),
    ("MPS binaries", but(mps_control=None), "nvidia-compute-utils"),
    ("MPS binaries", but(mps_server=None), "PATH"),
    ("MPS daemon", but(daemons=[ForeignDaemon(pid=9, user="bob", pipe_directory="/p")]), "DIRECTORY=/p nvidia-cuda"),
    ("MPS daemon", but(daemons=[ForeignDaemon(pid=9, user=None, pipe_directory=None)]), "as its user"),
    ("vLLM", but(vllm=None, torch=None), "pip install 'mps-advisor[gpu]'"),
    ("vLLM", but(vllm="0.25.1"), "pip install 'mps-advisor[gpu]'"),
    ("vLLM", but(torch=None), "pip install 'mps-advisor[gpu]'"),
    ("cores", but_host(cores=3), "4 physical cores"),
    ("cores", but(cpu_quota=2.0), "4 physical cores"),
    ("open files", but(open_files=1024), "ulimit -n 65536"),
    ("disk, run", with_disk(2**30), "free at least 2.0 GiB"),
    ("disk, run", with_disk(None), "directory that you may write to"),
]
WARNINGS = [
    ("GPM", but_gpu(gpm=False), "Hopper"),
    ("vLLM", but(vllm="unknown"), "0.26"),
    ("cores", but_host(cores=8), "fewer engines"),
    ("cores", but(cpu_quota=13.5), "quota"),
    ("NUMA node", but_host(numa_node=1, cores_near_gpu=0), "numactl --cpunodebind=1"),
    ("open files", but(open_files=8192), "ulimit -n 65536"),
    ("disk, run", with_disk(10 * 2**30), "20.0 GiB"),
    ("/dev/shm", but(shm_free_bytes=64 * 2**20), "--shm-size"),
    ("/dev/shm", but(shm_free_bytes=None), "--shm-size"),
    ("CUDA_MPS_*", but(inherited={"CUDA_MPS_PIPE_DIRECTORY": "/x"}), "ignored"),
]
ENOUGH = [
    ("driver", but(torch="2.11.0")),
    ("driver", but_gpu(cuda="13.2")),
    ("vLLM", but(vllm="0.26.1.dev3+gabc")),
    ("vLLM", but(vllm="1.0.0")),
    ("GPU", but_gpu(compute_capability="12.0")),
    ("cores", but_host(cores=12)),
    ("cores", but(cpu_quota=16.0)),
    ("NUMA node", but_host(numa_node=1, cores_near_gpu=8)),
    ("open files", but(open_files=16384)),
    ("open files", but(open_files=None)),
    ("disk, run", with_disk(20 * 2**30)),
    ("/dev/shm", but(shm_free_bytes=2**30)),
]


@pytest.mark.parametrize(("name", "facts", "remedy"), FAILURES)
def test_what_makes_a_live_run_impossible_fails_with_a_remedy(name, facts, remedy):
    check = check_of(facts, name)
    assert check.state == "fail" and remedy in check.remedy
    assert not fit(judge(facts))


@pytest.mark.parametrize(("name", "facts", "remedy"), WARNINGS)
def test_what_makes_a_live_run_worse_warns_and_leaves_the_machine_fit(name, facts, remedy):
    check = check_of(facts, name)
    assert check.state == "warn" and remedy in check.remedy
    assert fit(judge(facts))


@pytest.mark.parametrize(("name", "facts"), ENOUGH)
def test_what_is_just_enough_passes(name, facts):
    check = check_of(facts, name)
    assert (check.state, check.remedy) == ("ok", "")


@pytest.mark.parametrize(("cores", "state"), [(3, "fail"), (4, "warn"), (11, "warn"), (12, "ok")])
def test_the_limits_of_cores_are_where_they_are_said_to_be(cores, state):
    assert check_of(but_host(cores=cores), "cores").state == state


@pytest.mark.parametrize(("files", "state"), [(4095, "fail"), (4096, "warn"), (16383, "warn"), (16384, "ok")])
def test_the_limits_of_open_files_are_where_they_are_said_to_be(files, state):
    assert check_of(but(open_files=files), "open files").state == state


def test_without_a_gpu_nothing_is_said_about_its_modes():
    names = {check.name for check in judge(but(gpu=None, gpu_error=DRIVER_MISSING))}
    assert names.isdisjoint({"GPU", "compute mode", "MIG", "GPM", "GPU processes"})


def test_a_foreign_daemon_is_named_with_its_owner_and_directory():
    found = check_of(but(daemons=[ForeignDaemon(pid=9, user="bob", pipe_directory="/p")]), "MPS daemon").found
    assert found == "pid 9 of bob in /p"


@pytest.mark.parametrize("facts", [FIT, WORST, but(gpu=None, gpu_error=DRIVER_MISSING)])
def test_the_table_fits_80_columns(facts):
    assert max(len(line) for line in rendered(facts).splitlines()) <= 80


def test_the_table_keeps_every_character_of_long_findings():
    squeezed = "".join(rendered(WORST).split())
    for check in judge(WORST):
        assert "".join(check.found.split()) in squeezed
        assert "".join(check.remedy.split()) in squeezed


def test_the_table_reads_without_colour():
    lines = rendered(but(vllm=None, gpu=msgspec.structs.replace(GPU, gpm=False))).splitlines()
    starts = [line.split()[:2] for line in lines if line.strip()]
    assert ["FAIL", "vLLM"] in starts and ["warn", "GPM"] in starts and ["ok", "MIG"] in starts
    assert any("fix: pip install 'mps-advisor[gpu]'" in line for line in lines)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (FIT, "fit for a live run."),
        (but(open_files=8192), "fit for a live run (1 warning)."),
        (but(vllm=None, open_files=100), "not fit for a live run (2 failures)"),
    ],
)
def test_the_table_closes_with_the_verdict(facts, sentence):
    assert sentence in " ".join(rendered(facts).split())


def test_json_carries_what_the_table_shows():
    checks = judge(WORST)
    told = json.loads(json.dumps(as_json(checks, fit(checks))))
    assert told["fit"] is False
    assert told["checks"] == [
        {"name": check.name, "state": check.state, "found": check.found, "remedy": check.remedy} for check in checks
    ]


# ---------------------------------------------------------------- gathering, in a real process of its own

INSPECT = """
import json, sys, msgspec
from advisor.core.errors import AdvisorError
from advisor.shell.inspect import inspect
try:
    facts = msgspec.to_builtins(inspect(sys.argv[1] if sys.argv[1:] else None))
except AdvisorError as error:
    facts = {"error": str(error), "exit_code": error.exit_code}
facts["imported"] = [name for name in ("torch", "vllm") if name in sys.modules]
json.dump(facts, sys.stdout)
"""


@pytest.fixture
def machine(tmp_path):
    """A made-up machine: a stand-in driver, MPS programs on PATH, vLLM and torch as bare folders."""
    fake_nvml.install(tmp_path / "packages")
    for package, file in [("vllm", "_version.py"), ("torch", "version.py")]:
        (tmp_path / "packages" / package).mkdir()
        (tmp_path / "packages" / package / "__init__.py").write_text("raise SystemExit('imported')\n")
        (tmp_path / "packages" / package / file).write_text("version: str\n__version__: str\n")
    (tmp_path / "packages/vllm/_version.py").write_text("__version__: str\n__version__ = version = '0.26.0'\n")
    (tmp_path / "packages/torch/version.py").write_text("__version__ = '2.11.0+cu130'\n")
    (tmp_path / "bin").mkdir()
    for program in ("nvidia-cuda-mps-control", "nvidia-cuda-mps-server"):
        (tmp_path / "bin" / program).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / program).chmod(0o755)
    state = tmp_path / "state.json"

    def look(*arguments, environment=None, **keys):
        state.write_text(json.dumps(keys))
        child = subprocess.run(
            [sys.executable, "-c", INSPECT, *arguments],
            env={
                "PATH": str(tmp_path / "bin"),
                "HOME": str(tmp_path),
                "TMPDIR": str(tmp_path),
                "PYTHONPATH": os.pathsep.join([str(tmp_path / "packages"), *sys.path]),
                "FAKE_NVML_STATE": str(state),
                **(environment or {}),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(child.stdout)

    look.root = tmp_path
    return look


def test_the_machine_is_inspected_without_importing_vllm_or_torch(machine):
    facts = machine()
    assert facts["imported"] == []
    assert (facts["vllm"], facts["torch"]) == ("0.26.0", "2.11.0+cu130")
    assert facts["gpu"]["uuid"] == fake_nvml.UUIDS[0] and facts["gpu_error"] is None
    assert facts["mps_control"] == str(machine.root / "bin/nvidia-cuda-mps-control")
    assert facts["mps_server"] == str(machine.root / "bin/nvidia-cuda-mps-server")
    assert facts["host"]["cores"] and facts["processes"] == [] and facts["inherited"] == {}
    assert [folder["path"] for folder in facts["folders"]] == [
        str(machine.root),
        str(machine.root / ".cache/vllm"),
    ]
    assert all(folder["free_bytes"] > 0 for folder in facts["folders"])


def test_foreign_processes_are_named(machine):
    facts = machine(processes={str(os.getpid()): 2**30, "4194305": 5})
    assert [(process["pid"], process["memory_bytes"]) for process in facts["processes"]] == [
        (os.getpid(), 2**30),
        (4194305, 5),
    ]
    assert facts["processes"][0]["name"] and facts["processes"][1]["name"] is None


def test_a_machine_without_a_driver_is_a_finding_and_not_an_error(machine):
    facts = machine(init_error=9)
    assert facts["gpu"] is None and facts["gpu_error"] == DRIVER_MISSING


def test_a_gpu_that_is_lost_is_a_finding_and_not_an_error(machine):
    facts = machine(error=15)
    assert facts["gpu"] is None and "GPU is lost" in facts["gpu_error"]


def test_a_gpu_that_does_not_exist_is_a_malformed_question(machine):
    facts = machine("7")
    assert facts["exit_code"] == 2 and fake_nvml.UUIDS[0] in facts["error"]


def test_mps_variables_and_vllms_own_cache_are_seen(machine):
    facts = machine(
        environment={"CUDA_MPS_PIPE_DIRECTORY": "/p", "VLLM_CACHE_ROOT": str(machine.root / "a/b"), "CUDA_HOME": "/c"}
    )
    assert facts["inherited"] == {"CUDA_MPS_PIPE_DIRECTORY": "/p"}
    assert facts["folders"][1]["path"] == str(machine.root / "a/b")
