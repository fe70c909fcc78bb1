"""How much GPU memory an engine needs, and how much is left for its KV cache when several share the card."""

from __future__ import annotations

from msgspec import Struct

from advisor.core.model import matrix_parameters, parameters, served_context
from advisor.core.records import GpuFacts, ModelFacts, Workload

GIB = 1024**3
BLOCK_TOKENS = 16  # vLLM's KV block
USABLE_SHARE = 0.92  # the share of a card that vLLM itself is content to fill: its default gpu_memory_utilization

_FIXED_RESERVE_BYTES = 2 * GIB  # CUDA context, captured graphs, libraries' work spaces
_LOGIT_COPIES = 4  # logits, their float32 copy, probabilities, sorting space
_LOGIT_BYTES = 4
_ROUND_BYTES = 64 * 1024**2
_SMALLEST_CAP_BYTES = 4 * GIB
_CAP_TIMES = 4


class MemoryPlan(Struct, frozen=True, kw_only=True):
    """The sums behind one number of engines. `kv_bytes` is per engine, None when the engines do not fit.

    `request_tokens` is one request's length in whole blocks, `request_kv_bytes` the KV cache that it fills.
    """

    gpu: str
    engines: int
    total_bytes: int
    usable_bytes: int
    weights_bytes: int
    reserve_bytes: int
    request_tokens: int
    request_kv_bytes: int
    kv_bytes: int | None

    @property
    def least_bytes(self) -> int:
        """What one engine needs to serve a single request."""
        return self.weights_bytes + self.reserve_bytes + self.request_kv_bytes


def weights_bytes(model: ModelFacts) -> int:
    """Two bytes for a weight; one for those of the layers' matrix products when they are quantized to fp8.

    vLLM keeps the embedding, the output head and the norms in 16 bits.
    """
    if model.quantization == "fp8":
        return matrix_parameters(model) + 2 * (parameters(model) - matrix_parameters(model))
    return 2 * parameters(model)


def kv_bytes_per_token(model: ModelFacts) -> int:
    """A key and a value for each KV head of each layer; one byte per number at fp8, else two.

    An upper bound where some layers keep only a sliding window.
    """
    number_bytes = 1 if model.kv_cache_dtype.startswith("fp8") else 2
    return 2 * model.layers * model.kv_heads * model.head_dim * number_bytes


def reserve_bytes(model: ModelFacts, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """What one engine takes beyond weights and KV cache: context and graphs, logits, activations.

    An estimate from above. One Qwen2.5-0.5B engine on an H200 (8192 tokens, 1024 sequences) took 4.2 GiB beyond
    its KV cache, 0.9 of them weights.
    """
    logits = _LOGIT_COPIES * max_num_seqs * model.vocab_size * _LOGIT_BYTES
    activations = max_num_batched_tokens * (6 * model.hidden_size + 3 * model.intermediate_size) * 2
    return _FIXED_RESERVE_BYTES + logits + activations


def whole_blocks(tokens: int) -> int:
    """`tokens` rounded up to whole KV blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def kv_cap_bytes(model: ModelFacts, workload: Workload) -> int:
    """More KV cache than this is given to no engine, so that its allocation and its block table stay small.

    Four times what all requests in flight fill together, at least 4 GiB and at least one request of the context
    that `vllm serve` chooses. It does not depend on the number of engines: where memory allows, every engine of
    every candidate has the same KV cache.
    """
    per_token = kv_bytes_per_token(model)
    in_flight = workload.concurrency * whole_blocks(workload.isl + workload.osl) * per_token
    longest = (whole_blocks(served_context(model)) + BLOCK_TOKENS) * per_token
    return _round_up(max(_CAP_TIMES * in_flight, _SMALLEST_CAP_BYTES, longest))


def plan(
    gpu: GpuFacts,
    model: ModelFacts,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    workload: Workload,
    engines: int,
) -> MemoryPlan:
    """Divides the card among `engines` equal engines: KV bytes each, or None when not one request fits in each.

    `workload` has the lengths that requests really have (`workload.as_served`).
    """
    if engines < 1:
        raise ValueError(f"at least one engine, not {engines}")
    usable = int(USABLE_SHARE * gpu.memory_total_bytes)
    weights = weights_bytes(model)
    reserve = reserve_bytes(model, max_num_batched_tokens, max_num_seqs)
    block = BLOCK_TOKENS * kv_bytes_per_token(model)
    request_tokens = whole_blocks(workload.isl + workload.osl)
    request_kv = request_tokens * kv_bytes_per_token(model)
    left = (usable // engines - weights - reserve) // _ROUND_BYTES * _ROUND_BYTES
    kv = min(left, kv_cap_bytes(model, workload))
    return MemoryPlan(
        gpu=gpu.name,
        engines=engines,
        total_bytes=gpu.memory_total_bytes,
        usable_bytes=usable,
        weights_bytes=weights,
        reserve_bytes=reserve,
        request_tokens=request_tokens,
        request_kv_bytes=request_kv,
        # vLLM keeps one block for itself (the null block), so a request needs room for one more than its own.
        kv_bytes=kv if kv >= request_kv + block else None,
    )


def kv_bytes_per_engine(
    gpu: GpuFacts,
    model: ModelFacts,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    workload: Workload,
    engines: int,
) -> int | None:
    """The KV bytes of each of `engines` engines, a multiple of 64 MiB; None when they do not fit (see `plan`)."""
    return plan(
        gpu,
        model,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        workload=workload,
        engines=engines,
    ).kv_bytes


def explain(sums: MemoryPlan) -> str:
    """The sums as one line, for "does not fit" as for "fits"."""
    engines = sums.engines
    usable = f"{_gib(sums.usable_bytes)} GiB usable ({USABLE_SHARE:.0%} of {_gib(sums.total_bytes)} GiB)"
    who = "one engine" if engines == 1 else f"{engines} engines"
    parts = f"{_gib(sums.weights_bytes)} weights + {_gib(sums.reserve_bytes)} buffers"
    if sums.kv_bytes is None:
        verb, each = "does not fit" if engines == 1 else "do not fit", sums.least_bytes
        parts += f" + {_gib(sums.request_kv_bytes)} KV cache for one request of {sums.request_tokens} tokens"
    else:
        verb, each = "fits" if engines == 1 else "fit", sums.weights_bytes + sums.reserve_bytes + sums.kv_bytes
        parts += f" + {_gib(sums.kv_bytes)} KV cache"
    together = "" if engines == 1 else f" each, {_gib(engines * each)} GiB together"
    return f"{who} {verb} on {sums.gpu}: {parts} = {_gib(each)} GiB{together}, of {usable}"


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // _ROUND_BYTES) * _ROUND_BYTES


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f}"
