"""What a step of a dense decoder costs at least: operations, bytes, and the time that a GPU's ceilings allow. Pure.

Operations count a multiplication and an addition as two. Bytes are those of device memory, every operand read once
and every result written once; what stays in caches or registers between kernels is not counted. With T tokens in a
step, E bytes an element, L layers, hidden size h, MLP size f, H query and K KV heads of size d, vocabulary V:

    product of k inputs to n outputs   2·T·k·n operations, E·(k·n + T·k + T·n) bytes, each layer
      projections                      QKV: h to (H+2K)·d; output: H·d to h
      mlp                              gate and up as one: h to 2·f; down: f to h
    attention of a sequence            4·H·d·P operations, where P pairs of tokens see each other;
                                       E·2·H·d for each of its tokens, and 2·K·d·(KV bytes) for each token it reads
      decode at context c              P = min(c, w), reads min(c, w); w is the layer's sliding window
      n new tokens after p             P = sum of min(p+i, w) for i = 1..n, reads min(p, w-1) + n
    lm_head                            h to V, for the last token of each sequence only

Sources: Williams, Waterman, Patterson 2009, "Roofline", for the bound; the products are those that vLLM 0.26 runs
(`model_executor/models/qwen2.py`, `llama.py`). Norms, activation, rotary embedding, sampling and KV writes are left
out: the bound is one.
"""

from __future__ import annotations

from typing import Literal

from advisor.core.errors import Unfit
from advisor.core.records import Ceilings, ModelFacts, Record, Step, Workload
from advisor.core.workload import output_tokens, prompt_tokens

Part = Literal["attention", "mlp", "projections", "lm_head"]
PARTS: tuple[Part, ...] = ("attention", "mlp", "projections", "lm_head")
ELEMENT_BYTES = 2


class Work(Record, frozen=True):
    """What one kind of kernel does in a step, over all layers."""

    part: Part
    name: str
    flops: float
    bytes: float

    def bound_s(self, ceilings: Ceilings) -> float:
        """No GPU with these ceilings does it in less: the slower of computing and moving."""
        return max(self.flops / ceilings.bf16_flops_per_s, self.bytes / ceilings.copy_bytes_per_s)


def work(model: ModelFacts, step: Step) -> list[Work]:
    """The kernels of a step. Raises Unfit for what is not modelled: quantized products."""
    if model.quantization is not None:
        raise Unfit(f"the roofline of {model.quantization} products is not modelled; only 16-bit weights are")
    hidden, inner, layers = model.hidden_size, model.intermediate_size, model.layers
    query = model.heads * model.head_dim
    tokens, sampled = step.tokens, step.decode + step.prefill
    return [
        _attention(model, step),
        _product("projections", "qkv", layers, tokens, hidden, query + 2 * model.kv_heads * model.head_dim),
        _product("projections", "o", layers, tokens, query, hidden),
        _product("mlp", "gate_up", layers, tokens, hidden, 2 * inner),
        _product("mlp", "down", layers, tokens, inner, hidden),
        _product("lm_head", "lm_head", 1, sampled, hidden, model.vocab_size),
    ]


def bound_s(model: ModelFacts, step: Step, ceilings: Ceilings) -> float:
    """The least seconds of a step: kernels run one after another. Raises Unfit as `work` does."""
    return sum(one.bound_s(ceilings) for one in work(model, step))


def throughput_bound(model: ModelFacts, workload: Workload, ceilings: Ceilings) -> float:
    """Output tokens per second that no number of engines on one GPU exceeds. Raises Unfit as `work` does.

    Over a long time a request costs its prompt's and its answer's operations and bytes, with the weights read once a
    step for all requests in flight. The step that ends a prompt gives its first token. Computing and moving may overlap
    completely, as kernels of several engines can: the slower of the two sums is the bound. Prompts of steady decode are
    not read.
    """
    isl, osl, batch = round(prompt_tokens(workload)), output_tokens(workload), workload.concurrency
    done: list[tuple[int, Work]] = []
    steps = osl
    if workload.kind != "decode":
        done += [(1, one) for one in work(model, Step(prefill=batch, prefill_tokens=isl))]
        steps = osl - 1
    if steps:
        done += [(steps, one) for one in work(model, Step(decode=batch, decode_context=1)) if one.part != "attention"]
        # Token by token the answer sees and reads what it would as a prompt that follows the first one.
        seen = batch * sum(_pairs(isl, steps, window) for window in windows(model))
        done.append((1, _attention_work(model, seen, seen, batch * steps)))
    flops = sum(times * one.flops for times, one in done)
    moved = sum(times * one.bytes for times, one in done)
    return batch * osl / max(flops / ceilings.bf16_flops_per_s, moved / ceilings.copy_bytes_per_s)


def windows(model: ModelFacts) -> list[int | None]:
    """The sliding window of each layer in tokens, None where a layer attends to everything.

    As the transformers library reads config.json: `layer_types` where it is given; else every layer but each
    `sliding_window_pattern`-th (Gemma 3: 6; Gemma 2: every other), or those from `max_window_layers` on (Qwen2 and
    Qwen3, if `use_sliding_window`), or all (Mistral, Phi-3).
    """
    config, layers = model.config, model.layers
    window = config.get("sliding_window")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        return [None] * layers
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return [window if kind == "sliding_attention" else None for kind in types]
    match model.architecture:
        case "Gemma3ForCausalLM" | "Gemma2ForCausalLM":
            pattern = config.get("sliding_window_pattern") or (6 if model.architecture.startswith("Gemma3") else 2)
            return [None if (layer + 1) % pattern == 0 else window for layer in range(layers)]
        case "MistralForCausalLM" | "Phi3ForCausalLM":
            return [window] * layers
        case _ if config.get("use_sliding_window"):
            first = config.get("max_window_layers", layers)
            return [window if layer >= first else None for layer in range(layers)]
    return [None] * layers


def _product(part: Part, name: str, layers: int, tokens: int, inputs: int, outputs: int) -> Work:
    flops = 2.0 * layers * tokens * inputs * outputs
    moved = inputs * outputs + tokens * (inputs + outputs) if tokens else 0
    return Work(part=part, name=name, flops=flops, bytes=float(ELEMENT_BYTES * layers * moved))


def _attention(model: ModelFacts, step: Step) -> Work:
    pairs = read = 0
    for window in windows(model):
        if step.decode:
            seen = step.decode_context if window is None else min(step.decode_context, window)
            pairs += step.decode * seen
            read += step.decode * seen
        if step.prefill:
            pairs += step.prefill * _pairs(step.prefill_context, step.prefill_tokens, window)
            before = step.prefill_context if window is None else min(step.prefill_context, window - 1)
            read += step.prefill * (before + step.prefill_tokens)
    return _attention_work(model, pairs, read, step.tokens)


def _attention_work(model: ModelFacts, pairs: int, read: int, tokens: int) -> Work:
    """`pairs` of tokens and tokens that are `read`, summed over the layers, for `tokens` queries in each layer."""
    kv_bytes = 2 * model.kv_heads * model.head_dim * (1 if model.kv_cache_dtype.startswith("fp8") else ELEMENT_BYTES)
    in_and_out = 2 * ELEMENT_BYTES * model.heads * model.head_dim
    return Work(
        part="attention",
        name="attention",
        flops=4.0 * model.heads * model.head_dim * pairs,
        bytes=float(kv_bytes * read + in_and_out * model.layers * tokens),
    )


def _pairs(before: int, new: int, window: int | None) -> int:
    """How many earlier tokens, itself included, `new` tokens after `before` others see in all."""
    if window is None:
        return new * before + new * (new + 1) // 2
    growing = min(new, max(0, window - before))  # tokens that still see everything
    return growing * before + growing * (growing + 1) // 2 + (new - growing) * window
