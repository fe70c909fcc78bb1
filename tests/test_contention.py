"""Who else ran on a trial's cores: what /proc says of real and of made-up processes, and what is concluded from it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import raw
from raw import changed

from advisor.core.cautions import cautions
from advisor.core.contention import contention, host_speed, unevenness
from advisor.core.measure import measure
from advisor.core.records import CoreSpeed, CpuUse, Stranger
from advisor.shell import contention as collected
from advisor.shell.core_probe import core_speeds

HERE = sorted(os.sched_getaffinity(0))
TICKS = os.sysconf("SC_CLK_TCK")

# ---------------------------------------------------------------- what is read


class Machine:
    """A folder that looks like /proc."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def process(self, pid, *, cpu_s=0.0, core=0, name="work", started=5, threads=None, schedstat=True):
        """`threads` gives (CPU seconds, seconds waited, core) of each thread by its number; else there is one."""
        folder = self.folder / str(pid)
        folder.mkdir(exist_ok=True)
        (folder / "stat").write_text(stat(pid, name, cpu_s, started, core), encoding="latin-1")
        for number, (ran_s, waited_s, last) in (threads or {pid: (cpu_s, 0.0, core)}).items():
            task = folder / "task" / str(number)
            task.mkdir(parents=True, exist_ok=True)
            (task / "stat").write_text(stat(number, name, ran_s, started, last), encoding="latin-1")
            if schedstat:
                (task / "schedstat").write_text(f"{round(ran_s * 1e9)} {round(waited_s * 1e9)} 77\n")

    def read(self, *own):
        return collected.read(own, proc=self.folder)

    def strangers(self, start, *, cores=(0, 1), ours=(), seconds=10.0):
        return collected.strangers(start, self.read(), seconds, cores, ours, proc=self.folder)


def stat(pid, name, cpu_s, started, core):
    fields = ["0"] * 50
    fields[0], fields[11], fields[19], fields[36] = "S", str(round(cpu_s * TICKS)), str(started), str(core)
    return f"{pid} ({name}) {' '.join(fields)}\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def row(pid):
    return CpuUse(role="engine_core", engine=0, pid=pid, cpu_s=3.0, main_thread_s=None)


def test_each_thread_is_compared_with_itself_and_the_most_counts(machine):
    machine.process(7, threads={7: (50.0, 1.0, 0), 8: (1.0, 0.5, 1)})
    start = machine.read(7)
    machine.process(7, threads={7: (51.0, 1.25, 0), 8: (9.0, 2.0, 1)})
    (use,) = collected.by_thread([row(7)], start, machine.read(7))
    assert (use.main_thread_s, use.waited_s) == (pytest.approx(8.0), pytest.approx(1.5))


def test_a_thread_that_began_inside_the_window_counts_from_its_beginning(machine):
    machine.process(7, threads={7: (5.0, 0.0, 0)})
    start = machine.read(7)
    machine.process(7, threads={7: (5.0, 0.0, 0), 9: (2.0, 0.75, 0)})
    (use,) = collected.by_thread([row(7)], start, machine.read(7))
    assert (use.main_thread_s, use.waited_s) == (pytest.approx(2.0), pytest.approx(0.75))


@pytest.mark.parametrize("kept", ["", "0 0 0\n"])
def test_a_kernel_that_does_not_count_waiting_leaves_it_open(machine, kept):
    machine.process(7, cpu_s=1.0, schedstat=False)
    if kept:
        (machine.folder / "7" / "task" / "7" / "schedstat").write_text(kept)
    start = machine.read(7)
    machine.process(7, cpu_s=4.0, schedstat=False)
    (use,) = collected.by_thread([row(7)], start, machine.read(7))
    assert (use.main_thread_s, use.waited_s) == (pytest.approx(3.0), None)


def test_a_process_that_is_gone_keeps_what_was_known_of_it(machine):
    assert collected.by_thread([row(7)], machine.read(7), machine.read(7)) == [row(7)]


def test_strangers_are_busy_processes_on_our_cores_that_are_not_ours(machine):
    for pid, core in ((10, 0), (11, 0), (12, 1), (13, 5), (14, 1)):
        machine.process(pid, core=core)
    start = machine.read()
    machine.process(10, cpu_s=9.0, core=0)  # ours
    machine.process(11, cpu_s=0.2, core=0)  # too little
    machine.process(12, cpu_s=4.0, core=1, name="kworker/1:2")
    machine.process(13, cpu_s=9.0, core=5)  # elsewhere
    machine.process(14, cpu_s=5.0, core=1, name="stress")
    found = machine.strangers(start, ours={10})
    assert found == [
        Stranger(pid=14, name="stress", cpu_s=5.0, core=1),
        Stranger(pid=12, name="kworker/1:2", cpu_s=4.0, core=1),
    ]


def test_a_later_process_of_the_same_pid_is_another_one(machine):
    machine.process(10, cpu_s=100.0, started=5)
    start = machine.read()
    machine.process(10, cpu_s=3.0, started=900)
    assert [one.cpu_s for one in machine.strangers(start)] == [3.0]


def test_the_core_of_a_process_is_that_of_its_busiest_thread(machine):
    start = machine.read()
    machine.process(10, cpu_s=6.0, core=7, threads={10: (0.1, 0, 7), 11: (5.9, 0, 1)})
    assert [one.core for one in machine.strangers(start)] == [1]
    machine.process(10, cpu_s=6.0, core=1, threads={10: (0.1, 0, 1), 11: (5.9, 0, 7)})
    assert machine.strangers(start) == []


def test_the_ten_biggest_strangers_are_kept(machine):
    start = machine.read()
    for pid in range(10, 30):
        machine.process(pid, cpu_s=float(pid))
    assert [one.pid for one in machine.strangers(start)] == list(range(29, 19, -1))


def test_a_name_may_be_anything_and_is_fit_to_print(machine):
    start = machine.read()
    machine.process(10, cpu_s=6.0, name="a) (b\x1b[31m\n" + "x" * 60)
    (one,) = machine.strangers(start)
    assert one.name.startswith("a) (b?[31m?xxx") and len(one.name) == 40 and one.name.isprintable()


def test_this_process_is_found_in_the_real_proc_and_its_busy_thread_measured():
    def busy():
        end_s = time.monotonic() + 0.3
        while time.monotonic() < end_s:
            pass

    start = collected.read([os.getpid()])
    thread = threading.Thread(target=busy)
    thread.start()
    time.sleep(0.2)
    middle = collected.read([os.getpid()])
    thread.join()
    own = CpuUse(role="advisor", engine=None, pid=os.getpid(), cpu_s=0.0, main_thread_s=None)
    (use,) = collected.by_thread([own], start, middle)
    assert use.main_thread_s is not None and use.main_thread_s > 0
    assert use.waited_s is None or use.waited_s >= 0
    assert os.getpid() in start.processes and start.processes[os.getpid()].core in range(os.cpu_count() or 1)


@contextmanager
def hog(core: int):
    """A process that computes on one core until it is ended."""
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_real_process_that_computes_on_a_core_is_a_stranger_there_and_only_there():
    with hog(HERE[-1]) as process:
        start, begin_s = collected.read([]), time.monotonic()
        time.sleep(1.0)
        end, seconds = collected.read([]), time.monotonic() - begin_s
        found = {one.pid: one for one in collected.strangers(start, end, seconds, {HERE[-1]}, set())}
        elsewhere = collected.strangers(start, end, seconds, {10_000}, set())
        ours = collected.strangers(start, end, seconds, {HERE[-1]}, {process.pid})
    assert found[process.pid].core == HERE[-1] and found[process.pid].name.startswith("python")
    assert process.pid not in {one.pid for one in [*elsewhere, *ours]}


def test_every_core_is_timed_once_and_the_caller_stays_where_it_was():
    before = os.sched_getaffinity(0)
    speeds = core_speeds([*HERE, HERE[0]])
    assert [one.core for one in speeds] == HERE
    assert all(one.seconds > 0 for one in speeds)
    assert os.sched_getaffinity(0) == before


def test_cores_that_no_process_may_be_bound_to_are_left_out():
    assert core_speeds([100_000]) == []
    assert core_speeds([]) == []


# ---------------------------------------------------------------- what is concluded

TRIAL = raw.trial()  # engine 0 on cores 0 to 2, engine 1 on 3 to 5, load generators on 6 and 7
WINDOW_S = TRIAL.window[1] - TRIAL.window[0]


def stranger(share, core, pid=4711, name="stress"):
    return Stranger(pid=pid, name=name, cpu_s=share * WINDOW_S, core=core)


def waiting(trial, share, role="engine_core", engine=0):
    index = next(i for i, use in enumerate(trial.cpu) if (use.role, use.engine) == (role, engine))
    return changed(trial, f"cpu.{index}.waited_s", share * WINDOW_S)


def codes(trial):
    return [one.code for one in cautions(trial, measure(trial))]


def test_a_stranger_is_named_with_the_core_the_engine_and_what_the_engine_waited():
    trial = waiting(changed(TRIAL, "strangers", [stranger(0.98, 2)]), 0.31)
    assert contention(trial) == (
        "PID 4711 (stress) used 98 % of core 2, which engine 0 has to itself; "
        "its engine core waited 31 % of the window."
    )
    assert codes(trial) == ["cpu_contention"]


def test_a_stranger_on_the_load_generators_cores_is_named_too():
    trial = changed(TRIAL, "strangers", [stranger(0.5, 7), stranger(0.4, 3, pid=4712)])
    assert contention(trial) == (
        "PID 4711 (stress) used 50 % of core 7, which the load generators have to themselves; "
        "1 more used the trial's cores too."
    )


def test_a_stranger_of_several_threads_is_not_said_to_use_more_than_a_core():
    told = contention(changed(TRIAL, "strangers", [stranger(2.5, 0)]))
    assert told.startswith("PID 4711 (stress) used 2.5 cores, core 0 among them, which engine 0 has to itself")


def test_cores_that_engines_share_are_said_to_be_shared():
    trial = changed(changed(TRIAL, "spec.engine_cores", [[0, 1], [0, 1]]), "strangers", [stranger(0.5, 0)])
    assert "core 0, which engine 0 and engine 1 share" in contention(waiting(trial, 0.2, "api_server", 1))
    assert "engine 1's API server waited 20 %" in contention(waiting(trial, 0.2, "api_server", 1))


def test_a_quiet_stranger_is_no_caution_unless_an_engine_waits():
    quiet = changed(TRIAL, "strangers", [stranger(0.08, 4)])
    assert codes(quiet) == []
    assert codes(waiting(quiet, 0.04, engine=1)) == []
    told = contention(waiting(quiet, 0.15, engine=1))
    assert told.startswith(
        "PID 4711 (stress) used 8 % of core 4, which engine 1 has to itself; its engine core waited 15 %"
    )


def test_waiting_for_nobody_that_can_be_seen_is_a_caution():
    told = contention(waiting(TRIAL, 0.2, "api_server", 1))
    assert "Engine 1's API server waited 20 % of the window for a core" in told
    assert "used only 52 % of its cores" in told
    assert contention(waiting(TRIAL, 0.04, "api_server", 1)) is None


def test_what_an_engines_own_bursts_explain_is_no_caution():
    assert contention(waiting(TRIAL, 0.08, "api_server", 1)) is None  # at 52 % of its cores
    roomy = changed(TRIAL, "spec.engine_cores", [[0, 1, 2, 3, 4, 5], list(range(8, 14))])
    assert "waited 8 %" in contention(waiting(roomy, 0.08, "api_server", 1))
    assert contention(waiting(changed(roomy, "spec.split_cores", True), 0.08, "api_server", 1)) is None


def test_an_engine_that_waits_for_itself_does_not_hide_one_that_does_not():
    roomy = changed(TRIAL, "spec.engine_cores", [[0, 1], list(range(8, 14))])
    both = waiting(waiting(roomy, 0.2, "engine_core", 0), 0.15, "engine_core", 1)
    assert "Engine 1's engine core waited 15 %" in contention(both)


def test_an_engine_that_fills_its_cores_waits_for_itself():
    full = changed(TRIAL, "spec.engine_cores.0", [0])
    assert contention(waiting(full, 0.3)) is None


def test_waiting_on_cores_that_are_shared_with_our_own_is_no_caution():
    shared = changed(TRIAL, "spec.engine_cores", [[0, 1, 2], [2, 3, 4]])
    assert contention(waiting(shared, 0.3)) is None
    assert contention(waiting(changed(TRIAL, "spec.load_cores", [0]), 0.3)) is None


def speeds(*seconds):
    return [CoreSpeed(core=core, seconds=one) for core, one in enumerate(seconds)]


def test_a_core_that_is_a_quarter_slower_than_another_is_a_caution():
    uneven = changed(TRIAL, "core_speeds", speeds(0.020, 0.019, 0.024, 0.022))
    assert codes(uneven) == ["uneven_cores"]
    assert unevenness(uneven).startswith(
        "Core 2 took 1.26 times as long as core 1 for the same work (24.0 and 19.0 ms)"
    )
    assert codes(changed(TRIAL, "core_speeds", speeds(0.020, 0.019, 0.023))) == []


def test_a_trial_of_before_says_nothing_of_its_cores():
    assert (TRIAL.strangers, TRIAL.core_speeds) == ([], [])
    assert (contention(TRIAL), unevenness(TRIAL), host_speed([TRIAL])) == (None, None, None)
    assert contention(raw.failed()) is None


def test_the_speed_of_the_host_is_that_of_engine_cores_that_nothing_slows_and_how_often_something_does():
    load = [CoreSpeed(core=6, seconds=9.0), CoreSpeed(core=7, seconds=0.001)]
    one = changed(TRIAL, "core_speeds", [*speeds(0.017, 0.035), *load])
    two = changed(TRIAL, "core_speeds", [*speeds(0.018, 0.017), *load])
    three = changed(TRIAL, "core_speeds", [*speeds(0.036, 0.019), *load])
    assert host_speed([one, two, three, TRIAL]) == pytest.approx((0.017, 2 / 6))
    lucky = changed(TRIAL, "core_speeds", [*speeds(0.005), *load])
    assert host_speed([one, two, three, lucky]).core_s == 0.017
