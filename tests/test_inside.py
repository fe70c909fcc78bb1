"""What runs inside vLLM, against a made-up model runner and a made-up GPU: what it asks of them, and what it keeps."""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
import time
import types
import weakref
from types import SimpleNamespace

import msgspec
import pytest

from advisor.core.records import Step
from advisor.shell import inside
from advisor.shell.inside import FixedSteps


class Tensor:
    dtype, device = "bf16", "cuda"

    def __init__(self):
        self.filled = 0

    def __getitem__(self, rows):
        return Tensor()

    def argmax(self, dim):
        return Tensor()

    def normal_(self, generator):
        self.filled += 1


class Gpu:
    """A GPU that takes `step_s` for every graph and every model call, and knows what was asked of it."""

    def __init__(self, step_s: float = 0.0, capture_fails: bool = False):
        self.step_s, self.capture_fails = step_s, capture_fails
        self.free_s, self.steps = 0.0, 0

    def work(self) -> None:
        self.steps += 1
        self.free_s = max(self.free_s, time.monotonic()) + self.step_s

    def wait(self, until_s: float) -> None:
        time.sleep(max(0.0, until_s - time.monotonic()))

    def install(self, monkeypatch) -> None:
        gpu, nothing = self, lambda *args, **rest: contextlib.nullcontext()

        class Graph:
            def replay(self):
                gpu.work()

        class Event:
            def record(self):
                self.at_s = gpu.free_s

            def synchronize(self):
                gpu.wait(self.at_s)

        @contextlib.contextmanager
        def capture(graph):
            if gpu.capture_fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            yield

        stream = SimpleNamespace()
        torch = types.ModuleType("torch")
        torch.inference_mode, torch.bfloat16, torch.float16, torch.Generator = (
            nothing,
            "bf16",
            "f16",
            lambda device: None,
        )
        torch.cuda = SimpleNamespace(
            current_stream=lambda: stream, set_stream=lambda used: None, CUDAGraph=Graph, graph=capture,
            Event=Event, synchronize=lambda: gpu.wait(gpu.free_s),
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, "torch", torch)

    def vllm(self, monkeypatch) -> None:
        def module(name: str, **content) -> None:
            made = types.ModuleType(name)
            made.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, made)

        class Output(SimpleNamespace):
            @staticmethod
            def make_empty():
                return Output(
                    scheduled_new_reqs=[], num_scheduled_tokens={}, total_num_scheduled_tokens=0, finished_req_ids=set()
                )

        for name in ("vllm.v1", "vllm.v1.core", "vllm.v1.core.sched", "vllm.v1.worker", "vllm.v1.worker.gpu"):
            module(name)
        module("vllm", SamplingParams=lambda **rest: None)
        module("vllm.config", CUDAGraphMode=SimpleNamespace(FULL="FULL", NONE="NONE"))
        module("vllm.forward_context", BatchDescriptor=lambda **rest: None, set_forward_context=contextlib.nullcontext)
        monkeypatch.setattr(
            sys.modules["vllm.forward_context"], "set_forward_context", lambda *args, **rest: contextlib.nullcontext()
        )
        module("vllm.v1.core.sched.output", SchedulerOutput=Output, NewRequestData=SimpleNamespace)
        module("vllm.v1.worker.gpu.cudagraph_utils", get_uniform_token_count=lambda reqs, tokens, longest: longest)


class Mode(str):
    name = property(str)


class Model:
    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def __call__(self, **inputs):
        self.gpu.work()
        return Tensor()

    def compute_logits(self, hidden):
        return hidden


class Runner:
    """vLLM's model runner, as far as it is used: it has a graph for steps of one token per sequence."""

    def __init__(self, gpu: Gpu):
        self.gpu, self.executed, self.live, self.disabled = gpu, [], [], False
        self.model = Model(gpu)
        self.max_num_reqs, self.max_model_len = 256, 4096
        self.scheduler_config = SimpleNamespace(max_num_batched_tokens=8192)
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[group], num_blocks=1000)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 1000)
        self.kv_caches, self.req_states, self.vllm_config = [Tensor()], None, None
        self.kv_connector = SimpleNamespace(set_disabled=lambda value: setattr(self, "disabled", value))
        self.model_state = SimpleNamespace(prepare_inputs=lambda batch, states: {})
        self.cudagraph_manager = SimpleNamespace(dispatch=self._dispatch, run_fullgraph=self._graph)
        self.execute_model_state = None
        self.fails: Exception | None = None

    def _dispatch(self, sequences, tokens, uniform, num_active_loras):
        return SimpleNamespace(cg_mode=Mode("FULL" if uniform == 1 else "NONE"))

    def _graph(self, found):
        self.gpu.work()
        return Tensor()

    def execute_model(self, output):
        assert self.disabled, "a connector is in the way"
        self.executed.append(output)
        if self.fails and output.scheduled_new_reqs:
            raise self.fails
        self.live = [name for name in self.live if name not in output.finished_req_ids]
        self.live += list(output.num_scheduled_tokens)
        if not output.scheduled_new_reqs:
            return
        rows = Tensor()
        self.rows = weakref.ref(rows)
        batch = SimpleNamespace(
            logits_indices=rows, input_ids=Tensor(), positions=Tensor(), is_padding=Tensor(), num_tokens_after_padding=8
        )
        self.execute_model_state = SimpleNamespace(
            input_batch=batch, attn_metadata=Tensor(), slot_mappings_by_layer=None
        )


@pytest.fixture
def engine(monkeypatch):
    def made(**gpu):
        one = Gpu(**gpu)
        one.install(monkeypatch)
        one.vllm(monkeypatch)
        inside = FixedSteps()
        inside.model_runner = Runner(one)
        return inside

    return made


def test_a_decode_step_is_one_token_of_sequences_whose_earlier_ones_count_as_computed(engine):
    inside = engine()
    told = inside.advisor_prepare(decode=3, decode_context=100)
    assert (told["tokens"], told["sequences"], told["mode"], told["graphed"]) == (3, 3, "FULL", True)
    (output,) = inside.model_runner.executed
    assert set(output.num_scheduled_tokens.values()) == {1}
    requests = output.scheduled_new_reqs
    assert {(len(one.prompt_token_ids), one.num_computed_tokens, len(one.block_ids[0])) for one in requests} == {
        (100, 99, 7)
    }
    blocks = [block for one in requests for block in one.block_ids[0]]
    assert len(set(blocks)) == len(blocks) and 0 not in blocks


def test_a_prompt_may_follow_tokens_that_were_read_before(engine):
    inside = engine()
    told = inside.advisor_prepare(prefill=2, prefill_tokens=64, prefill_context=512)
    assert (told["tokens"], told["mode"]) == (128, "NONE")
    one = inside.model_runner.executed[0].scheduled_new_reqs[0]
    assert (len(one.prompt_token_ids), one.num_computed_tokens) == (576, 512)


def test_every_field_of_a_step_can_be_asked_for():
    known = inspect.signature(FixedSteps.advisor_prepare).parameters
    assert set(msgspec.structs.asdict(Step())) <= set(known)


@pytest.mark.parametrize("asked", [{"decode": 2, "decode_context": 50}, {"prefill": 1, "prefill_tokens": 50}])
def test_what_a_graph_reads_stays_alive_as_long_as_the_step(engine, asked):
    inside = engine()
    inside.advisor_prepare(**asked)
    gc.collect()
    assert inside.model_runner.rows() is not None
    inside.advisor_forget()
    gc.collect()
    assert inside.model_runner.rows() is None


def test_sequences_are_given_back_and_their_blocks_with_them(engine):
    inside = engine()
    for _ in range(3):
        inside.advisor_prepare(decode=4, decode_context=3000)  # 752 of 999 blocks each time
        assert len(inside.model_runner.live) == 4
    inside.advisor_forget()
    assert inside.model_runner.live == []
    assert inside.advisor_run(0.0, 0.1) == {"refused": "no step is prepared"}


def test_the_cache_is_filled_with_random_numbers_once(engine):
    inside = engine()
    for _ in range(2):
        inside.advisor_prepare(decode=1, decode_context=10)
    assert inside.model_runner.kv_caches[0].filled == 1


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "at least one sequence"),
        ({"decode": 257, "decode_context": 10}, "max_num_seqs 256"),
        ({"decode": 1, "decode_context": 0}, "needs 1 to 4096 tokens"),
        ({"decode": 1, "decode_context": 4097}, "needs 1 to 4096 tokens"),
        ({"prefill": 3, "prefill_tokens": 4000}, "more than the budget 8192"),
        ({"decode": 100, "decode_context": 1000}, "the cache holds 999"),
    ],
)
def test_what_vllm_could_not_hold_is_refused_before_it_is_asked(engine, asked, why):
    inside = engine()
    assert why in inside.advisor_prepare(**asked)["refused"]
    assert inside.model_runner.executed == []


def test_an_error_inside_vllm_is_an_answer_and_leaves_no_sequence(engine):
    inside = engine()
    inside.model_runner.fails = RuntimeError("CUDA out of memory")
    assert "CUDA out of memory" in inside.advisor_prepare(decode=1, decode_context=10)["refused"]
    inside.model_runner.fails = None
    assert "refused" not in inside.advisor_prepare(decode=1, decode_context=10)


def test_another_model_runner_is_refused_by_name(engine):
    inside = engine()
    del inside.model_runner.cudagraph_manager
    assert "another model runner" in inside.advisor_prepare(decode=1, decode_context=10)["refused"]


def test_a_step_that_cannot_be_captured_is_launched_and_says_why(engine):
    told = engine(capture_fails=True).advisor_prepare(prefill=1, prefill_tokens=64)
    assert not told["graphed"] and "stream is capturing" in told["why"]


def test_marks_count_what_the_gpu_has_done(engine):
    inside = engine(step_s=0.004)
    told = inside.advisor_prepare(prefill=1, prefill_tokens=64)
    assert told["step_s"] == pytest.approx(0.004, rel=0.3)
    start_s = time.monotonic() + 0.1
    marks = inside.advisor_run(start_s, 0.6)["marks"]
    assert marks[0][0] >= start_s and marks[0][1] == 0
    (left, before), (right, after) = marks[1], marks[-1]
    assert (after - before) / (right - left) == pytest.approx(250, rel=0.1)
    assert [count for _, count in marks] == sorted(count for _, count in marks)


# ---------------------------------------------------------------- traces


def event(name: str, at_us: float, us: float, **rest):
    return {"cat": "kernel", "name": name, "ts": at_us, "dur": us, "args": {"grid": [4, 2, 1]}, **rest}


def test_of_a_trace_all_repetitions_but_the_first_are_told_with_their_blocks():
    events = [{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9e9}, {"ph": "M", "name": "process_name"}]
    for repetition in range(3):
        at = 5e12 + repetition * 25_000
        events += [event("gemm", at, 10.0), event("flash", at + 12, 8.0)]
    events.append(event("Memcpy DtoD", 5e12 + 50_030, 1.0, cat="gpu_memcpy", args={"bytes": 4}))
    told = inside._told(events)
    assert told["names"] == ["Memcpy DtoD", "flash", "gemm"]
    assert [(kernel[0], kernel[3]) for kernel in told["kernels"]] == [(2, 8), (1, 8), (2, 8), (1, 8), (0, 0)]
    assert [kernel[1:3] for kernel in told["kernels"]] == [
        pytest.approx(one) for one in ([0.0, 10e-6], [12e-6, 8e-6], [0.025, 10e-6], [0.025012, 8e-6], [0.02503, 1e-6])
    ]


def test_a_trace_in_which_repetitions_cannot_be_told_apart_is_refused():
    assert "2 device events in 1 repetitions" in inside._told([event("gemm", 0, 5), event("gemm", 6, 5)])["refused"]
    assert inside._told([])["refused"]


def test_what_goes_wrong_in_a_trace_is_the_answer_and_nothing_without_a_step(monkeypatch):
    worker = FixedSteps()
    gpu = Gpu()
    gpu.install(monkeypatch)

    def no_tracing(**rest):
        raise RuntimeError("CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED")

    monkeypatch.setitem(
        sys.modules,
        "torch.profiler",
        SimpleNamespace(profile=no_tracing, ProfilerActivity=SimpleNamespace(CUDA="cuda")),
    )
    assert worker.advisor_trace(3) == {"refused": "no step is prepared"}
    worker._advisor_step = gpu.work
    assert "MULTIPLE_SUBSCRIBERS" in worker.advisor_trace(3)["refused"]
