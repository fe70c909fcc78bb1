"""What runs inside vLLM's engine core: one fixed step, again and again, with no scheduler, front end or request.

`--worker-extension-cls` names `FixedSteps` from a copy of this file in a folder of its own (see `start`): the engine
may live in another environment, so nothing of this package is imported. Its methods are called through vLLM's
`collective_rpc`; each takes and returns plain JSON values. Written against vLLM 0.26, model runner V2.

A step's inputs are prepared once, the way vLLM prepares them. What is repeated is the model, the output head for the
last token of each sequence, and the choice of the likeliest token: for decode vLLM's own captured graph, for prompts a
graph captured here, so that the GPU never waits for Python. Where such a graph cannot be captured the step is launched
kernel by kernel, and says so (`graphed`).
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

# Steps are queued in batches of about this long, one batch ahead of the GPU.
_BATCH_S = 0.05
_PREFIX = "mps-advisor-"
# Shorter than this five steps say nothing of whether the GPU waited.
_WORTH_TIMING_S = 1e-3
# Between two traced repetitions, to tell them apart.
_REST_S = 0.02
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_NAME_LENGTH = 160


class FixedSteps:
    """Mixed into vLLM's worker, whose `model_runner` it uses. Attribute names must not collide with the worker's."""

    model_runner: Any
    _advisor_step: Callable[[], None] | None = None
    _advisor_step_s = 0.0
    _advisor_requests: tuple[str, ...] = ()
    _advisor_filled = False

    def advisor_prepare(
        self,
        decode: int = 0,
        decode_context: int = 0,
        prefill: int = 0,
        prefill_tokens: int = 0,
        prefill_context: int = 0,
    ) -> dict[str, Any]:
        """Get a step ready: `decode` sequences that attend to `decode_context` tokens, their new one included, and
        `prefill` sequences that read `prefill_tokens` after `prefill_context` earlier ones.

        Returns what will be repeated and how long it takes alone (`step_s`), or why it cannot be (`refused`).
        """
        try:
            self.advisor_forget()
            return self._advisor_prepared(
                [(decode_context, 1)] * decode + [(prefill_context + prefill_tokens, prefill_tokens)] * prefill
            )
        except Exception as error:  # whatever it is, the engine goes on and the answer says so
            refused = {"refused": _placed(error)}
            self.advisor_forget()
            return refused

    def advisor_run(self, start_s: float, seconds: float) -> dict[str, Any]:
        """Repeat the prepared step from `start_s` (CLOCK_MONOTONIC, which all processes of a machine share) on.

        Returns `marks`: pairs of a time and the number of steps that the GPU had finished by then, ascending.
        """
        import torch

        step = self._advisor_step
        if step is None:
            return {"refused": "no step is prepared"}
        each = max(1, round(_BATCH_S / max(self._advisor_step_s, 1e-6)))
        with torch.inference_mode():
            while time.monotonic() < start_s:
                time.sleep(min(0.001, max(0.0, start_s - time.monotonic())))
            marks, done, queued = [[time.monotonic(), 0]], 0, []
            while marks[-1][0] < start_s + seconds:
                for _ in range(each):
                    step()
                event = torch.cuda.Event()
                event.record()
                queued.append(event)
                if len(queued) > 1:
                    queued.pop(0).synchronize()
                    done += each
                    marks.append([time.monotonic(), done])
            torch.cuda.synchronize()
        return {"marks": marks}

    def advisor_trace(self, repeats: int) -> dict[str, Any]:
        """The kernels of the prepared step, repeated one by one with a rest before each; the first one is not told.

        Returns `names` and `kernels`: index of the name, start and length in seconds, blocks (0 for copies and fills).
        """
        import torch
        from torch.profiler import ProfilerActivity, profile

        step = self._advisor_step
        if step is None:
            return {"refused": "no step is prepared"}
        try:
            with torch.inference_mode(), profile(activities=[ProfilerActivity.CUDA]) as traced:
                for _ in range(repeats + 1):
                    step()
                    torch.cuda.synchronize()
                    time.sleep(_REST_S)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                traced.export_chrome_trace(str(path))
                events = json.loads(path.read_text())["traceEvents"]
        except Exception as error:  # no trace is no reason to lose the engine
            return {"refused": _placed(error)}
        return _told(events)

    def advisor_forget(self) -> dict[str, Any]:
        """Give up the prepared step and its KV blocks."""
        self._advisor_step = None
        if self._advisor_requests:
            from vllm.v1.core.sched.output import SchedulerOutput

            output = SchedulerOutput.make_empty()
            output.finished_req_ids = set(self._advisor_requests)
            self._advisor_requests = ()
            self._advisor_execute(output)
        return {}

    # -- preparation

    def _advisor_prepared(self, lengths: list[tuple[int, int]]) -> dict[str, Any]:
        """`lengths`: of each sequence the tokens in all, and those of them that are new in this step."""
        import torch

        runner = self.model_runner
        if not hasattr(runner, "cudagraph_manager") or not hasattr(runner, "kv_connector"):
            return {"refused": "vLLM runs this model on another model runner than V2"}
        if why := self._advisor_objection(lengths):
            return {"refused": why}
        with torch.inference_mode():
            if not self._advisor_filled:
                # Zeros would be multiplied faster than what a real cache holds.
                generator = torch.Generator(runner.kv_caches[0].device)
                for cache in runner.kv_caches:
                    if cache.dtype in (torch.bfloat16, torch.float16):
                        cache.normal_(generator=generator)
                self._advisor_filled = True
            output = self._advisor_scheduled(lengths)
            self._advisor_execute(output)
            state, runner.execute_model_state = runner.execute_model_state, None
            step, mode, why = self._advisor_closure(output, state)
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            begin = time.monotonic()
            for _ in range(5):
                step()
            queued_s = time.monotonic() - begin
            torch.cuda.synchronize()
            taken_s = time.monotonic() - begin
            if not why and taken_s > _WORTH_TIMING_S and queued_s > 0.8 * taken_s:
                why = "asking for a step takes about as long as the step"
            self._advisor_step, self._advisor_step_s = step, taken_s / 5
        return {
            "tokens": sum(new for _, new in lengths),
            "sequences": len(lengths),
            "mode": mode,
            "graphed": not why,
            "why": why,
            "step_s": self._advisor_step_s,
        }

    def _advisor_execute(self, output: Any) -> None:  # noqa: ANN401 (vLLM's SchedulerOutput)
        """What vLLM's own warm-up does: the model runner's step, with no connector in the way."""
        runner = self.model_runner
        runner.kv_connector.set_disabled(True)
        try:
            runner.execute_model(output)
        finally:
            runner.kv_connector.set_disabled(False)

    def _advisor_objection(self, lengths: list[tuple[int, int]]) -> str:
        """Why vLLM could not hold these sequences in one step; empty when it can."""
        runner = self.model_runner
        scheduled, budget = sum(new for _, new in lengths), runner.scheduler_config.max_num_batched_tokens
        if not lengths:
            return "a step needs at least one sequence"
        if len(lengths) > runner.max_num_reqs:
            return f"{len(lengths)} sequences are more than max_num_seqs {runner.max_num_reqs}"
        if not all(1 <= new <= length <= runner.max_model_len for length, new in lengths):
            return f"every sequence needs 1 to {runner.max_model_len} tokens"
        if scheduled > budget:
            return f"{scheduled} tokens are more than the budget {budget}"
        needed = sum(-(-length // size) for length, _ in lengths for size in self._advisor_block_sizes())
        if needed >= runner.kv_cache_config.num_blocks:
            return f"{needed} KV blocks are needed, the cache holds {runner.kv_cache_config.num_blocks - 1}"
        return ""

    def _advisor_block_sizes(self) -> list[int]:
        return [group.kv_cache_spec.block_size for group in self.model_runner.kv_cache_config.kv_cache_groups]

    def _advisor_scheduled(self, lengths: list[tuple[int, int]]) -> Any:  # noqa: ANN401 (vLLM's SchedulerOutput)
        """vLLM's order for one step of fresh sequences, whose earlier tokens count as computed."""
        import random

        from vllm import SamplingParams
        from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

        words, next_block = random.Random(0), 1  # block 0 is vLLM's own
        vocabulary, groups = self.model_runner.model_config.get_vocab_size(), self._advisor_block_sizes()
        sampling = SamplingParams(max_tokens=2, temperature=0.0)
        output = SchedulerOutput.make_empty()
        for number, (length, new) in enumerate(lengths):
            blocks = []
            for size in groups:
                count = -(-length // size)
                blocks.append(list(range(next_block, next_block + count)))
                next_block += count
            tokens = [words.randrange(vocabulary) for _ in range(length)]
            request = NewRequestData(
                req_id=f"{_PREFIX}{number}",
                prompt_token_ids=tokens,
                mm_features=[],
                sampling_params=sampling,
                pooling_params=None,
                block_ids=tuple(blocks),
                num_computed_tokens=length - new,
                lora_request=None,
                prefill_token_ids=tokens,
            )
            output.scheduled_new_reqs.append(request)
            output.num_scheduled_tokens[request.req_id] = new
        output.total_num_scheduled_tokens = sum(new for _, new in lengths)
        output.num_common_prefix_blocks = [0] * len(groups)
        self._advisor_requests = tuple(output.num_scheduled_tokens)
        return output

    def _advisor_closure(self, output: Any, state: Any) -> tuple[Callable[[], None], str, str]:  # noqa: ANN401
        """The step as something to call, vLLM's mode for it, and why it is not all graphs (empty if it is)."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import BatchDescriptor, set_forward_context
        from vllm.v1.worker.gpu.cudagraph_utils import get_uniform_token_count

        runner, batch = self.model_runner, state.input_batch
        counts = output.num_scheduled_tokens.values()
        uniform = get_uniform_token_count(len(counts), sum(counts), max(counts))
        found = runner.cudagraph_manager.dispatch(len(counts), sum(counts), uniform, num_active_loras=0)
        rows = batch.logits_indices

        def head(hidden: Any) -> None:  # noqa: ANN401 (a tensor)
            runner.model.compute_logits(hidden[rows]).argmax(dim=-1)

        if found.cg_mode == CUDAGraphMode.FULL:
            hidden = runner.cudagraph_manager.run_fullgraph(found)
            last, why = _captured(lambda: head(hidden))

            def decode_step(kept: Any = state) -> None:  # noqa: ANN401 (its tensors are read by the graphs)
                runner.cudagraph_manager.run_fullgraph(found)
                last()

            return decode_step, found.cg_mode.name, why

        inputs = {
            "input_ids": batch.input_ids,
            "positions": batch.positions,
            "inputs_embeds": None,
            "intermediate_tensors": None,
            **runner.model_state.prepare_inputs(batch, runner.req_states),
        }

        def prompt_step() -> None:
            with set_forward_context(
                state.attn_metadata,
                runner.vllm_config,
                num_tokens=batch.num_tokens_after_padding,
                cudagraph_runtime_mode=CUDAGraphMode.NONE,
                batch_descriptor=BatchDescriptor(num_tokens=batch.num_tokens_after_padding),
                slot_mapping=state.slot_mappings_by_layer,
                is_padding=batch.is_padding,
            ):
                head(runner.model(**inputs))

        step, why = _captured(prompt_step)
        return step, found.cg_mode.name, why


def _placed(error: Exception) -> str:
    """What went wrong and where; the whole of it goes to the engine's log."""
    traceback.print_exception(error)
    frames = reversed(traceback.extract_tb(error.__traceback__)[-3:])
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    return f"{type(error).__name__}: {error}"[:250] + f" ({' < '.join(places)})"


def _told(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a trace: of its device events all after the first repetition."""
    found = sorted((one for one in events if one.get("cat") in _ON_DEVICE and "dur" in one), key=lambda one: one["ts"])
    rests = [
        index
        for index, (before, after) in enumerate(pairwise(found), 1)
        if after["ts"] - before["ts"] - before["dur"] > _REST_S * 1e6 / 2
    ]
    kept = found[rests[0] :] if rests else []
    if not kept:
        return {"refused": f"the trace holds {len(found)} device events in {len(rests) + 1} repetitions"}
    names = sorted({str(one["name"])[:_NAME_LENGTH] for one in kept})
    index, begin = {name: number for number, name in enumerate(names)}, kept[0]["ts"]
    kernels = [
        [
            index[str(one["name"])[:_NAME_LENGTH]],
            round((one["ts"] - begin) * 1e-6, 9),
            round(one["dur"] * 1e-6, 9),
            prod(one.get("args", {}).get("grid", [0])),
        ]
        for one in kept
    ]
    return {"names": names, "kernels": kernels}


class _Graph:
    """A captured graph. It keeps the work alive whose tensors the graph reads: a graph itself keeps none."""

    def __init__(self, graph: Any, work: Callable[[], None]) -> None:  # noqa: ANN401 (torch.cuda.CUDAGraph)
        self._graph, self._work = graph, work

    def __call__(self) -> None:
        self._graph.replay()


def _captured(work: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """`work` as a replay of a graph of its own; or itself, and why it could not be captured."""
    import torch

    for _ in range(2):  # what is compiled or looked up once must not fall into the capture
        work()
    torch.cuda.synchronize()
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except Exception as error:  # whatever a kernel's library raises: the step can still be launched
        torch.cuda.set_stream(stream)  # a capture that breaks leaves its own one behind
        torch.cuda.synchronize()
        return work, _placed(error)
    return _Graph(graph, work), ""
