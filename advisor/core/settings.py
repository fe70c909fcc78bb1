"""What `vllm serve` resolves by itself, as explicit settings, and the command-line flags that state them."""

from __future__ import annotations

import json
from typing import Any

from msgspec import Struct, convert, structs

from advisor.core.errors import Unfit
from advisor.core.memory import BLOCK_TOKENS, kv_bytes_per_token
from advisor.core.model import check_context, served_context
from advisor.core.records import EngineSettings, GpuFacts, ModelFacts, Workload, WorkloadKind

# Engines that share a card state their KV bytes, yet vLLM still refuses to start when less than this share is free.
GPU_MEMORY_UTILIZATION = 0.05

_DECODE_CONNECTOR = json.dumps({"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}, separators=(",", ":"))


class VllmDefaults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The values of `profiles/vllm.yaml`, which names the source of each."""

    version: str
    large_gpu_memory_bytes: int
    large_gpu_excluded_name: str
    large_gpu_max_num_batched_tokens: int
    large_gpu_max_num_seqs: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_cudagraph_capture_size: int
    cudagraph_sizes_per_seq: int
    enable_prefix_caching: bool
    async_scheduling: bool


def read_defaults(document: dict[str, Any]) -> VllmDefaults:
    """The parsed `profiles/vllm.yaml` without its sources. Raises msgspec.ValidationError when it is damaged."""
    values = {name: fact["value"] for name, fact in document["defaults"].items()}
    return convert({"version": document["version"], **values}, VllmDefaults)


class Batch(Struct, frozen=True):
    """The most tokens and the most sequences in one step of an engine."""

    max_num_batched_tokens: int
    max_num_seqs: int


def default_batch(gpu: GpuFacts, defaults: VllmDefaults) -> Batch:
    """What `vllm serve` starts from on this GPU, before a very short context lowers it."""
    large = (
        gpu.memory_total_bytes >= defaults.large_gpu_memory_bytes
        and defaults.large_gpu_excluded_name not in gpu.name.lower()
    )
    if large:
        return Batch(defaults.large_gpu_max_num_batched_tokens, defaults.large_gpu_max_num_seqs)
    return Batch(defaults.max_num_batched_tokens, defaults.max_num_seqs)


def default_settings(
    model: ModelFacts, gpu: GpuFacts, vllm_defaults: VllmDefaults, workload: Workload, kv_bytes: int
) -> EngineSettings:
    """What `vllm serve` resolves for this model on this GPU, with `kv_bytes` of KV cache per engine.

    The context is the one that vLLM chooses, shortened to what the KV cache holds and lengthened, within the
    model's maximum, to the workload's requests. "decode" needs prefix caching off: its prompts are filled, not
    computed. `workload` has the lengths that requests really have (`workload.as_served`); `kv_bytes` comes from
    `memory.plan` with `default_batch`.
    Raises BadQuestion when the requests are longer than the model takes, Unfit when this GPU lacks the dtype,
    ValueError when the KV cache does not hold one request.
    """
    check_context(model, workload.isl, workload.osl)
    check_dtype(model, gpu)
    request = workload.isl + workload.osl
    held = _tokens_held(model, kv_bytes)
    if held < request:
        raise ValueError(f"{kv_bytes} bytes of KV cache hold {held} tokens, less than one request of {request}")
    max_model_len = max(request, min(served_context(model), held))
    batch = default_batch(gpu, vllm_defaults)
    budget = min(batch.max_num_batched_tokens, batch.max_num_seqs * max_model_len)
    max_num_seqs = min(batch.max_num_seqs, budget)
    largest = min(
        vllm_defaults.cudagraph_sizes_per_seq * max_num_seqs, vllm_defaults.max_cudagraph_capture_size, budget
    )
    return EngineSettings(
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        max_cudagraph_capture_size=captured_batch_sizes(largest, budget)[-1],
        enable_prefix_caching=vllm_defaults.enable_prefix_caching and workload.kind != "decode",
        async_scheduling=vllm_defaults.async_scheduling,
        kv_cache_memory_bytes=kv_bytes,
        max_model_len=max_model_len,
        gpu_memory_utilization=GPU_MEMORY_UTILIZATION,
        dtype=model.dtype,
        quantization=model.quantization,
        kv_cache_dtype=model.kv_cache_dtype,
        load_format="dummy" if model.weights == "dummy" else "auto",
    )


def check_dtype(model: ModelFacts, gpu: GpuFacts) -> None:
    """Raises Unfit when the GPU cannot compute in the model's dtype (vLLM 0.26: bfloat16 from capability 8.0 on)."""
    if model.dtype == "bfloat16" and int(gpu.compute_capability.split(".")[0]) < 8:
        raise Unfit(
            f"{gpu.name} (compute capability {gpu.compute_capability}) has no bfloat16, which {model.name} would be "
            "served in; use --dtype float16"
        )


def with_kv_bytes(settings: EngineSettings, model: ModelFacts, kv_bytes: int) -> EngineSettings:
    """The same settings with another KV cache; the context is shortened where the new one holds less."""
    return structs.replace(
        settings,
        kv_cache_memory_bytes=kv_bytes,
        max_model_len=min(settings.max_model_len, _tokens_held(model, kv_bytes)),
    )


def captured_batch_sizes(max_capture: int, max_num_batched_tokens: int | None = None) -> list[int]:
    """The batch sizes for which vLLM 0.26 captures CUDA graphs (`config/vllm.py`, `_set_cudagraph_sizes`), ascending.

    1, 2, 4, multiples of 8 below 256, multiples of 16 from there; and the token budget itself where it is not
    beyond `max_capture`.
    """
    if max_capture < 1:
        raise ValueError(f"the largest captured batch must be at least 1, not {max_capture}")
    largest = max_capture if max_num_batched_tokens is None else min(max_capture, max_num_batched_tokens)
    sizes = {size for size in (1, 2, 4, *range(8, 256, 8)) if size <= largest}
    sizes.update(range(256, largest + 1, 16))
    if max_num_batched_tokens is not None and max_num_batched_tokens <= max_capture:
        sizes.add(max_num_batched_tokens)
    return sorted(sizes)


def serve_arguments(settings: EngineSettings, kind: WorkloadKind = "serve") -> list[str]:
    """The flags of `vllm serve` that state all of `settings`, to follow the model's folder on the command line.

    `--generation-config vllm` keeps the model's own file from changing the sampling. "decode" fills the KV cache
    of all but the last prompt token instead of computing it.
    """
    arguments = [
        "--max-num-batched-tokens",
        str(settings.max_num_batched_tokens),
        "--max-num-seqs",
        str(settings.max_num_seqs),
        "--max-cudagraph-capture-size",
        str(settings.max_cudagraph_capture_size),
        "--enable-prefix-caching" if settings.enable_prefix_caching else "--no-enable-prefix-caching",
        "--async-scheduling" if settings.async_scheduling else "--no-async-scheduling",
        "--kv-cache-memory-bytes",
        str(settings.kv_cache_memory_bytes),
        "--max-model-len",
        str(settings.max_model_len),
        "--gpu-memory-utilization",
        str(settings.gpu_memory_utilization),
        "--dtype",
        settings.dtype,
        "--kv-cache-dtype",
        settings.kv_cache_dtype,
        "--load-format",
        settings.load_format,
    ]
    # vLLM 0.26's Rust front end has one server with many threads, and refuses to start with any of these.
    if not settings.rust_front_end:
        arguments += ["--generation-config", "vllm"]
        arguments += ["--api-server-count", str(settings.api_server_count)]
        arguments += ["--stream-interval", str(settings.stream_interval)]
    if settings.quantization is not None:
        arguments += ["--quantization", settings.quantization]
    if kind == "decode":
        arguments += ["--kv-transfer-config", _DECODE_CONNECTOR]
    return arguments


def serve_environment(settings: EngineSettings) -> dict[str, str]:
    """What of `settings` vLLM 0.26 takes from its environment (`vllm/envs.py`)."""
    return {"VLLM_USE_RUST_FRONTEND": str(int(settings.rust_front_end))}


def _tokens_held(model: ModelFacts, kv_bytes: int) -> int:
    """Tokens in the whole blocks of a KV cache, less the one block that vLLM keeps for itself; never negative."""
    blocks = kv_bytes // (kv_bytes_per_token(model) * BLOCK_TOKENS)
    return max(0, blocks - 1) * BLOCK_TOKENS
