"""What a Hugging Face `config.json` says about a dense decoder-only model: its shape, dtype, context and size."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from msgspec import Struct

from advisor.core.errors import BadQuestion, Unfit
from advisor.core.records import ModelFacts

_LARGEST_SIZE = 2**24  # a hidden size, head count or vocabulary beyond this is a typing error, not a model
_LONGEST_CONTEXT = 2**31

_BFLOAT16_ONLY = ("gemma2", "gemma3", "gemma3_text")  # vLLM 0.26, config/model.py, _FLOAT16_NOT_SUPPORTED_MODELS
_DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "half": "float16"}
_KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")


class Layout(Struct, frozen=True, kw_only=True):
    """Where architectures with the same configuration keys differ. Defaults are those of the transformers library.

    `qkv_bias` and `output_bias` None mean that the field `attention_bias` decides. `norms` counts the norm vectors
    of the hidden size in one layer; `norm_weights` is 0 where the norm has no weights. `qk_norm` says what length
    the norms of queries and keys have.
    """

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    tied: bool = False
    head_dim: int | None = None
    norms: int = 2
    norm_weights: int = 1
    qk_norm: Literal["none", "head", "all heads"] = "none"


SUPPORTED: dict[str, Layout] = {
    "Gemma2ForCausalLM": Layout(tied=True, head_dim=256, norms=4),
    "Gemma3ForCausalLM": Layout(tied=True, head_dim=256, norms=4, qk_norm="head"),
    "GemmaForCausalLM": Layout(tied=True, head_dim=256),
    "GraniteForCausalLM": Layout(),
    "LlamaForCausalLM": Layout(),
    "MistralForCausalLM": Layout(qkv_bias=False, output_bias=False),
    "Olmo2ForCausalLM": Layout(qk_norm="all heads"),
    "OlmoForCausalLM": Layout(norm_weights=0),
    "Phi3ForCausalLM": Layout(qkv_bias=False, output_bias=False),
    "Qwen2ForCausalLM": Layout(qkv_bias=True, output_bias=False),
    "Qwen3ForCausalLM": Layout(head_dim=128, qk_norm="head"),
    "SmolLM3ForCausalLM": Layout(tied=True),
}

# Fields that only models of another kind have, and what kind that is.
_FOREIGN_FIELDS = {
    "vision_config": "multimodal",
    "audio_config": "multimodal",
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "is_encoder_decoder": "encoder and decoder",
    "ssm_cfg": "state space",
    "mamba_d_state": "state space",
    "state_size": "state space",
}


class _Fields:
    """Reads typed fields from one config.json; every complaint names the file and the field."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.file = f"config.json of {name}"
        self.config = config

    def bad(self, field: str, expected: str) -> NoReturn:
        value = self.config.get(field)
        found = repr(value)[:60] if isinstance(value, bool | int | float | str) else type(value).__name__
        found = found if field in self.config else "nothing"
        raise BadQuestion(f"{self.file}: field {field} must be {expected}, found {found}; repair the file")

    def whole(self, field: str, default: int | None = None, largest: int = _LARGEST_SIZE) -> int:
        value = self.config.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            self.bad(field, f"a whole number from 1 to {largest}")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.config.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.bad(field, "true or false")
        return value

    def text(self, field: str) -> str | None:
        value = self.config.get(field)
        if value is not None and not isinstance(value, str):
            self.bad(field, "a text")
        return value

    def table(self, field: str) -> dict[str, Any] | None:
        value = self.config.get(field)
        if value is not None and not isinstance(value, dict):
            self.bad(field, "a JSON object")
        return value


def facts(
    name: str,
    config: object,
    dtype: str = "auto",
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    weights: Literal["real", "dummy"] = "dummy",
) -> ModelFacts:
    """The facts of the model `name` from its parsed `config.json` and the options given by the user.

    `quantization` None takes what the configuration states; `dtype` "auto" is resolved as vLLM 0.26 does
    (`config/model.py`, `_resolve_auto_dtype`): float32 is served as bfloat16.
    Raises BadQuestion for a malformed configuration or option, Unfit for a model of an unsupported kind.
    """
    if not isinstance(config, dict):
        raise BadQuestion(f"config.json of {name} must hold a JSON object, found {type(config).__name__}")
    fields = _Fields(name, config)
    architecture = _architecture(fields)
    layout = SUPPORTED[architecture]
    hidden_size = fields.whole("hidden_size")
    heads = fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        fields.bad("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    return ModelFacts(
        name=name,
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.whole("intermediate_size"),
        layers=fields.whole("num_hidden_layers", largest=4096),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(fields, layout, hidden_size, heads),
        vocab_size=fields.whole("vocab_size"),
        tied_embeddings=fields.flag("tie_word_embeddings", layout.tied),
        qkv_bias=fields.flag("attention_bias", False) if layout.qkv_bias is None else layout.qkv_bias,
        max_context=_max_context(fields),
        dtype=_dtype(fields, dtype),
        quantization=_quantization(fields, quantization),
        kv_cache_dtype=_kv_cache_dtype(kv_cache_dtype),
        weights=weights,
        config=config,
    )


def parameters(model: ModelFacts) -> int:
    """The number of weights, from the shape alone; a tied output head counts once. Exact for the table's models."""
    return matrix_parameters(model) + embedding_parameters(model) + _vector_parameters(model)


def matrix_parameters(model: ModelFacts) -> int:
    """Weights of all layers' matrix products (QKV, output, gate, up, down): what a quantization shrinks."""
    hidden, query, kv = model.hidden_size, model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = hidden * (query + 2 * kv) + query * hidden
    return model.layers * (attention + 3 * hidden * model.intermediate_size)


def embedding_parameters(model: ModelFacts) -> int:
    """Weights of the embedding and, when it is a matrix of its own, of the output head."""
    return model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)


def check_context(model: ModelFacts, isl: int, osl: int) -> None:
    """Raises BadQuestion when a request of `isl` prompt and `osl` output tokens is longer than the model takes."""
    if isl + osl > model.max_context:
        raise BadQuestion(
            f"a request of {isl} + {osl} = {isl + osl} tokens is longer than the {model.max_context} tokens that "
            f"{model.name} takes; lower --ctx or --osl"
        )


def served_context(model: ModelFacts) -> int:
    """The context that `vllm serve` chooses for this model by itself, in tokens.

    The model's maximum, except that a LongRoPE model is served at its original length
    (vLLM 0.26, `config/model.py`, `_get_and_verify_max_len`).
    """
    rope = _rope(model.config)
    original = model.config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    if _rope_type(rope) == "longrope" and isinstance(original, int) and original >= 1:
        return min(original, model.max_context)
    return model.max_context


def _architecture(fields: _Fields) -> str:
    names = fields.config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        fields.bad("architectures", "a list with the name of the model's class")
    architecture = str(names[0])
    kinds = [kind for field, kind in _FOREIGN_FIELDS.items() if _says_yes(fields.config.get(field))]
    if architecture not in SUPPORTED or kinds:
        kind = f" ({kinds[0]})" if kinds else ""
        raise Unfit(
            f"{fields.file}: architecture {architecture[:80]}{kind} is not supported; supported dense decoders: "
            f"{', '.join(SUPPORTED)}"
        )
    return architecture


def _says_yes(value: object) -> bool:
    """Whether a field that marks another kind of model is set; a single expert is still a dense model."""
    return value is True or value not in (None, False, 0, 1)


def _head_dim(fields: _Fields, layout: Layout, hidden_size: int, heads: int) -> int:
    if fields.config.get("head_dim") is not None or layout.head_dim is not None:
        return fields.whole("head_dim", layout.head_dim, largest=4096)
    if hidden_size % heads:
        fields.bad("hidden_size", f"a multiple of num_attention_heads ({heads}), or head_dim must be given")
    return hidden_size // heads


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary scaling under its older or newer key; empty when there is none or it differs by layer type."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
            return rope
    return {}


def _rope_type(rope: dict[str, Any]) -> object:
    return rope.get("rope_type", rope.get("type", "default"))


def _max_context(fields: _Fields) -> int:
    """`max_position_embeddings`, times the rotary scaling where vLLM applies it (see `served_context`'s source)."""
    longest = fields.whole("max_position_embeddings", largest=_LONGEST_CONTEXT)
    for key in ("rope_parameters", "rope_scaling"):
        fields.table(key)
    rope = _rope(fields.config)
    kind = _rope_type(rope)
    if kind in ("default", "su", "longrope", "llama3") or fields.config.get("model_type") in _BFLOAT16_ONLY:
        return longest
    field = "rope_parameters" if rope is fields.config.get("rope_parameters") else "rope_scaling"
    factor = rope.get("factor", 1.0)
    if factor is None:
        factor = 1.0
    if kind == "yarn":
        longest = rope.get("original_max_position_embeddings", longest)
    if (
        not isinstance(kind, str)
        or not _is_number(factor, 1e6)
        or isinstance(longest, float)
        or not _is_number(longest, _LONGEST_CONTEXT)
    ):
        fields.bad(field, "a rotary scaling with a positive factor and original_max_position_embeddings")
    return max(1, int(longest * factor))


def _is_number(value: object, largest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= largest


def _dtype(fields: _Fields, asked: str) -> str:
    bfloat16_only = fields.text("model_type") in _BFLOAT16_ONLY
    if asked == "auto":
        stated = (fields.text("dtype") or fields.text("torch_dtype") or "float32").removeprefix("torch.")
        if stated not in ("float32", "float", *_DTYPES):
            fields.bad("dtype" if fields.config.get("dtype") else "torch_dtype", "bfloat16, float16 or float32")
        resolved = _DTYPES.get(stated, "bfloat16")
        return "bfloat16" if bfloat16_only else resolved
    if asked not in _DTYPES:
        raise BadQuestion(f"--dtype {asked} is not supported; choose auto, bfloat16 or float16")
    if bfloat16_only and _DTYPES[asked] == "float16":
        raise BadQuestion(f"--dtype {asked}: vLLM refuses float16 for {fields.config['model_type']}; choose bfloat16")
    return _DTYPES[asked]


def _quantization(fields: _Fields, asked: str | None) -> str | None:
    """Only fp8 can be computed from 16-bit or dummy weights at load time; the others need prepared files."""
    if asked not in (None, "fp8"):
        raise BadQuestion(f"--quantization {asked} is not supported; leave it out or choose fp8")
    table = fields.table("quantization_config")
    stated = table.get("quant_method") if table else None
    if table and not isinstance(stated, str):
        fields.bad("quantization_config", "an object with the text quant_method")
    if stated not in (None, "fp8"):
        raise Unfit(f"{fields.file}: weights quantized with {stated} are not supported; supported: 16-bit weights, fp8")
    return asked or stated


def _kv_cache_dtype(asked: str) -> str:
    if asked not in _KV_CACHE_DTYPES:
        raise BadQuestion(f"--kv-cache-dtype {asked} is not supported; choose one of {', '.join(_KV_CACHE_DTYPES)}")
    return asked


def _vector_parameters(model: ModelFacts) -> int:
    """Biases and norms."""
    layout = SUPPORTED[model.architecture]
    attention_bias = bool(model.config.get("attention_bias", False))
    query, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = layout.norms * layout.norm_weights * model.hidden_size
    if model.qkv_bias:
        layer += query + 2 * kv
    if attention_bias if layout.output_bias is None else layout.output_bias:
        layer += model.hidden_size
    if model.config.get("mlp_bias"):
        layer += 2 * model.intermediate_size + model.hidden_size
    layer += {"none": 0, "head": 2 * model.head_dim, "all heads": query + kv}[layout.qk_norm]
    return model.layers * layer + layout.norm_weights * model.hidden_size
