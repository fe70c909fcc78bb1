import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.errors import BadQuestion, Unfit
from advisor.core.model import SUPPORTED, check_context, facts, parameters, served_context
from advisor.shell.resources import load_yaml, profiles_directory

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}

# Totals of the weights that are published under these names.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    # 4,300,079,472 less the vision tower (SigLIP So400m at 896 pixels, 416,866,032) and its projector (2,950,272)
    "google/gemma-3-4b-pt": 3_880_263_168,
}


def shape(architecture, hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, **more):
    return {
        "architectures": [architecture],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        **more,
    }


def test_every_shipped_model_has_its_published_number_of_weights():
    counted = {}
    for path in (profiles_directory() / "models").glob("*.yaml"):
        document = load_yaml(f"models/{path.name}")
        counted[document["name"]] = parameters(facts(document["name"], document["config"]))
        assert document["source"]
    assert counted == PUBLISHED


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (shape("Qwen3ForCausalLM", 1024, 3072, 28, 16, 8, 128, 151936, tie_word_embeddings=True), 596_049_920),
        (shape("MistralForCausalLM", 4096, 14336, 32, 32, 8, 128, 32000), 7_241_732_096),
        (shape("Phi3ForCausalLM", 3072, 8192, 32, 32, 32, 96, 32064), 3_821_079_552),
        (shape("GemmaForCausalLM", 2048, 16384, 18, 8, 1, 256, 256000), 2_506_172_416),
        (shape("Gemma2ForCausalLM", 2304, 9216, 26, 8, 4, 256, 256000), 2_614_341_888),
        (shape("Gemma3ForCausalLM", 1152, 6912, 26, 4, 1, 256, 262144), 999_885_952),
        (shape("SmolLM3ForCausalLM", 2048, 11008, 36, 16, 4, 128, 128256), 3_075_098_624),
        (shape("Olmo2ForCausalLM", 4096, 11008, 32, 32, 32, 128, 100352), 7_298_617_344),
    ],
)
def test_other_architectures_have_their_published_number_of_weights(config, published):
    assert parameters(facts("m", config)) == published


def test_the_facts_of_qwen_are_read_from_its_configuration():
    model = facts("Qwen/Qwen2.5-0.5B", QWEN)
    assert (model.head_dim, model.kv_heads, model.qkv_bias, model.tied_embeddings) == (64, 2, True, True)
    assert (model.max_context, model.dtype, model.quantization) == (32768, "bfloat16", None)


def test_without_kv_heads_every_head_has_its_own():
    config = {key: value for key, value in QWEN.items() if key != "num_key_value_heads"}
    assert facts("m", config).kv_heads == 14


def test_an_explicit_head_dimension_wins_over_the_quotient():
    assert facts("m", {**QWEN, "head_dim": 128}).head_dim == 128


def test_biases_of_llama_follow_the_attention_bias_field():
    plain = shape("LlamaForCausalLM", 64, 128, 2, 4, 2, 16, 1000)
    biased = {**plain, "attention_bias": True}
    assert facts("m", biased).qkv_bias
    assert parameters(facts("m", biased)) - parameters(facts("m", plain)) == 2 * (64 + 2 * 32 + 64)


@pytest.mark.parametrize(
    ("stated", "asked", "resolved"),
    [
        ({"torch_dtype": "float32"}, "auto", "bfloat16"),
        ({"torch_dtype": None}, "auto", "bfloat16"),
        ({"torch_dtype": "float16"}, "auto", "float16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "auto", "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "auto", "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "half", "float16"),
        ({"torch_dtype": "float16", "model_type": "gemma2"}, "auto", "bfloat16"),
    ],
)
def test_the_dtype_is_resolved_as_vllm_does(stated, asked, resolved):
    assert facts("m", {**QWEN, **stated}, dtype=asked).dtype == resolved


def test_float16_for_a_model_that_vllm_refuses_it_for_is_a_bad_question():
    with pytest.raises(BadQuestion, match="bfloat16"):
        facts("m", {**QWEN, "model_type": "gemma2"}, dtype="float16")


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"dtype": "int8"}, {"quantization": "awq"}, {"kv_cache_dtype": "int3"}],
)
def test_an_unsupported_option_is_a_bad_question_that_names_its_choices(options):
    with pytest.raises(BadQuestion, match="choose"):
        facts("m", QWEN, **options)


def test_a_configuration_that_says_fp8_is_served_in_fp8():
    assert facts("m", {**QWEN, "quantization_config": {"quant_method": "fp8"}}).quantization == "fp8"


def test_weights_quantized_otherwise_are_unfit():
    with pytest.raises(Unfit, match="gptq"):
        facts("m", {**QWEN, "quantization_config": {"quant_method": "gptq", "bits": 4}})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**QWEN, "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 60}, "mixture of experts"),
        ({**QWEN, "architectures": ["MambaForCausalLM"], "state_size": 16}, "state space"),
        ({**QWEN, "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}, "multimodal"),
        ({**QWEN, "architectures": ["BertModel"]}, "BertModel"),
        ({**QWEN, "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder and decoder"),
        ({**QWEN, "vision_config": {"layers": 2}}, "multimodal"),
    ],
)
def test_an_unsupported_architecture_is_refused_by_name_with_what_is_supported(config, named):
    with pytest.raises(Unfit, match=named) as caught:
        facts("m", config)
    assert all(name in str(caught.value) for name in SUPPORTED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", -896),
        ("hidden_size", 896.5),
        ("hidden_size", "896"),
        ("hidden_size", True),
        ("hidden_size", 10**12),
        ("hidden_size", 897),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 5),
        ("head_dim", -1),
        ("vocab_size", []),
        ("max_position_embeddings", None),
        ("tie_word_embeddings", "yes"),
        ("torch_dtype", "int8"),
        ("torch_dtype", 16),
        ("architectures", "Qwen2ForCausalLM"),
        ("architectures", []),
        ("rope_scaling", "yarn"),
        ("rope_scaling", {"type": "linear", "factor": -2}),
        ("rope_scaling", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": "many"}),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_a_malformed_field_is_a_bad_question_that_names_file_and_field(field, value):
    with pytest.raises(BadQuestion) as caught:
        facts("some/model", {**QWEN, field: value})
    assert "config.json of some/model" in str(caught.value)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [None, [], "text", 3])
def test_a_configuration_that_is_no_object_is_a_bad_question(config):
    with pytest.raises(BadQuestion, match="JSON object"):
        facts("m", config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ROPE = st.dictionaries(
    st.sampled_from(["type", "rope_type", "factor", "original_max_position_embeddings"]),
    JSON | st.sampled_from(["yarn", "linear", "longrope", "llama3", "default"]),
)
READ = [
    *QWEN,
    "head_dim",
    "dtype",
    "attention_bias",
    "rope_scaling",
    "rope_parameters",
    "quantization_config",
    "vision_config",
    "num_experts",
    "is_encoder_decoder",
]


@given(
    damage=st.dictionaries(st.sampled_from(READ), JSON | ROPE, min_size=1, max_size=4),
    drop=st.sets(st.sampled_from(READ)),
)
def test_a_damaged_configuration_never_ends_in_another_exception(damage, drop):
    config = {key: value for key, value in {**QWEN, **damage}.items() if key not in drop}
    try:
        model = facts("m", config)
    except (BadQuestion, Unfit) as error:
        assert "\n" not in str(error)
    else:
        assert parameters(model) > 0
        assert 1 <= served_context(model) <= model.max_context


@given(JSON)
def test_any_json_value_at_all_is_answered_without_another_exception(value):
    with pytest.raises((BadQuestion, Unfit)):
        facts("m", json.loads(json.dumps(value)))


def test_a_request_longer_than_the_context_names_both_numbers():
    model = facts("m", QWEN)
    check_context(model, 32640, 128)
    with pytest.raises(BadQuestion, match=r"32769.*32768"):
        check_context(model, 32641, 128)


@pytest.mark.parametrize(
    ("rope", "longest", "served"),
    [
        (None, 32768, 32768),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 32768, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, 131072),
        ({"type": "linear", "factor": 2}, 65536, 65536),
        ({"rope_type": "longrope", "original_max_position_embeddings": 4096}, 32768, 4096),
    ],
)
def test_rotary_scaling_changes_the_context_as_in_vllm(rope, longest, served):
    model = facts("m", {**QWEN, "rope_scaling": rope})
    assert (model.max_context, served_context(model)) == (longest, served)
