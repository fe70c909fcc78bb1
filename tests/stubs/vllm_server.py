"""A stand-in for `vllm serve MODEL --flags`: real processes, real HTTP, made-up tokens, and faults on request.

`install(bin_directory)` puts a program `vllm` there. Flags that it does not know are taken with or without a value. Its
log, metrics and answers have the form of vLLM 0.26. The engine core is a child process called VLLM::EngineCore, which
attaches itself to a stub MPS daemon when one answers in CUDA_MPS_PIPE_DIRECTORY, and enters itself in the fake NVML's
state (FAKE_NVML_STATE, see fake_nvml.py). Every step gives each running request one token.

Faults come from the JSON file named by VLLM_STUB_FAULTS: {"all": {…}, "0": {…}} where "0" is the engine's index
(MPS_ADVISOR_ENGINE) or its port. Each value is one object or a list of them; an object with "when": {"NAME": "value"}
counts only where the environment holds that value (null: not set). Keys:

    hang_start        never becomes ready
    die_at_start      "oom", "crash" or "shm" (no room in /dev/shm)
    die_after_s       the API server ends so long after the first completion request
    core_dies_after_s the engine core is killed so long after it, and the API server ends after that
    hang_after_s      nothing is answered or generated any more from then on
    core_faults_after_s  the engine core meets an illegal memory access so long after it, says so and ends
    core_survives     the engine core goes on when the API server is killed
    ignore_sigterm    both processes ignore SIGTERM
    outlives_parent   goes on when whoever started it ends, as vLLM does (a deployment's start script ends)
    not_attached      the engine core stays away from the MPS daemon
    kv_tokens         KV cache size in tokens, whatever was asked for
    wrong_logprobs    true or a number: log-probabilities are off by it (true: 0.5)
    tokens_per_s      output tokens per second of this engine; a list goes by the number of engines on the GPU
    tokens_per_s_mps  the same where the engine core is attached to a daemon
    coalesce          tokens per streamed chunk
    bos               tokens that the tokenizer adds to every prompt
    tokens_per_word   tokens that a word makes
    split_bytes       streams are sent in pieces of so many bytes
    fail_every        every n-th streamed request fails, the first `spare` ones excepted
    fail_how          "status" (the default), "disconnect", "error_event" or "no_usage"
    request_log       file that gets one JSON line for every completion that was asked for

Only the standard library, since the installed program runs without site-packages.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import importlib.machinery
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from collections import deque
from pathlib import Path

VERSION = "0.26.0"
CORE_TITLE = "VLLM::EngineCore"
DEFAULT_BUDGET = 2048
LIFETIME_S = 600.0
BLOCK_TOKENS = 16
KV_BYTES_PER_TOKEN = 12288  # Qwen2.5-0.5B in bf16, where the model's folder says nothing else
WEIGHTS_BYTES = 2 << 30
GPU_BYTES = 150754820096
TOKENS_PER_S = 4000.0
STEP_MIN_S = 0.001
# Of vLLM's histogram of step sizes, as its text has them.
STEP_BOUNDS = (*(float(2**power) for power in (0, *range(3, 15))), "+Inf")
FINGERPRINT = f"vllm-{VERSION}-547254ce"


def install(bin_directory):
    """Writes the program `vllm` into a directory and returns its path."""
    bin_directory = Path(bin_directory)
    bin_directory.mkdir(parents=True, exist_ok=True)
    program = bin_directory / "vllm"
    program.write_text(
        f"#!{sys.executable} -IS\n"
        f"import runpy; runpy.run_path({str(Path(__file__).absolute())!r}, run_name='__main__')\n"
    )
    program.chmod(0o755)
    return program


# ---------------------------------------------------------------- what it was started with


def parse(arguments):
    """The model and the flags by name with underscores; a flag without a value is true, --no-x makes x false."""
    words = deque(arguments)
    model, flags = None, {}
    while words:
        word = words.popleft()
        if not word.startswith("-"):
            model = word if model is None else model
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if not equals:
            value = words.popleft() if words and not words[0].startswith("-") else True
        name = name.replace("-", "_")
        if value is True and name.startswith("no_"):
            name, value = name[3:], False
        flags[name] = value
    return model, flags


def plugged_in():
    """The text of all plug-ins that this vLLM would find, by their entry points."""
    texts = []
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        for found in Path(folder).glob("*.dist-info/entry_points.txt"):
            group, _, line = found.read_text().strip().partition("\n")
            if group == "[vllm.general_plugins]":
                texts.append((Path(folder) / f"{line.partition(' = ')[2].partition(':')[0]}.py").read_text())
    return "\n".join(texts)


def read_faults(port):
    path = os.environ.get("VLLM_STUB_FAULTS")
    if not path or not Path(path).exists():
        return {}
    rules = json.loads(Path(path).read_text())
    found = {}
    for key in ("all", str(port), os.environ.get("MPS_ADVISOR_ENGINE", "0")):
        rule = rules.get(key, {})
        for one in rule if isinstance(rule, list) else [rule]:
            when = one.get("when", {})
            if all(os.environ.get(name) == value for name, value in when.items()):
                found |= {name: value for name, value in one.items() if name != "when"}
    return found


class Config:
    """What the flags, the model's config.json and vLLM's defaults come to."""

    def __init__(self, model, flags):
        self.model, self.flags = model, flags
        self.port = int(flags.get("port", 8000))
        self.host = flags.get("host", "127.0.0.1")
        self.name = flags.get("served_model_name", model)
        self.faults = read_faults(self.port)
        overrides = json.loads(flags.get("hf_overrides", "{}"))
        self.overridden = overrides.get("architectures", [None])[0]
        if self.overridden and self.overridden not in plugged_in():
            sys.exit(f"Model architectures ['{self.overridden}'] are not supported for now.")
        try:
            shape = json.loads((Path(model) / "config.json").read_text())
        except OSError:
            shape = {}
        self.architecture = (shape.get("architectures") or ["Qwen2ForCausalLM"])[0]
        self.max_model_len = int(flags.get("max_model_len", shape.get("max_position_embeddings", 32768)))
        self.max_num_seqs = int(flags.get("max_num_seqs", 1024))
        self.budget = int(flags.get("max_num_batched_tokens", 8192))
        self.prefix_caching = bool(flags.get("enable_prefix_caching", True))
        self.async_scheduling = bool(flags.get("async_scheduling", True))
        self.utilization = float(flags.get("gpu_memory_utilization", 0.92))
        compilation = json.loads(flags.get("compilation_config", flags.get("O", "{}")))
        capture = flags.get("max_cudagraph_capture_size", compilation.get("max_cudagraph_capture_size"))
        self.capture = int(capture or min(2 * self.max_num_seqs, 512))
        token_bytes = KV_BYTES_PER_TOKEN
        if {"num_hidden_layers", "num_attention_heads", "hidden_size"} <= shape.keys():
            heads = shape["num_attention_heads"]
            head_dim = shape.get("head_dim") or shape["hidden_size"] // heads
            token_bytes = 2 * 2 * shape["num_hidden_layers"] * shape.get("num_key_value_heads", heads) * head_dim
        self.kv_bytes = int(flags.get("kv_cache_memory_bytes", self.utilization * GPU_BYTES - WEIGHTS_BYTES))
        tokens = int(self.faults.get("kv_tokens", self.kv_bytes // token_bytes))
        self.blocks = tokens // BLOCK_TOKENS
        self.kv_tokens = self.blocks * BLOCK_TOKENS

    @property
    def capture_sizes(self):
        return [
            size for size in (1, 2, 4, *range(8, 256, 8), *range(256, self.capture + 1, 16)) if size <= self.capture
        ]


def log(role, place, text, level="INFO"):
    stamp = time.strftime("%m-%d %H:%M:%S")
    print(f"({role} pid={os.getpid()}) {level} {stamp} [{place}] {text}", flush=True)


def be_called(name):
    ctypes.CDLL(None).prctl(15, name.encode()[:15], 0, 0, 0)


# ---------------------------------------------------------------- the engine core's process


@contextlib.contextmanager
def nvml_state():
    """The fake NVML's state to change, under its lock; written in one piece. None where there is none."""
    path = os.environ.get("FAKE_NVML_STATE")
    if not path:
        yield None
        return
    path = Path(path)
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads(path.read_text()) if path.exists() else {}
        before = json.dumps(state)
        yield state
        if json.dumps(state) != before:
            new = Path(f"{path}.{os.getpid()}")
            new.write_text(json.dumps(state))
            new.replace(path)


def hold_memory(held, pid=None):
    """Enter this process (or another) in the fake NVML's list with `held` bytes; None takes it out."""
    pid = str(pid or os.getpid())
    with nvml_state() as state:
        if state is None:
            return
        if "processes_dir" in state:
            file = Path(state["processes_dir"]) / pid
            file.unlink(missing_ok=True) if held is None else file.write_text(str(held))
        elif held is None:
            state.get("processes", {}).pop(pid, None)
        else:
            state.setdefault("processes", {})[pid] = held


def engines_on_the_gpu():
    with nvml_state() as state:
        if not state:
            return 1
        if "processes_dir" in state:
            pids = [file.name for file in Path(state["processes_dir"]).iterdir()]
        else:
            pids = list(state.get("processes", {}))
    return max(1, sum(Path(f"/proc/{pid}").exists() for pid in pids))


def mps(command):
    """`attach` (the server's PID) or `detach` this process; None where no daemon is."""
    directory = os.environ.get("CUDA_MPS_PIPE_DIRECTORY")
    if not directory or not Path(directory).is_dir():
        return None
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import nvidia_cuda_mps_control as control
    except ImportError:
        return None
    return getattr(control, command)(directory, os.getpid())


def core_main(config, ready, survivor_of):
    """Start up as vLLM's engine core does, say on the pipe `ready` whether MPS is there, and stay."""
    be_called(CORE_TITLE)
    parent, ends_at_s = os.getppid(), time.monotonic() + LIFETIME_S
    asked = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN if config.faults.get("ignore_sigterm") else lambda *_: asked.append(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulted = []
    signal.signal(signal.SIGUSR1, lambda *_: faulted.append(1))
    try:
        server = start_core(config, ready)
        while not asked and time.monotonic() < ends_at_s:
            if faulted:
                return core_error("CUDA error: an illegal memory access was encountered")
            if server and not running(server):
                return core_error("CUDA error: remote procedural call between the MPS server and the MPS client failed")
            if not (Path(f"/proc/{survivor_of}").exists() if survivor_of else os.getppid() == parent):
                break
            time.sleep(0.05)
    finally:
        mps("detach")
        hold_memory(None)
    log("EngineCore", "core.py:1326", "[shutdown] EngineCore: exiting busy loop")
    return 0


def core_error(what):
    log("EngineCore", "core.py:1240", "EngineCore encountered a fatal error.", "ERROR")
    log("EngineCore", "core.py:1240", f"torch.AcceleratorError: {what}", "ERROR")
    return 1


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def start_core(config, ready):
    """Start up; the PID of the MPS server that it is a client of, None where it is none."""
    dtype = config.flags.get("dtype", "bfloat16")
    log(
        "EngineCore",
        "core.py:116",
        f"Initializing a V1 LLM engine (v{VERSION}) with config: model={config.model!r}, speculative_config=None, "
        f"tokenizer={config.model!r}, skip_tokenizer_init=False, tokenizer_mode=auto, "
        f"dtype=torch.{'bfloat16' if dtype == 'auto' else dtype}, max_seq_len={config.max_model_len}, "
        f"load_format={config.flags.get('load_format', 'auto')}, tensor_parallel_size=1, "
        f"quantization={config.flags.get('quantization')}, enforce_eager=False, "
        f"kv_cache_dtype={config.flags.get('kv_cache_dtype', 'auto')}, device_config=cuda, seed=0, "
        f"served_model_name={config.name}, enable_prefix_caching={config.prefix_caching}, "
        "enable_chunked_prefill=True, pooler_config=None, compilation_config={'mode': "
        "<CompilationMode.VLLM_COMPILE: 3>, 'backend': 'inductor', 'compile_ranges_endpoints': "
        f"[{config.budget}], 'cudagraph_mode': <CUDAGraphMode.FULL_AND_PIECEWISE: (2, 1)>, "
        f"'cudagraph_capture_sizes': {config.capture_sizes}, "
        f"'max_cudagraph_capture_size': {config.capture_sizes[-1]}}}",
    )
    log("EngineCore", "cuda.py:482", "Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN'].")
    match config.faults.get("die_at_start"):
        case "oom":
            log("EngineCore", "core.py:1233", "EngineCore failed to start.", "ERROR")
            log("EngineCore", "core.py:1233", "Traceback (most recent call last):", "ERROR")
            log(
                "EngineCore",
                "core.py:1233",
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                "139.80 GiB of which 1.11 GiB is free.",
                "ERROR",
            )
            sys.exit(1)
        case "shm":
            log("EngineCore", "core.py:1233", "EngineCore failed to start.", "ERROR")
            log("EngineCore", "core.py:1233", "OSError: [Errno 28] No space left on device: '/psm_21467b46'", "ERROR")
            sys.exit(1)
        case "crash":
            log("EngineCore", "core.py:1233", "EngineCore failed to start.", "ERROR")
            log("EngineCore", "core.py:1233", "RuntimeError: CUDA error: an illegal instruction was met", "ERROR")
            sys.exit(1)
    attached = None if config.faults.get("not_attached") else mps("attach")
    hold_memory(config.kv_bytes + WEIGHTS_BYTES)
    log("EngineCore", "model_runner.py:305", "Model loading took 0.93 GiB and 0.01 seconds")
    log("EngineCore", "monitor.py:53", "torch.compile took 0.01 s in total")
    log("EngineCore", "kv_cache_utils.py:2177", f"GPU KV cache size: {config.kv_tokens:,} tokens")
    log(
        "EngineCore",
        "kv_cache_utils.py:2178",
        f"Maximum concurrency for {config.max_model_len:,} tokens per request: "
        f"{config.kv_tokens / config.max_model_len:.2f}x",
    )
    log("EngineCore", "model_runner.py:747", "Graph capturing finished in 1 secs, took 0.39 GiB")
    os.write(ready, b"1" if attached else b"0")
    os.close(ready)
    return attached


# ---------------------------------------------------------------- generating tokens


class Request:
    """One streamed completion; its events are put into `events`, None at the end."""

    def __init__(self, config, body, prompt_tokens, failure):
        self.prompt_tokens, self.max_tokens = prompt_tokens, int(body.get("max_tokens", 16))
        self.usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.failure = failure
        self.coalesce = int(config.faults.get("coalesce", 1))
        self.generated = self.unsent = 0
        self.events = asyncio.Queue()
        self.gone = False
        self.head = (
            f'{{"id":"cmpl-{random.getrandbits(64):016x}","object":"text_completion",'
            f'"created":{int(time.time())},"model":{json.dumps(body["model"])},"choices":['
        )

    def step(self):
        """One more token; true when it was the last."""
        self.generated += 1
        self.unsent += 1
        last = self.generated >= self.max_tokens
        if last or self.unsent == self.coalesce:
            text = json.dumps("".join(f" {word()}" for _ in range(self.unsent)))
            reason = '"length"' if last else "null"
            self.send(
                f'{self.head}{{"index":0,"text":{text},"logprobs":null,"finish_reason":{reason},"stop_reason":null,'
                '"prompt_token_ids":null,"token_ids":null}]}'
            )
            self.unsent = 0
        if last:
            if self.usage and self.failure != "no_usage":
                self.send(
                    f'{self.head}],"usage":{{"prompt_tokens":{self.prompt_tokens},'
                    f'"total_tokens":{self.prompt_tokens + self.generated},"completion_tokens":{self.generated},'
                    f'"prompt_tokens_details":{{"cached_tokens":0}}}},"system_fingerprint":"{FINGERPRINT}"}}'
                )
            self.end()
        elif self.generated >= 2 and self.failure in ("disconnect", "error_event"):
            self.fail("something broke in the middle")
            last = True
        return last

    def send(self, event):
        self.events.put_nowait(f"data: {event}\n\n".encode())

    def fail(self, message):
        if self.failure != "disconnect":
            self.send(json.dumps({"error": error_body(500, "InternalServerError", message)}, separators=(",", ":")))
            self.end()
        else:
            self.events.put_nowait(None)

    def end(self):
        self.send("[DONE]")
        self.events.put_nowait(b"")
        self.events.put_nowait(None)


def word():
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=4))


def error_body(code, kind, message):
    return {"message": message, "type": kind, "param": None, "code": code}


class Scheduler:
    """Continuous batching without a model: every step each running request gets a token."""

    def __init__(self, config):
        self.config = config
        self.running, self.waiting = [], deque()
        self.steps = self.generation_tokens = self.prompt_tokens = self.prefix_hits = 0
        self.first_blocks = set()
        self.told = 0, 0  # requests running and waiting, as of the last step: like vLLM, which tells no later
        self.step_sizes = {}  # tokens of a step -> steps
        self.admitted = 0  # prompt tokens that the next step computes
        self.attached = self.hung = False
        self.wake = asyncio.Event()

    def add(self, request):
        self.waiting.append(request)
        self.wake.set()

    def tell(self):
        self.told = len([request for request in self.running if not request.gone]), len(self.waiting)

    def look_up(self, tokens):
        """Counts a hit when the first block of a prompt is that of an earlier one; nothing is ever thrown out."""
        block = tuple(tokens[:BLOCK_TOKENS])
        if self.config.prefix_caching and len(tokens) > BLOCK_TOKENS:
            self.prefix_hits += BLOCK_TOKENS if block in self.first_blocks else 0
            self.first_blocks.add(block)

    def count_step(self, tokens):
        self.steps += 1
        self.step_sizes[tokens] = self.step_sizes.get(tokens, 0) + 1

    def steps_up_to(self, tokens):
        return sum(steps for size, steps in self.step_sizes.items() if size <= float(tokens))

    def tokens_per_s(self):
        faults = self.config.faults
        rate = faults.get("tokens_per_s", TOKENS_PER_S)
        if self.attached:
            rate = faults.get("tokens_per_s_mps", rate)
        if isinstance(rate, list):
            rate = rate[min(engines_on_the_gpu(), len(rate)) - 1]
        return float(rate)

    async def run(self):
        due_s = asked_s = 0.0
        rate = TOKENS_PER_S
        while True:
            if not self.running and not self.waiting:
                self.wake.clear()
                await self.wake.wait()
            if time.monotonic() - asked_s > 0.5:
                rate, asked_s = self.tokens_per_s(), time.monotonic()
            while self.waiting and len(self.running) < self.config.max_num_seqs:
                request = self.waiting.popleft()
                self.prompt_tokens += request.prompt_tokens
                self.admitted += request.prompt_tokens
                self.running.append(request)
            now_s = time.monotonic()
            due_s = max(due_s, now_s - 0.05) + max(STEP_MIN_S, len(self.running) / rate)
            await asyncio.sleep(max(0.0, due_s - now_s))
            if self.hung:
                await asyncio.sleep(LIFETIME_S)
            self.running = [request for request in self.running if not request.gone]
            if self.running:
                self.count_step(self.admitted + len(self.running))
                self.admitted = 0
                self.generation_tokens += len(self.running)
                self.running = [request for request in self.running if not request.step()]
                self.tell()

    def fail_all(self):
        for request in [*self.running, *self.waiting]:
            request.fail("EngineCore encountered an issue. See stack trace (above) for the root cause.")


# ---------------------------------------------------------------- the API server's process


class Server:
    def __init__(self, config):
        self.config = config
        self.scheduler = Scheduler(config)
        self.core = None
        self.stopping = asyncio.Event()
        self.code = 0
        self.streamed = 0
        self.timed = False

    async def run(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            if self.config.faults.get("ignore_sigterm"):
                signal.signal(number, signal.SIG_IGN)
            else:
                asyncio.get_running_loop().add_signal_handler(number, self.stopping.set)
        background = [asyncio.create_task(self.watch_parent()), asyncio.create_task(self.serve())]
        await self.stopping.wait()
        for task in background:
            task.cancel()
        if not self.code:
            log("APIServer", "launcher.py:100", "[shutdown] API server: shutdown triggered")
        self.end_core()
        return self.code

    async def watch_parent(self):
        parent, ends_at_s = os.getppid(), time.monotonic() + LIFETIME_S
        stays = bool(self.config.faults.get("outlives_parent"))
        while (stays or os.getppid() == parent) and time.monotonic() < ends_at_s:
            await asyncio.sleep(0.1)
        self.stopping.set()

    async def serve(self):
        config = self.config
        try:  # like vLLM, which binds before anything else
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((config.host, config.port))
        except OSError as error:
            log("APIServer", "launcher.py:50", f"OSError: {error}", "ERROR")
            self.stop(1)
            return
        # One of the sockets that vLLM leaves behind.
        Path(os.environ.get("VLLM_RPC_BASE_PATH", tempfile.gettempdir()), str(uuid.uuid4())).touch()
        port = f"http://{config.host}:{config.port}"
        log("APIServer", "api_utils.py:345", f" █▄█▀ █     █     █     █  model   {config.model}")
        log(
            "APIServer",
            "api_utils.py:273",
            f"non-default args: {{'model_tag': {config.model!r}, 'host': {config.host!r}, 'port': {config.port}, "
            f"'model': {config.model!r}, 'served_model_name': [{config.name!r}], 'gpu_memory_utilization': "
            f"{config.utilization}, 'kv_cache_memory_bytes': {config.kv_bytes}, 'enable_prefix_caching': "
            f"{config.prefix_caching}, 'max_num_batched_tokens': {config.budget}, 'max_num_seqs': "
            f"{config.max_num_seqs}}}",
        )
        log("APIServer", "model.py:623", f"Resolved architecture: {config.architecture}")
        log("APIServer", "model.py:1788", f"Using max model len {config.max_model_len}")
        if config.budget != DEFAULT_BUDGET:  # which vLLM has said already, to nobody, while it read its arguments
            told = f"Chunked prefill is enabled with max_num_batched_tokens={config.budget}."
            log("APIServer", "scheduler.py:252", told)
        scheduling = "enabled" if config.async_scheduling else "disabled"
        log("APIServer", "vllm.py:1109", f"Asynchronous scheduling is {scheduling}.")
        if not await self.start_core():
            log(
                "APIServer",
                "core_client.py:600",
                "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
                "ERROR",
            )
            self.stop(1)
            return
        if config.faults.get("hang_start"):
            return
        server = await asyncio.start_server(self.connection, config.host, config.port, backlog=4096, limit=1 << 24)
        log("APIServer", "api_server.py:677", f"Starting vLLM server on {port}")
        print(f"(APIServer pid={os.getpid()}) INFO:     Application startup complete.", flush=True)
        generating = asyncio.create_task(self.scheduler.run())
        while self.core.poll() is None:
            if generating.done():
                generating.result()
            await asyncio.sleep(0.05)
        log(
            "APIServer",
            "core_client.py:700",
            f"Engine core proc EngineCore died unexpectedly ({self.core.poll()})",
            "ERROR",
        )
        log(
            "APIServer",
            "async_llm.py:708",
            "vllm.v1.engine.exceptions.EngineDeadError: EngineCore met an issue.",
            "ERROR",
        )
        hold_memory(None, self.core.pid)  # as a driver does for the dead
        self.scheduler.fail_all()
        await asyncio.sleep(0.1)
        server.close()
        self.stop(1)

    async def start_core(self):
        readable, writable = os.pipe()
        faults = self.config.faults
        survivor_of = (1 if faults.get("outlives_parent") else os.getppid()) if faults.get("core_survives") else 0
        self.core = subprocess.Popen(
            [sys.executable, "-IS", __file__, CORE_TITLE, str(writable), str(survivor_of), *sys.argv[1:]],
            pass_fds=[writable],
            stdin=subprocess.DEVNULL,
        )
        os.close(writable)
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        loop.add_reader(readable, lambda: answer.done() or answer.set_result(os.read(readable, 1)))
        word = await answer
        loop.remove_reader(readable)
        os.close(readable)
        self.scheduler.attached = word == b"1"
        return bool(word)

    def end_core(self):
        if self.core is None or self.core.poll() is not None:
            return
        self.core.terminate()
        try:
            self.core.wait(1.0)
        except subprocess.TimeoutExpired:
            self.core.kill()
            self.core.wait(5)

    def stop(self, code):
        self.code = code
        self.stopping.set()

    def start_timers(self):
        if self.timed:
            return
        self.timed = True
        loop, faults = asyncio.get_running_loop(), self.config.faults
        if "die_after_s" in faults:
            loop.call_later(faults["die_after_s"], self.die)
        if "core_dies_after_s" in faults:
            loop.call_later(faults["core_dies_after_s"], self.core.kill)
        if "core_faults_after_s" in faults:
            loop.call_later(faults["core_faults_after_s"], lambda: self.core.send_signal(signal.SIGUSR1))
        if "hang_after_s" in faults:
            loop.call_later(faults["hang_after_s"], lambda: setattr(self.scheduler, "hung", True))

    def die(self):
        log("APIServer", "launcher.py:99", "RuntimeError: the API server met an error that nobody expected", "ERROR")
        if not self.config.faults.get("core_survives"):
            self.end_core()
        os._exit(1)

    # -- HTTP

    async def connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self.exchange(reader, writer):
                pass
        with contextlib.suppress(ConnectionError):
            writer.close()

    async def exchange(self, reader, writer):
        """One request and its answer; false when the connection is to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split(" ", 2)
        length = re.search(r"(?i)\r\ncontent-length: *(\d+)", head)
        data = await reader.readexactly(int(length.group(1))) if length else b""
        path = target.partition("?")[0]
        if self.scheduler.hung:
            await asyncio.sleep(LIFETIME_S)
        match method, path:
            case "GET", "/health":
                return await self.answer(writer, method, path, 200, b"")
            case "GET", "/metrics":
                return await self.answer(
                    writer, method, path, 200, self.metrics().encode(), "text/plain; version=0.0.4"
                )
            case "GET", "/v1/models":
                body = {"object": "list", "data": [{"id": self.config.name, "object": "model", "owned_by": "vllm"}]}
                return await self.answer(writer, method, path, 200, json.dumps(body).encode())
            case "POST", "/v1/completions":
                return await self.complete(writer, method, path, json.loads(data))
            case "POST", "/collective_rpc" if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
                try:
                    found = await self.extension(json.loads(data))
                except Exception as error:
                    return await self.answer(writer, method, path, 500, repr(error).encode())
                return await self.answer(writer, method, path, 200, json.dumps({"results": [found]}).encode())
        return await self.answer(writer, method, path, 404, b'{"detail":"Not Found"}')

    async def extension(self, body):
        """A call of the worker extension: of the class that was named, found where the engine would look for it."""
        module, _, name = self.config.flags["worker_extension_cls"].partition(".")
        folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        source = next(Path(folder) / f"{module}.py" for folder in folders if (Path(folder) / f"{module}.py").exists())
        extension = getattr(importlib.machinery.SourceFileLoader(module, str(source)).load_module(), name)
        if not callable(getattr(extension, body["method"], None)):
            raise AttributeError(body["method"])
        asked, rates = body["kwargs"], self.config.faults.get("steps", {})
        if "fails" in rates:
            raise RuntimeError(rates["fails"])
        match body["method"]:
            case "advisor_prepare":
                tokens = asked.get("decode", 0) + asked.get("prefill", 0) * asked.get("prefill_tokens", 0)
                if tokens > self.config.budget:
                    return {"refused": f"{tokens} tokens are more than the budget {self.config.budget}"}
                left = rates.get("left", {}).get(self.config.overridden, 1.0)
                self.step_s = rates.get("ms_per_token", 0.1) * left * tokens / 1000
                sequences = asked.get("decode", 0) + asked.get("prefill", 0)
                return {"tokens": tokens, "sequences": sequences, "mode": "FULL", "graphed": True, "why": ""}
            case "advisor_run":
                await asyncio.sleep(max(0.0, asked["start_s"] + asked["seconds"] - time.monotonic()))
                count = int(asked["seconds"] / self.step_s)
                return {"marks": [[asked["start_s"] + number * self.step_s, number] for number in range(count + 1)]}
            case "advisor_trace":
                if "trace_fails" in rates:
                    return {"refused": rates["trace_fails"]}
                kernels = [[0, 0.1 * repeat, self.step_s, 66] for repeat in range(asked["repeats"])]
                return {"names": ["flash_fwd"], "kernels": kernels}
        return {}

    async def answer(self, writer, method, path, status, body, content="application/json"):
        self.log_access(writer, method, path, status)
        reason = {200: "OK", 400: "Bad Request", 404: "Not Found"}.get(status, "Internal Server Error")
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: {content}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return True

    def log_access(self, writer, method, path, status):
        peer = ":".join(map(str, (writer.get_extra_info("peername") or ("?", 0))[:2]))
        reason = " OK" if status == 200 else ""
        print(
            f'(APIServer pid={os.getpid()}) INFO:     {peer} - "{method} {path} HTTP/1.1" {status}{reason}', flush=True
        )

    async def complete(self, writer, method, path, body):
        self.start_timers()
        tokens = self.tokens_of(body.get("prompt", ""))
        wanted = int(body.get("max_tokens", 16))
        problem = None
        if body.get("model") != self.config.name:
            problem = 404, "NotFoundError", f"The model `{body.get('model')}` does not exist."
        elif len(tokens) + wanted > self.config.max_model_len:
            problem = (
                400,
                "BadRequestError",
                f"This model's maximum context length is {self.config.max_model_len} tokens. However, you requested "
                f"{wanted} output tokens and your prompt contains {len(tokens)} input tokens.",
            )
        failure = None
        if body.get("stream"):
            self.streamed += 1
            self.scheduler.look_up(tokens)
            faults = self.config.faults
            number = self.streamed - int(faults.get("spare", 0))
            if faults.get("fail_every") and number > 0 and number % faults["fail_every"] == 0:
                failure = faults.get("fail_how", "status")
        if failure == "status":
            problem = 500, "InternalServerError", "something broke before the first token"
        if problem:
            text = json.dumps({"error": error_body(*problem)}).encode()
            return await self.answer(writer, method, path, problem[0], text)
        if body.get("stream"):
            return await self.stream(writer, method, path, body, len(tokens), failure)
        self.note(body, len(tokens), wanted)
        return await self.answer(writer, method, path, 200, json.dumps(self.whole(body, tokens)).encode())

    def tokens_of(self, prompt):
        """Token ids of a prompt: a text, or ids."""
        if isinstance(prompt, list):
            return [int(token) for token in prompt]
        faults = self.config.faults
        ids = [300 + zlib.crc32(piece.encode()) % 150000 for piece in prompt.split()]
        ids = [token for token in ids for _ in range(int(faults.get("tokens_per_word", 1)))]
        return [1] * int(faults.get("bos", 0)) + ids

    def note(self, body, prompt_tokens, completion_tokens):
        if path := self.config.faults.get("request_log"):
            line = {
                "engine": os.environ.get("MPS_ADVISOR_ENGINE"),
                "prompt": body.get("prompt"),
                "max_tokens": body.get("max_tokens"),
                "stream": bool(body.get("stream")),
                "body": {name: value for name, value in body.items() if name != "prompt"},
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "cores": sorted(os.sched_getaffinity(0)),
            }
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")

    async def stream(self, writer, method, path, body, prompt_tokens, failure):
        self.log_access(writer, method, path, 200)
        request = Request(self.config, body, prompt_tokens, failure)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self.scheduler.add(request)
        piece = int(self.config.faults.get("split_bytes", 0))
        whole = False
        try:
            while (event := await request.events.get()) is not None:
                whole = event == b""
                for part in [event[i : i + piece] for i in range(0, len(event), piece)] if piece and event else [event]:
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                    await writer.drain()
                    if piece:
                        await asyncio.sleep(0)
        finally:
            request.gone = True
            self.note(body, prompt_tokens, request.generated)
        return whole

    def whole(self, body, tokens):
        """An answer in one piece, with log-probabilities that depend on the tokens before each one."""
        wanted = int(body.get("max_tokens", 16))
        wrong = float(self.config.faults.get("wrong_logprobs", 0))
        wrong = 0.5 if self.config.faults.get("wrong_logprobs") is True else wrong

        def logprob(text):
            return -1.0 - zlib.crc32(text.encode()) % 10000 / 1000 - wrong

        texts = [f" {zlib.crc32(repr((tokens, place)).encode()) % 10000:04d}" for place in range(wanted)]
        values = [logprob(repr((tokens, text))) for text in texts]
        top = [dict([pair]) for pair in zip(texts, values, strict=True)]
        rows = [
            {str(token): {"logprob": logprob(repr(tokens[:place])), "rank": 1, "decoded_token": f" {token}"}}
            for place, token in enumerate(tokens, 1)
        ]
        # Beside the prompt's own token the likeliest one, where it is another: the higher figure.
        for row in rows[1::2]:
            row["0"] = {"logprob": -0.5, "rank": 1, "decoded_token": " likeliest"}
        if os.environ.get("VLLM_USE_RUST_FRONTEND") == "1":  # which gives bare figures, sorted by token
            rows = [{token: told["logprob"] for token, told in sorted(row.items())} for row in rows]
        prompt_logprobs = [None, *rows[1:]]
        choice = {
            "index": 0,
            "text": "".join(texts),
            "logprobs": {
                "text_offset": [5 * place for place in range(wanted)],
                "token_logprobs": values,
                "tokens": texts,
                "top_logprobs": top,
            }
            if body.get("logprobs") is not None
            else None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": prompt_logprobs if body.get("prompt_logprobs") is not None else None,
            "prompt_token_ids": None,
        }
        self.scheduler.prompt_tokens += len(tokens)
        self.scheduler.generation_tokens += wanted
        for place in range(wanted):
            self.scheduler.count_step(1 if place else len(tokens) + 1)
        self.scheduler.tell()
        usage = {"prompt_tokens": len(tokens), "total_tokens": len(tokens) + wanted, "completion_tokens": wanted}
        return {
            "id": f"cmpl-{random.getrandbits(64):016x}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.config.name,
            "choices": [choice],
            "system_fingerprint": FINGERPRINT,
            "usage": usage,
        }

    def metrics(self):
        config, scheduler = self.config, self.scheduler
        labels = f'engine="0",model_name="{config.name}"'
        counters = {
            "num_requests_running": scheduler.told[0],
            "num_requests_waiting": scheduler.told[1],
            "prefix_cache_queries_total": scheduler.prompt_tokens if config.prefix_caching else 0,
            "prefix_cache_hits_total": scheduler.prefix_hits,
            "num_preemptions_total": 0,
            "prompt_tokens_total": scheduler.prompt_tokens,
            "generation_tokens_total": scheduler.generation_tokens,
            "iteration_tokens_total_count": scheduler.steps,
            "iteration_tokens_total_sum": scheduler.generation_tokens + scheduler.prompt_tokens,
        }
        cache = {
            "block_size": BLOCK_TOKENS,
            "cache_dtype": config.flags.get("kv_cache_dtype", "auto"),
            "enable_prefix_caching": config.prefix_caching,
            "engine": 0,
            "gpu_memory_utilization": config.utilization,
            "kv_cache_memory_bytes": config.kv_bytes,
            "kv_cache_size_tokens": config.kv_tokens,
            "num_gpu_blocks": config.blocks,
        }
        lines = [
            "# HELP vllm:generation_tokens_total Number of generation tokens processed.",
            "# TYPE vllm:generation_tokens_total counter",
            *(f"vllm:{name}{{{labels}}} {float(value)}" for name, value in counters.items()),
            *(
                f'vllm:iteration_tokens_total_bucket{{{labels},le="{bound}"}} {float(scheduler.steps_up_to(bound))}'
                for bound in STEP_BOUNDS
            ),
            "vllm:cache_config_info{" + ",".join(f'{name}="{value}"' for name, value in cache.items()) + "} 1.0",
        ]
        return "\n".join(lines) + "\n"


def main(arguments):
    if arguments[:1] == ["--version"]:
        print(VERSION)
        return 0
    core = arguments[:1] == [CORE_TITLE]
    rest = arguments[3:] if core else arguments
    model, flags = parse(rest[1:] if rest[:1] == ["serve"] else rest)
    if model is None:
        print("usage: vllm serve MODEL [flags]", file=sys.stderr)
        return 2
    config = Config(model, flags)
    if core:
        return core_main(config, int(arguments[1]), int(arguments[2]))
    return asyncio.run(Server(config).run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
