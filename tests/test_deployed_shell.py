"""The scripts of a deployment, run for real: stand-ins for vLLM and for the MPS daemon, a real nginx."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil
import pytest
from conftest import Bench
from sites import wait_for
from stubs import nvidia_cuda_mps_control, vllm_server
from test_deployment import FOUR, ONE, changed

from advisor.report.as_json import dumps

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")

# Everybody is quick here; only what hangs is waited for.
QUICK = {"START_S": "20", "DRAIN_S": "5", "STOP_S": "10", "DAEMON_S": "3"}


@dataclass
class Deployed:
    """A deployment on ports of its own, with its scripts."""

    bench: Bench
    folder: Path
    port: int
    engines: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return Path(f"/tmp/mps-advisor-{self.port}")

    @property
    def ports(self) -> list[int]:
        return [self.port + 1 + index for index in range(self.engines)] if self.engines > 1 else [self.port]

    def script(self, name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.folder / name), *words],
            env=self.bench.environment | QUICK | self.environment | environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def faults(self, **by_engine) -> None:
        """Faults of all engines (`all`) and of one by its index (`e0`)."""
        named = {"all": {"outlives_parent": True, "tokens_per_s": 2000} | by_engine.pop("all", {})}
        for name, fault in by_engine.items():
            named[str(self.ports[int(name[1:])])] = fault
        for index, port in enumerate(self.ports):
            named.setdefault(str(port), {})
            named[str(port)] |= {"request_log": str(self.bench.directory / f"requests-{index}")}
        self.bench.engine_faults(named)

    def requests(self) -> list[int]:
        """How many completions each engine was asked for."""
        logs = [self.bench.directory / f"requests-{index}" for index in range(self.engines)]
        return [len(path.read_text().splitlines()) if path.exists() else 0 for path in logs]

    def complete(self, tokens: int = 2, stream: bool = True) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        body = {"model": FOUR.model.name, "prompt": "a b", "max_tokens": tokens, "stream": stream}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def pid(self, name: str) -> int:
        return int((self.run / name).read_text().split()[0])

    def cores(self) -> list[int]:
        return sorted(self.bench.gpu_processes())

    def assert_nothing_left(self) -> None:
        wait_for(lambda: not self.bench.processes(), 5)
        assert not self.run.exists()
        assert self.bench.gpu_processes() == []
        assert not any(answers(port) for port in [self.port, *self.ports])
        assert {path.name for path in self.folder.iterdir() if path.is_dir()} <= {"logs"}


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nothing listens on, below those that are dealt to clients."""
    for base in range(15000 + os.getpid() % 9000, 32000, 7):
        if not any(answers(port) for port in range(base, base + count)):
            return base
    raise OSError("no free ports")


def deploy(bench: Bench, report, *, engines: int, target: str = "shell") -> Deployed:
    vllm_server.install(bench.programs)
    port = free_ports(engines + 1)
    # Cores of which this machine has some: the first one.
    host = msgspec.structs.replace(report.host, cores=[0] * 16)
    gpu = msgspec.structs.replace(report.gpu, uuid=bench.gpu_uuid)
    report = msgspec.structs.replace(report, host=host, gpu=gpu)
    shares = report.recommendation.thread_percentages
    report = changed(report, engines=engines, thread_percentages=shares and shares[:1] * engines)
    (bench.directory / "report.json").write_text(dumps(report))
    folder = bench.directory / "my deployment"
    words = ["deploy", bench.directory / "report.json", "--target", target, "--out", folder, "--port", port]
    subprocess.run([sys.executable, "-m", "advisor", *map(str, words)], check=True, capture_output=True, timeout=60)
    made = Deployed(bench, folder, port, engines)
    made.faults()
    return made


@pytest.fixture
def two(bench: Bench):
    """Two engines under MPS."""
    made = deploy(bench, FOUR, engines=2)
    yield made
    if made.run.exists():
        made.script("stop.sh")


def test_what_was_measured_is_started_served_checked_and_stopped_without_a_trace(two: Deployed):
    begun = two.script("start.sh", CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=1G", VLLM_PORT="1")
    assert begun.returncode == 0, begun.stderr
    checked = two.script("check.sh")
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr.count("is attached to MPS") == 2 and "ACTIVE" in checked.stderr
    assert "the balancer answers" in checked.stderr

    # As measured: own cores, own percentage, and nothing of another MPS or another vLLM.
    engine = psutil.Process(two.pid("engine-1"))
    variables = engine.environ()
    assert engine.cpu_affinity() == [0]
    assert variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
    assert variables["CUDA_VISIBLE_DEVICES"] == two.bench.gpu_uuid
    assert not {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "VLLM_PORT"} & variables.keys()
    assert "--kv-cache-memory-bytes" in engine.cmdline() and "0.05" in engine.cmdline()

    assert [two.complete()[0] for _ in range(8)] == [200] * 8
    assert sum(two.requests()) == 8

    done = two.script("stop.sh")
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert said.index("balancer has ended") < said.index("engines have ended") < said.index("daemon has ended")
    two.assert_nothing_left()
    assert (two.folder / "logs" / "engine-0.log").read_text()
    again = two.script("stop.sh")
    assert again.returncode == 0 and "nothing runs" in again.stderr


def test_requests_in_flight_are_dealt_to_the_engine_with_the_fewest(two: Deployed):
    two.faults(all={"tokens_per_s": 100})  # so slow that none ends before the last one has begun
    assert two.script("start.sh").returncode == 0
    body = json.dumps({"model": FOUR.model.name, "prompt": "a", "max_tokens": 200, "stream": True})
    held = []
    for _ in range(6):
        connection = http.client.HTTPConnection("127.0.0.1", two.port, timeout=20)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        # The stream begins long before it ends: nothing holds it back.
        assert answer.status == 200 and answer.readline().startswith(b"data:")
        held.append((connection, answer))
    for connection, answer in held:
        assert answer.read().rstrip().endswith(b"[DONE]")
        connection.close()
    assert two.requests() == [3, 3]


def test_an_engine_that_is_not_attached_makes_the_start_fail_and_all_is_stopped_again(two: Deployed):
    two.faults(e1={"not_attached": True})
    begun = two.script("start.sh")
    assert begun.returncode == 1
    assert "engine 1" in begun.stderr and "NOT attached" in begun.stderr
    two.assert_nothing_left()


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"e0": {"die_at_start": "oom"}}, "engine 0 ended while starting"),
        ({"e1": {"die_at_start": "crash"}}, "engine 1 ended while starting"),
        ({"e1": {"hang_start": True}}, "engine 1 did not become healthy within 8 s"),
    ],
)
def test_an_engine_that_does_not_come_up_stops_all_of_it(two: Deployed, faults, said):
    two.faults(**faults)
    begun = two.script("start.sh", START_S="8")
    assert begun.returncode == 1 and said in begun.stderr, begun.stderr
    two.assert_nothing_left()


def test_without_a_daemon_nothing_is_started(two: Deployed):
    two.bench.mps_faults(refuse_start=1)
    begun = two.script("start.sh")
    assert begun.returncode == 1 and "nvidia-cuda-mps-control -d failed" in begun.stderr
    assert not (two.folder / "logs" / "engine-0.log").exists()
    two.assert_nothing_left()


def test_a_daemon_that_fails_now_and_then_is_asked_again(two: Deployed):
    two.bench.mps_faults(flaky=3)
    assert two.script("start.sh").returncode == 0
    assert two.script("check.sh").returncode == 0
    assert two.script("stop.sh").returncode == 0
    two.assert_nothing_left()


def test_a_start_beside_one_that_runs_is_refused_and_harms_nothing(two: Deployed):
    assert two.script("start.sh").returncode == 0
    second = two.script("start.sh")
    assert second.returncode == 1 and ("in use" in second.stderr or "runs already" in second.stderr)
    assert two.script("check.sh").returncode == 0


def test_a_second_daemon_for_the_same_gpu_is_refused(two: Deployed, tmp_path: Path):
    pipe, log = tmp_path / "p", tmp_path / "l"
    pipe.mkdir()
    log.mkdir()
    environment = two.bench.environment | {"CUDA_MPS_PIPE_DIRECTORY": str(pipe), "CUDA_MPS_LOG_DIRECTORY": str(log)}
    control = [str(two.bench.programs / nvidia_cuda_mps_control.CONTROL_NAME)]
    subprocess.run([*control, "-d"], env=environment, check=True)
    try:
        begun = two.script("start.sh")
        assert begun.returncode == 1 and "another MPS daemon runs" in begun.stderr
        assert not two.run.exists()
    finally:
        subprocess.run(control, input="quit\n", text=True, env=environment, check=True)


def test_a_lost_daemon_is_seen_and_no_engine_starts_without_it(two: Deployed):
    assert two.script("start.sh").returncode == 0
    os.kill(two.pid("daemon"), signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(two.pid("daemon")), 5)
    # The directory with its socket is still there: that is when CUDA goes on without a word.
    assert (two.run / "pipe" / "control").exists()
    checked = two.script("check.sh")
    assert checked.returncode == 1 and "no MPS daemon answers" in checked.stderr
    refused = two.script("engine.sh", "0", "touch", str(two.bench.directory / "started"), DAEMON_S="1")
    assert refused.returncode == 1 and "would run without MPS" in refused.stderr
    assert not (two.bench.directory / "started").exists()


def test_after_a_lost_daemon_everything_can_be_stopped_and_started_again(two: Deployed):
    assert two.script("start.sh").returncode == 0
    os.kill(two.pid("daemon"), signal.SIGKILL)
    done = two.script("stop.sh")
    assert done.returncode == 0 and "no MPS daemon answers any more" in done.stderr
    two.assert_nothing_left()
    assert two.script("start.sh").returncode == 0
    assert two.script("check.sh").returncode == 0


def test_when_an_engine_is_killed_the_others_serve_on_and_nothing_of_it_is_left(two: Deployed):
    two.faults(all={"core_survives": True})
    assert two.script("start.sh").returncode == 0
    os.kill(two.pid("engine-0"), signal.SIGKILL)
    wait_for(lambda: not answers(two.ports[0]), 5)
    assert [two.complete()[0] for _ in range(6)] == [200] * 6
    assert two.requests() == [0, 6]
    checked = two.script("check.sh")
    assert checked.returncode == 1 and "engine 0 does not run" in checked.stderr
    assert two.script("check.sh", "engine", "1").returncode == 0
    assert len(two.cores()) == 2  # an engine core outlives a killed parent
    assert two.script("stop.sh").returncode == 0
    two.assert_nothing_left()


def test_one_engine_is_started_anew_while_the_other_serves_on(two: Deployed):
    assert two.script("start.sh").returncode == 0
    balancer, other, before = two.pid("balancer"), two.pid("engine-1"), two.pid("engine-0")
    done = two.script("restart.sh", "0")
    assert done.returncode == 0 and "attached to MPS" in done.stderr, done.stderr
    assert (two.pid("balancer"), two.pid("engine-1")) == (balancer, other)
    assert two.pid("engine-0") != before and len(two.cores()) == 2
    assert two.script("check.sh").returncode == 0
    assert [two.complete()[0] for _ in range(4)] == [200] * 4


def test_an_engine_that_comes_back_without_mps_is_ended_again(two: Deployed):
    assert two.script("start.sh").returncode == 0
    two.faults(e0={"not_attached": True})
    done = two.script("restart.sh", "0")
    assert done.returncode == 1 and "NOT attached" in done.stderr and "ended again" in done.stderr
    assert len(two.cores()) == 1 and two.script("check.sh", "engine", "1").returncode == 0
    assert two.complete()[0] == 200


def test_an_engine_is_not_ended_where_it_could_not_come_back(two: Deployed):
    assert two.script("restart.sh", "0").returncode == 1
    assert two.script("start.sh").returncode == 0
    for words in ([], ["2"], ["x"], ["-1"]):
        assert two.script("restart.sh", *words).returncode == 1
    os.kill(two.pid("daemon"), signal.SIGKILL)
    refused = two.script("restart.sh", "0")
    assert refused.returncode == 1 and "no MPS daemon" in refused.stderr
    assert psutil.pid_exists(two.pid("engine-0"))


def test_a_stream_that_breaks_is_never_sent_again(two: Deployed):
    two.faults(all={"fail_every": 1, "fail_how": "disconnect"})
    assert two.script("start.sh").returncode == 0
    with pytest.raises((http.client.IncompleteRead, ConnectionError, AssertionError)):
        status, said = two.complete(tokens=8)
        assert status == 200 and said.rstrip().endswith(b"[DONE]")
    assert sum(two.requests()) == 1


def test_engines_that_ignore_sigterm_are_taken_from_mps_before_they_are_killed(two: Deployed):
    two.faults(all={"ignore_sigterm": True})
    assert two.script("start.sh").returncode == 0
    done = two.script("stop.sh", STOP_S="1")
    assert done.returncode == 0 and "did not end within 1 s of SIGTERM" in done.stderr and "SIGKILL" in done.stderr
    two.assert_nothing_left()


def test_the_daemon_is_not_told_to_quit_around_other_peoples_clients(two: Deployed):
    two.bench.mps_faults(ghost_client=os.getpid())
    assert two.script("start.sh").returncode == 0
    done = two.script("stop.sh")
    assert done.returncode == 1 and f"clients that are not these engines (PID {os.getpid()})" in done.stderr
    assert psutil.pid_exists(two.pid("daemon"))
    psutil.Process(two.pid("daemon")).kill()
    assert two.script("stop.sh").returncode == 0


def test_a_stopped_start_leaves_nothing(two: Deployed):
    two.faults(e0={"hang_start": True})
    begun = subprocess.Popen(
        ["bash", str(two.folder / "start.sh")],
        env=two.bench.environment | QUICK,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: two.cores(), 10)
    begun.send_signal(signal.SIGTERM)
    assert begun.wait(30) == 130
    two.assert_nothing_left()


def test_one_engine_without_mps_needs_no_daemon_and_no_balancer(bench: Bench):
    (bench.programs / nvidia_cuda_mps_control.CONTROL_NAME).unlink()
    made = deploy(bench, ONE, engines=1)
    begun = made.script("start.sh")
    try:
        assert begun.returncode == 0, begun.stderr
        assert not (made.folder / "nginx.conf").exists()
        checked = made.script("check.sh")
        assert checked.returncode == 0 and f"answers on port {made.port}" in checked.stderr
        assert psutil.Process(made.pid("engine-0")).environ()["CUDA_MPS_PIPE_DIRECTORY"] == str(made.run / "empty")
        assert list((made.run / "empty").iterdir()) == []
    finally:
        done = made.script("stop.sh")
    assert done.returncode == 0
    made.assert_nothing_left()


def test_several_engines_without_mps_have_a_balancer_and_no_daemon(bench: Bench):
    made = deploy(bench, changed(FOUR, mps=False, thread_percentages=None), engines=2)
    begun = made.script("start.sh")
    try:
        assert begun.returncode == 0, begun.stderr
        assert [made.complete()[0] for _ in range(4)] == [200] * 4
        assert made.script("check.sh").returncode == 0
    finally:
        done = made.script("stop.sh")
    assert done.returncode == 0
    made.assert_nothing_left()


def test_a_port_that_is_in_use_is_named_before_anything_starts(two: Deployed):
    with socket.create_server(("127.0.0.1", two.ports[1])):
        begun = two.script("start.sh")
    assert begun.returncode == 1 and f"port {two.ports[1]} is in use" in begun.stderr
    assert not two.run.exists()


def test_a_gpu_that_is_not_there_is_named_before_anything_starts(two: Deployed):
    smi = two.bench.programs / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 6\n")
    smi.chmod(0o755)
    begun = two.script("start.sh")
    assert begun.returncode == 1 and f"no GPU {two.bench.gpu_uuid}" in begun.stderr and "--gpu" in begun.stderr
    assert not two.run.exists()


# ---------------------------------------------------------------- what service managers and containers call


@pytest.fixture
def managed(bench: Bench):
    """The scripts of the systemd target, with their directory where this test may write."""
    made = deploy(bench, FOUR, engines=2, target="systemd")
    run = bench.temporary / "r"
    settings = made.folder / "settings.sh"
    settings.write_text(settings.read_text().replace(f"/run/vllm-{made.port}", str(run)))
    return made, run


def test_the_daemon_in_the_foreground_quits_on_term_and_leaves_no_directory(managed):
    made, run = managed
    daemon = subprocess.Popen(
        ["bash", str(made.folder / "daemon.sh")],
        env=made.bench.environment | QUICK | {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=1G"},
    )
    try:
        assert made.script("await.sh", "daemon").returncode == 0
        assert made.script("check.sh", "daemon").returncode == 0
        # A second one finds the first.
        assert made.script("daemon.sh").returncode == 1
        assert made.script("check.sh", "daemon").returncode == 0

        (line,) = [
            line.removeprefix("ExecStart=/usr/bin/env ")
            for line in (made.folder / f"vllm-{made.port}-engine-0.service").read_text().splitlines()
            if line.startswith("ExecStart=")
        ]
        words = line.replace(f"/etc/vllm-{made.port}/", "").split()[2:]
        environment = {"CUDA_MPS_PIPE_DIRECTORY": str(run / "pipe"), "VLLM_RPC_BASE_PATH": str(run / "rpc")}
        engine = subprocess.Popen(
            ["bash", str(made.folder / "engine.sh"), *words],
            env=made.bench.environment | QUICK | environment,
            stdout=subprocess.DEVNULL,
        )
        try:
            awaited = made.script("await.sh", "engine", "0")
            assert awaited.returncode == 0 and "attached to MPS" in awaited.stderr, awaited.stderr
            assert int((run / "engine-0").read_text().split()[0]) == engine.pid
        finally:
            engine.terminate()
            engine.wait(20)
    finally:
        daemon.terminate()
        assert daemon.wait(20) == 0
    assert not (run / "pipe").exists()


def test_an_engine_that_is_healthy_and_not_attached_is_not_waited_for(managed):
    made, run = managed
    made.faults(e0={"not_attached": True})
    daemon = subprocess.Popen(["bash", str(made.folder / "daemon.sh")], env=made.bench.environment | QUICK)
    assert made.script("await.sh", "daemon").returncode == 0
    engine = subprocess.Popen(
        ["bash", str(made.folder / "engine.sh"), "0", "vllm", "serve", "m", "--port", str(made.ports[0])],
        env=made.bench.environment | QUICK | {"CUDA_MPS_PIPE_DIRECTORY": str(run / "pipe")},
        stdout=subprocess.DEVNULL,
    )
    try:
        awaited = made.script("await.sh", "engine", "0")
        assert awaited.returncode == 1 and "NOT attached" in awaited.stderr
    finally:
        for process in (engine, daemon):
            process.terminate()
            process.wait(20)


def test_a_daemon_that_dies_makes_its_script_fail(managed):
    made, run = managed
    daemon = subprocess.Popen(["bash", str(made.folder / "daemon.sh")], env=made.bench.environment | QUICK)
    assert made.script("await.sh", "daemon").returncode == 0
    os.kill(int((run / "pipe" / "nvidia-cuda-mps-control.pid").read_text()), signal.SIGKILL)
    assert daemon.wait(20) == 1
    assert not (run / "pipe").exists()
