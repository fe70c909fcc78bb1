"""The host's facts, read from made-up /proc and /sys trees and from the real ones."""

import os
import subprocess
import sys

import pytest

from advisor.shell import host


@pytest.fixture
def trees(tmp_path):
    """A machine of two nodes, four cores each, two threads per core: core k is logical CPUs k and k+8."""
    sys_tree, proc = tmp_path / "sys", tmp_path / "proc"
    for cpu in range(16):
        topology = sys_tree / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    for node, cpus in enumerate(["0-3,8-11", "4-7,12-15"]):
        folder = sys_tree / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    (proc / "self").mkdir(parents=True)
    (proc / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Made-up CPU 9000\nmodel name\t: other\n")
    (proc / "stat").write_text("cpu  2176 0 959 84445 298 0 33 250 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    (proc / "self/cgroup").write_text("0::/pod/box\n")
    return {"sys": sys_tree, "proc": proc}


def test_one_logical_cpu_stands_for_each_physical_core(trees):
    found = host.facts(None, allowed=set(range(16)), **trees)
    assert found.cores == list(range(8))
    assert found.threads_per_core == 2
    assert found.cpu == "Made-up CPU 9000"


def test_the_cores_of_the_gpus_node_come_first(trees):
    found = host.facts(1, allowed=set(range(16)), **trees)
    assert found.cores == [4, 5, 6, 7, 0, 1, 2, 3]
    assert found.numa_node == 1


def test_only_cpus_that_this_process_may_use_are_counted(trees):
    assert host.facts(None, allowed={2, 9, 10, 15}, **trees).cores == [2, 9, 15]


def test_without_a_topology_every_cpu_is_a_core(tmp_path):
    found = host.facts(0, allowed={3, 1}, proc=tmp_path, sys=tmp_path)
    assert (found.cores, found.threads_per_core) == ([1, 3], 1)


def test_this_machines_facts_lie_within_its_affinity():
    found = host.facts(None)
    assert found.cores and set(found.cores) <= os.sched_getaffinity(0)
    assert found.memory_bytes > 2**20 and found.kernel == os.uname().release


def test_a_narrowed_affinity_narrows_the_cores():
    only = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{only}}}); from advisor.shell import host; print(host.facts(None).cores)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert child.stdout.strip() == f"[{only}]"


def test_stolen_time_is_the_eighth_column_in_clock_ticks(trees):
    assert host.steal_s(proc=trees["proc"]) == 250 / os.sysconf("SC_CLK_TCK")
    assert host.steal_s() >= 0.0


@pytest.mark.parametrize(
    ("outer", "inner", "cpus"),
    [("max 100000", "max 100000", None), ("max 100000", "250000 100000", 2.5), ("400000 100000", "max 100000", 4.0)],
)
def test_the_tightest_control_group_sets_the_quota(trees, outer, inner, cpus):
    pod = trees["sys"] / "fs/cgroup/pod"
    (pod / "box").mkdir(parents=True)
    (pod / "cpu.max").write_text(outer + "\n")
    (pod / "box/cpu.max").write_text(inner + "\n")
    assert host.cpu_quota(**trees) == cpus


@pytest.mark.parametrize(("granted", "cpus"), [("-1", None), ("150000", 1.5)])
def test_a_version_1_quota_is_read_too(trees, granted, cpus):
    group = trees["sys"] / "fs/cgroup/cpu"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(granted + "\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert host.cpu_quota(**trees) == cpus


def test_the_open_file_limit_is_the_soft_one():
    code = (
        "import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (123, hard));"
        "from advisor.shell import host; print(host.open_file_limit())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert child.stdout.strip() == "123"
