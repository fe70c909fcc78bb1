"""Stand-in weights: the tensors of a model's checkpoint, by name and shape. Pure.

vLLM can make dummy weights itself (`--load-format dummy`), but it draws them on the GPU, and what it draws there
depends on the number of SMs that the process sees: on an H200, an engine under a 50 % thread percentage held other
weights than one without. Two such engines cannot be compared. So the stand-ins are written to a file that every
engine reads. Their scale is that of a freshly initialised model, which also gives log-probabilities a real spread.
"""

from __future__ import annotations

from collections.abc import Iterator

from advisor.core.records import ModelFacts, Record

STANDARD_DEVIATION = 0.02  # `initializer_range` of the models in profiles/

# Checkpoints with these tensor names; the others have parts of their own (fused products, more norms).
_PLAIN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Tensor(Record, frozen=True):
    """One tensor of a checkpoint. `ones` for the scales of norms, else drawn at random."""

    name: str
    shape: tuple[int, ...]
    ones: bool = False


def tensors(model: ModelFacts) -> list[Tensor] | None:
    """Every tensor of the model's checkpoint, in order; None for an architecture whose names are not known here."""
    if model.architecture not in _PLAIN or model.config.get("mlp_bias"):
        return None
    return list(_tensors(model))


def _tensors(model: ModelFacts) -> Iterator[Tensor]:
    hidden, inner = model.hidden_size, model.intermediate_size
    query, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    yield Tensor(name="model.embed_tokens.weight", shape=(model.vocab_size, hidden))
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", query), ("k", kv), ("v", kv)):
            yield Tensor(name=f"{prefix}.self_attn.{name}_proj.weight", shape=(rows, hidden))
            if model.qkv_bias:
                yield Tensor(name=f"{prefix}.self_attn.{name}_proj.bias", shape=(rows,))
        yield Tensor(name=f"{prefix}.self_attn.o_proj.weight", shape=(hidden, query))
        if model.qkv_bias and model.architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
            # `attention_bias` of these gives the output projection one too; Qwen2 has none there.
            yield Tensor(name=f"{prefix}.self_attn.o_proj.bias", shape=(hidden,))
        if model.architecture == "Qwen3ForCausalLM":
            for name in ("q_norm", "k_norm"):
                yield Tensor(name=f"{prefix}.self_attn.{name}.weight", shape=(model.head_dim,), ones=True)
        yield Tensor(name=f"{prefix}.mlp.gate_proj.weight", shape=(inner, hidden))
        yield Tensor(name=f"{prefix}.mlp.up_proj.weight", shape=(inner, hidden))
        yield Tensor(name=f"{prefix}.mlp.down_proj.weight", shape=(hidden, inner))
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield Tensor(name=f"{prefix}.{name}.weight", shape=(hidden,), ones=True)
    yield Tensor(name="model.norm.weight", shape=(hidden,), ones=True)
    if not model.tied_embeddings:
        yield Tensor(name="lm_head.weight", shape=(model.vocab_size, hidden))
