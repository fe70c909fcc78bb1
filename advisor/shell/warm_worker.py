"""Imports vLLM once, and forks an engine from itself for each request: it then has nothing left to import.

Run by vLLM's own Python, by the path of this file, so that it needs nothing of ours. Takes one JSON object per line on
stdin, {"number", "argv", "cores", "environment", "log"}, and answers on stdout: {"ready"} once, {"number", "pid"} for
each request, and {"ended", "code"} for each engine that ended (codes as `subprocess` gives them). It ends with its
stdin.

A forked engine is what the program itself would have become: it gets the arguments, environment, cores and outputs of a
started one, and a session of its own; only the modules that are in its memory already are not read again.
"""

import os
import sys

# This file's neighbours must not be found as top-level modules; some have names of the standard library's.
_HERE = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _HERE]

import contextlib  # noqa: E402
import ctypes  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import multiprocessing as processes  # noqa: E402
import runpy  # noqa: E402
import selectors  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from typing import Any, TextIO  # noqa: E402

# What `vllm serve` and its engine core import. Not the command line itself: that is run, not imported.
MODULES = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.cli.openai",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.collect_env",
    "vllm.entrypoints.cli.run_batch",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
)
THREADS_END_S = 20.0  # threads that imports have started, and that must not be forked in the middle of their work
_PR_SET_PDEATHSIG = 1
_CUDA_ERROR_NOT_INITIALIZED = 3


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what imports print is no answer
    changes = load()
    print(json.dumps({"ready": fit()}), file=answers)
    request = serve(answers)
    if request is not None:
        answers.close()
        try:
            become(request, changes)
        except Exception:  # there is no one else to tell
            with contextlib.suppress(OSError), open(request["log"], "a") as log:  # noqa: PTH123
                traceback.print_exc(file=log)
            raise
        run(request["argv"])


def load() -> dict[str, str | None]:
    """Import what engines will need; what this vLLM does not have, they import themselves.

    Returns how that changed the environment: vLLM sets some variables when it is imported. None: taken away.
    """
    before = dict(os.environ)
    # It finds the place of a process's title through the environment's first place in memory, which a forked engine
    # has given up: without its title an engine core is not known for one.
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").getproctitle()
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    fork_api_servers()
    after: dict[str, str | None] = {**dict.fromkeys(before), **os.environ}
    return {name: value for name, value in after.items() if before.get(name) != value}


def fork_api_servers() -> None:
    """Have several API servers of an engine forked as well: vLLM spawns them whatever it is told."""
    if (makes := sys.modules.get("vllm.v1.utils")) is None or getattr(makes, "multiprocessing", None) is not processes:
        return  # another vLLM makes them elsewhere, and as it likes
    makes.multiprocessing = _Forking()  # type: ignore[attr-defined]
    os.register_at_fork(after_in_child=count_together)


class _Forking:
    """The module `multiprocessing`, but its processes are made as vLLM is told to make its others."""

    def get_context(self, method: str | None = None) -> processes.context.BaseContext:
        return processes.get_context(os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", method))

    def __getattr__(self, name: str) -> object:
        return getattr(processes, name)


def count_together() -> None:
    """What several API servers count is added up through files. Whether it is, this library asks when it is imported,
    and that was before vLLM wanted it. What vLLM counts on requests it makes after this; not so realtime transcription.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ and (values := sys.modules.get("prometheus_client.values")) is not None:
        values.ValueClass = values.get_value_class()  # type: ignore[attr-defined]


def fit() -> bool:
    """Whether this process may be forked: a CUDA context and running threads do not survive that."""
    deadline = time.monotonic() + THREADS_END_S
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    return threading.active_count() == 1 and not cuda_is_initialised()


def cuda_is_initialised() -> bool:
    """Whether anything in this process has called cuInit: every other call says that it has not been, until then."""
    try:
        answer = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    except (OSError, AttributeError):
        return False  # no driver that could be initialised
    return bool(answer != _CUDA_ERROR_NOT_INITIALIZED)


def serve(answers: TextIO) -> dict[str, Any] | None:
    """Fork for each request until stdin ends. Returns the request in the engine, None in the parent."""
    awake, wake = os.pipe()
    os.set_blocking(awake, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    running: set[int] = set()
    text = b""
    with selectors.DefaultSelector() as selector:
        selector.register(awake, selectors.EVENT_READ)
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == awake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(awake, 4096)
                    reap(running, answers)
                    continue
                read = os.read(key.fd, 1 << 16)
                if not read:
                    return None
                *lines, text = (text + read).split(b"\n")
                for line in lines:
                    request = json.loads(line)
                    parent = os.getpid()
                    with warnings.catch_warnings():
                        # Python warns of threads; those that are left here are idle pools of libraries.
                        warnings.simplefilter("ignore", DeprecationWarning)
                        pid = os.fork()
                    if pid == 0:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        os.close(awake)
                        os.close(wake)
                        return {**request, "parent": parent}
                    running.add(pid)
                    print(json.dumps({"number": request["number"], "pid": pid}), file=answers)


def reap(running: set[int], answers: TextIO) -> None:
    """Tell which engines have ended. Other children are the business of what started them."""
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            running.remove(pid)
            print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), file=answers)


def become(request: dict[str, Any], changes: dict[str, str | None]) -> None:
    """The surroundings that a started program would have, once it has imported the same."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != request["parent"]:
        os._exit(1)  # it ended before it could be told to take this process along
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    os.environ.clear()
    environment = {**request["environment"], **changes}
    os.environ.update({name: value for name, value in environment.items() if value is not None})
    # Where modules are found, a started process reads when it begins.
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [entry for entry in path if entry and entry not in sys.path]
    # And it has as many threads as cores; this one was told at its import how many the parent has.
    if (torch := sys.modules.get("torch")) is not None and request["cores"]:
        torch.set_num_threads(len(request["cores"]))


def run(argv: list[str]) -> None:
    """`-m MODULE ARGUMENTS` or `SCRIPT ARGUMENTS`, as Python would run it."""
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
