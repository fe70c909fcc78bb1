"""One start of the engines: the MPS daemon, the engines, the evidence about both, and nothing left behind."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from advisor.core.cores import plan as deal_cores
from advisor.core.errors import Unfit
from advisor.core.records import EngineSettings, MpsEvidence, Protocol, RawTrial, Stage, Teardown, TrialSpec, Workload
from advisor.core.settings import serve_arguments, serve_environment
from advisor.shell import mps
from advisor.shell.clock import Clock, now
from advisor.shell.company import refuse_company, refuse_strangers
from advisor.shell.engines import SERVED_NAME, EngineFailed, Engines, Launch
from advisor.shell.gpu import Nvml, Sampler
from advisor.shell.interrupts import Say, whole
from advisor.shell.patience import FIXED_PROMPTS_S, IDLE_S
from advisor.shell.place import Place
from advisor.shell.plugged import plugged_in
from advisor.shell.processes import child_environment
from advisor.shell.warm import Warm

# The fixed prompts whose log-probabilities show that two engines compute the same: long enough for the
# attention kernel to work, few enough to cost nothing.
FIXED_PROMPTS, FIXED_PROMPT_TOKENS, FIXED_PROMPT_SEED = 4, 96, 20250
# GPU memory that may stay in use after a trial: driver bookkeeping, not ours.
MEMORY_SLACK_BYTES = 300 << 20
# A socket's path has 107 bytes; vLLM names one by a slash and a UUID.
_SOCKETS, _SOCKETS_PATH_MAX = "VLLM_RPC_BASE_PATH", 107 - 37


@dataclass(frozen=True)
class Ended:
    """How a start was cleared away."""

    teardown: Teardown
    stage: Stage
    exit_codes: Mapping[int, int | None]  # by engine

    def complete(self, raw: RawTrial) -> RawTrial:
        """The last trial of the start, with its end."""
        engines = [
            msgspec.structs.replace(engine, exit_code=self.exit_codes.get(engine.engine)) for engine in raw.engines
        ]
        timeline = [*raw.timeline, self.stage]
        return msgspec.structs.replace(raw, teardown=self.teardown, engines=engines, timeline=timeline)


class Start:
    """The engines of `spec`, for as many windows as are wanted of them. Whoever makes one has to `end` it.

    With `warm` they are forked from that. `began` names the start in records; its times are seconds since then. Raises
    Unfit when others use the GPU.
    """

    def __init__(self, place: Place, nvml: Nvml, spec: TrialSpec, warm: Warm | None = None) -> None:
        if spec.settings is None or spec.workload is None or spec.protocol is None:
            raise ValueError("a trial with engines needs settings, workload and protocol")
        self.spec = spec
        self.place, self.nvml = place, nvml
        self._warm = warm
        self._settings: EngineSettings = spec.settings
        self._workload: Workload = spec.workload
        self._protocol: Protocol = spec.protocol
        self._uuid = place.gpu_uuid
        refuse_company(nvml, self._uuid)
        self._memory_before = nvml.memory_used_bytes(self._uuid)
        self.began = now("microseconds")
        self.origin_s = time.monotonic()
        self.directory = Path(tempfile.mkdtemp(prefix="t", dir=place.scratch))
        self.windows = 0  # that were begun
        self.unfinished = False  # whether a window's end cut requests off
        self._asked: list[str] = []
        self._placed: list[list[int]] = []  # the cores that each engine has now
        self._daemon: mps.Daemon | None = None
        self._engines: Engines | None = None

    @property
    def engines(self) -> Engines:
        if self._engines is None:
            raise RuntimeError("the engines were not started")
        return self._engines

    @property
    def launched(self) -> bool:
        return self._engines is not None

    # -- the beginning

    def launch(self, say: Say) -> None:
        """Start daemon and engines, and wait until all engines are ready. Raises EngineFailed, Unfit."""
        with whole():
            environment = self._start_daemon()
            self._engines = Engines(self._launches(environment), self.origin_s, self.place.scrub, self._warm)
            self._engines.start()
            self._note()
        total = self.spec.engines + self.spec.idle_engines

        def waiting(ready: int) -> None:
            self._note()
            say(f"starting engines, {ready} of {total} ready")

        self._engines.wait_ready(self._protocol.engine_start_timeout_s, waiting)
        self._placed = self._cores_at_launch()
        if self.spec.split_cores:
            self._engines.split_cores()
            self._placed = self.spec.engine_cores

    def _start_daemon(self) -> dict[str, str]:
        if not self.spec.mps:
            return mps.without_mps_environment(self.directory)
        if self.place.control is None:
            raise Unfit("nvidia-cuda-mps-control is not on PATH; install the NVIDIA driver's MPS programs")
        self._daemon = mps.Daemon.start(self.directory, self.place.control, self._uuid)
        self._note()
        return self._daemon.client_environment(self.spec.thread_percentage)

    def _note(self, servers: Sequence[int] = ()) -> None:
        """Write down what has been started by now: nobody else could, if this process were killed."""
        daemon = [] if self._daemon is None or self._daemon.pid is None else [self._daemon.pid]
        engines = [] if self._engines is None else self._engines.seen_pids()
        self.place.note([*daemon, *servers, *engines])

    def _launches(self, mps_environment: Mapping[str, str]) -> list[Launch]:
        argv = [*self.place.vllm_command, "serve", str(self.place.model_folder)]
        argv += ["--served-model-name", SERVED_NAME]
        argv += serve_arguments(self._settings, self._workload.kind)
        inside: Mapping[str, str] = {}
        if self.spec.kind == "steps":
            folder = self.directory / "inside"
            more, inside = plugged_in(folder, self.spec.without, self.place.manifest.model.architecture)
            argv += more
        return [
            Launch(
                argv=argv,
                environment=child_environment(
                    {
                        **mps_environment,
                        **serve_environment(self._settings),
                        **inside,
                        **(self._warm.environment if self._warm else {}),
                        **self._sockets(),
                        "CUDA_VISIBLE_DEVICES": self._uuid,
                        "MPS_ADVISOR_ENGINE": str(index),
                    }
                ),
                cores=cores,
                log=self.directory / f"engine-{index}.log",
            )
            for index, cores in enumerate(self._cores_at_launch())
        ]

    def _cores_at_launch(self) -> list[list[int]]:
        """All engines start alike, those as well that are to rest first: dealt the cores as if all of them worked."""
        if all(self.spec.engine_cores):
            return self.spec.engine_cores
        placed = deal_cores(self.place.manifest.host.cores, self.spec.engines + self.spec.idle_engines)
        if placed is None:
            raise ValueError("engines that cannot be placed together cannot be started together")
        return placed.engine_cores

    def _sockets(self) -> dict[str, str]:
        """Where vLLM makes its sockets: it leaves them there, and here they go with the rest. Not where the path of one
        would be too long, nor where the user has said where.
        """
        if _SOCKETS in os.environ or len(os.fsencode(self.directory)) > _SOCKETS_PATH_MAX:
            return {}
        return {_SOCKETS: str(self.directory)}

    # -- between windows

    def next_window(self, spec: TrialSpec, workload: Workload) -> None:
        """Make sure that the engines are fit for this trial's window, and on the cores that they are to have there.
        Raises EngineFailed, MpsQueryError; Unfit for company.
        """
        self.windows += 1
        if self.windows > 1:
            self.engines.check()
            clients, servers = self.attached()
            refuse_strangers(self.nvml, self._uuid, self.engines.own_pids() | set(servers))
            self._refuse_detached(clients)
            # Several API servers each count for themselves, and late: ask only where requests were cut off.
            if self.unfinished:
                self.engines.wait_idle(IDLE_S)
                self.unfinished = False
        if spec.engine_cores != self._placed:
            self.engines.pin(spec.engine_cores)
            self._placed = spec.engine_cores
        prompts = self._fixed_prompts(workload)
        # Once per start: they say what the engines compute, and that is the same under any load.
        if prompts != self._asked:
            self.engines.ask_logprobs(prompts, generated=workload.kind == "decode", timeout_s=FIXED_PROMPTS_S)
            self._asked = prompts

    def _refuse_detached(self, clients: Sequence[int]) -> None:
        if self._daemon is None:
            return
        for index, core in enumerate(self.engines.core_pids):
            if core not in clients:
                raise EngineFailed("not_attached", index, f"engine core PID {core} is not attached to MPS any more")

    def _fixed_prompts(self, workload: Workload) -> list[str]:
        chooser = random.Random(FIXED_PROMPT_SEED)
        length = min(FIXED_PROMPT_TOKENS, workload.isl)
        return [
            "".join(f" {word}" for word in chooser.choices(self.place.words, k=length)) for _ in range(FIXED_PROMPTS)
        ]

    # -- evidence

    def attached(self) -> tuple[list[int], list[int]]:
        """PIDs of the MPS clients and servers; none of either when there is no daemon of ours."""
        if self._daemon is None:
            return [], []
        clients, servers = sorted(self._daemon.clients()), sorted(self._daemon.servers())
        self._note(servers)
        return clients, servers

    def servers(self) -> list[int]:
        return [] if self._daemon is None else sorted(self._daemon.servers())

    def daemon_answers(self) -> bool:
        """Whether there is an MPS daemon: ours, or one in the place where engines without MPS look."""
        if self._daemon is not None:
            return True
        if self.place.control is None:
            return False
        return mps.answers(self.directory / "empty", self.place.control)

    def own_pids(self) -> set[int]:
        """Every process of these engines that was ever seen, and the daemon's."""
        daemon = None if self._daemon is None else self._daemon.pid
        return self.engines.own_pids() | ({daemon} if daemon is not None else set())

    def sampler(self) -> Sampler:
        """What NVML says of this GPU from when it is started on, on this start's clock."""
        intervals = self._protocol.nvml_interval_s, self._protocol.gpm_interval_s
        return Sampler(self._uuid, self.origin_s, *intervals, self.place.manifest.gpu.gpm)

    def evidence(self, before: tuple[list[int], list[int]]) -> tuple[MpsEvidence, list[int]]:
        """Who is attached now and was `before` (as `attached` gives it), and the processes on the GPU that are neither
        these engines nor one of those servers.
        """
        (clients_start, servers_start), (clients_end, servers_end) = before, self.attached()
        mine = self.engines.own_pids() | set(servers_start) | set(servers_end)
        foreign = sorted(set(self.nvml.compute_processes(self._uuid)) - mine)
        seen = MpsEvidence(
            daemon=self.daemon_answers(),
            servers_start=servers_start,
            servers_end=servers_end,
            clients_start=clients_start,
            clients_end=clients_end,
        )
        return seen, foreign

    # -- the end

    def end(self, say: Say) -> Ended:
        """End the engines, then the daemon, whatever state they are in; wait for the memory. Not to be interrupted."""
        clock = Clock(self.origin_s)
        clock.stage("teardown")
        say("cleaning up")
        begin = clock.now()
        steps: list[str] = []
        left: list[int] = []
        exit_codes: dict[int, int | None] = {}
        if self._engines is not None:
            more, left = self._engines.stop(self._protocol.teardown_timeout_s)
            steps += more
            exit_codes = self._engines.exit_codes()
        daemon_left = False
        if self._daemon is not None:
            steps += self._daemon.quit(self._protocol.teardown_timeout_s)
            left += self._daemon.left()
            daemon_left = not self._daemon.gone()
        memory_after = self._wait_for_memory()
        teardown = Teardown(
            seconds=clock.now() - begin,
            steps=steps,
            left_pids=left,
            daemon_left=daemon_left,
            memory_before_bytes=self._memory_before,
            memory_after_bytes=memory_after,
        )
        clock.close()
        return Ended(teardown, clock.stages[0], exit_codes)

    def _wait_for_memory(self) -> int | None:
        """The driver gives memory back a moment after a process ends; wait for it, up to the teardown's limit.

        None as well where the GPU does not answer any more: how the rest went is on record all the same.
        """
        before = self._memory_before
        deadline = time.monotonic() + self._protocol.teardown_timeout_s
        while True:
            try:
                used = self.nvml.memory_used_bytes(self._uuid)
                done = used is None or before is None or used <= before + MEMORY_SLACK_BYTES
                done = done and not self.nvml.compute_processes(self._uuid)
            except Unfit:
                return None
            if done or time.monotonic() > deadline:
                return used
            time.sleep(0.1)
