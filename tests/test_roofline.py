"""What a step costs at least: checked against sums done by hand, and against what no model may do."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.errors import Unfit
from advisor.core.model import embedding_parameters, facts, matrix_parameters
from advisor.core.records import Ceilings, ModelFacts, Workload
from advisor.core.roofline import PARTS, Step, bound_s, throughput_bound, windows, work
from advisor.shell.resources import load_yaml

H200 = Ceilings(copy_bytes_per_s=4.3e12, bf16_flops_per_s=7.8e14, source="measured")


def shipped(name: str) -> ModelFacts:
    known = load_yaml(f"models/{name}.yaml")
    return facts(known["name"], known["config"])


SMALL, LARGE = shipped("qwen2.5-0.5b"), shipped("qwen2.5-7b")


def part(model: ModelFacts, step: Step, name: str):
    return next(one for one in work(model, step) if one.name == name)


def shaped(**changes) -> ModelFacts:
    config = SMALL.config | changes
    return facts("made up", config)


def test_a_decode_step_reads_every_weight_once_and_computes_two_operations_per_weight_and_token():
    step = Step(decode=8, decode_context=100)
    products = [one for one in work(LARGE, step) if one.part != "attention"]
    matrices = matrix_parameters(LARGE) + LARGE.vocab_size * LARGE.hidden_size
    assert sum(one.flops for one in products) == 2 * 8 * matrices
    assert sum(one.bytes for one in products) == pytest.approx(2 * matrices, rel=0.01)


def test_attention_of_a_decode_step_by_hand():
    # Qwen2.5-0.5B: 24 layers, 14 heads and 2 KV heads of 64.
    one = part(SMALL, Step(decode=3, decode_context=1000), "attention")
    assert one.flops == 24 * 3 * 4 * 14 * 64 * 1000
    assert one.bytes == 24 * 3 * (1000 * 2 * 2 * 64 * 2 + 2 * 2 * 14 * 64)


def test_a_prompt_read_in_pieces_sees_as_many_pairs_as_one_read_at_once():
    whole = part(SMALL, Step(prefill=1, prefill_tokens=1000), "attention").flops
    pieces = [Step(prefill=1, prefill_tokens=250, prefill_context=250 * n) for n in range(4)]
    assert sum(part(SMALL, piece, "attention").flops for piece in pieces) == whole == 24 * 4 * 14 * 64 * 500500


def test_a_last_token_that_is_prefilled_costs_what_a_decoded_one_does():
    read = Step(prefill=5, prefill_tokens=1, prefill_context=99)
    assert work(SMALL, read) == work(SMALL, Step(decode=5, decode_context=100))


def test_the_head_works_for_sampled_tokens_only_tied_or_not():
    head = part(SMALL, Step(prefill=4, prefill_tokens=512), "lm_head")
    assert SMALL.tied_embeddings and head.flops == 2 * 4 * embedding_parameters(SMALL)
    assert part(LARGE, Step(prefill=4, prefill_tokens=512), "lm_head").flops == 2 * 4 * 3584 * 152064


def test_an_eight_bit_cache_halves_what_attention_reads():
    step = Step(decode=64, decode_context=4096)
    eight = facts("m", SMALL.config, kv_cache_dtype="fp8")
    assert part(eight, step, "attention").bytes == pytest.approx(part(SMALL, step, "attention").bytes / 2, rel=0.02)


def gemma(**changes) -> ModelFacts:
    config = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 2560,
        "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 1024,
    }  # fmt: skip
    return facts("gemma", config | changes)


def test_five_of_six_layers_of_gemma_3_see_no_further_than_their_window():
    assert windows(gemma()).count(None) == 5 and windows(gemma())[5] is None
    explicit = ["full_attention", "sliding_attention"] * 17
    assert windows(gemma(layer_types=explicit))[:2] == [None, 1024]
    assert windows(gemma(sliding_window=None)) == windows(SMALL) + [None] * 10
    one = part(gemma(), Step(decode=1, decode_context=5000), "attention")
    assert one.flops == 4 * 8 * 256 * (29 * 1024 + 5 * 5000)


def test_a_windowed_prompt_by_hand():
    one = part(gemma(), Step(prefill=1, prefill_tokens=3000), "attention")
    inside = 1024 * 1025 // 2 + (3000 - 1024) * 1024
    assert one.flops == 4 * 8 * 256 * (29 * inside + 5 * 3000 * 3001 // 2)


def test_only_qwens_that_say_so_use_their_window():
    assert windows(SMALL) == [None] * 24
    used = shaped(use_sliding_window=True, sliding_window=64, max_window_layers=20)
    assert windows(used) == [None] * 20 + [64] * 4


def test_what_is_not_modelled_is_refused_by_name():
    with pytest.raises(Unfit, match="fp8"):
        work(facts("m", SMALL.config, quantization="fp8"), Step(decode=1, decode_context=1))
    with pytest.raises(Unfit, match="mixture of experts"):
        facts("m", SMALL.config | {"num_experts": 8})


sizes = st.integers(min_value=1, max_value=300)


@given(sizes, sizes, st.integers(0, 8), st.integers(0, 600), st.integers(0, 600), st.sampled_from([None, 64]))
def test_time_never_falls_when_batch_or_context_grow(decode, context, prefill, tokens, before, window):
    model = shaped(use_sliding_window=window is not None, sliding_window=window or 0, max_window_layers=4)
    step = Step(decode=decode, decode_context=context, prefill=prefill, prefill_tokens=tokens, prefill_context=before)
    least = bound_s(model, step, H200)
    for field in ("decode", "decode_context", "prefill", "prefill_tokens", "prefill_context"):
        larger = msgspec.structs.replace(step, **{field: getattr(step, field) + 1})
        assert bound_s(model, larger, H200) >= least, field


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4]), sizes, sizes)
def test_time_never_falls_when_layers_or_width_grow(layers, heads, width, kv_heads, batch, context):
    heads *= kv_heads
    shape = {
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "hidden_size": 64 * heads, "intermediate_size": 64 * width, "head_dim": 64,
    }  # fmt: skip
    step = Step(decode=batch, decode_context=context, prefill=1, prefill_tokens=context)
    least = bound_s(shaped(**shape), step, H200)
    for field, more in (
        ("num_hidden_layers", 1), ("hidden_size", 64), ("intermediate_size", 64),
        ("num_attention_heads", kv_heads), ("vocab_size", 64),
    ):  # fmt: skip
        larger = shaped(**shape | {field: shape.get(field, SMALL.vocab_size) + more})
        assert bound_s(larger, step, H200) >= least, field


@given(sizes, sizes)
def test_better_ceilings_never_make_it_slower(batch, context):
    step = Step(decode=batch, decode_context=context)
    for field in ("copy_bytes_per_s", "bf16_flops_per_s"):
        better = msgspec.structs.replace(H200, **{field: 2 * getattr(H200, field)})
        assert bound_s(SMALL, step, better) <= bound_s(SMALL, step, H200)


def test_every_kernel_belongs_to_a_part_and_every_part_has_one():
    assert {one.part for one in work(SMALL, Step(decode=1, decode_context=1))} == set(PARTS)


@pytest.mark.parametrize(
    ("kind", "measured"), [("serve", 36_269), ("prefill", 604), ("decode", 139_334)], ids=lambda one: str(one)
)
def test_nothing_measured_on_an_h200_exceeds_the_bound(kind, measured):
    """The best of the runs in data/ (0.5B, ctx 1024, 256 in flight), and of a first measurement (decode, ctx 128)."""
    isl, batch = (128, 1024) if kind == "decode" else (1024, 256)
    asked = Workload(kind=kind, isl=isl, osl=1 if kind == "prefill" else 128, concurrency=batch)
    bound = throughput_bound(SMALL, asked, H200)
    assert measured < bound < 10 * measured


def one_by_one(model: ModelFacts, isl: int, osl: int, batch: int) -> float:
    """Tokens per second of a batch, step by step, if computing and moving overlapped over all of its steps."""
    every = [*work(model, Step(prefill=batch, prefill_tokens=isl))]
    for context in range(isl + 1, isl + osl):
        every += work(model, Step(decode=batch, decode_context=context))
    flops, moved = (sum(getattr(one, what) for one in every) for what in ("flops", "bytes"))
    return batch * osl / max(flops / H200.bf16_flops_per_s, moved / H200.copy_bytes_per_s)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 64), st.sampled_from([None, 50]))
def test_the_bound_of_a_load_is_the_sum_of_its_steps(isl, osl, batch, window):
    model = shaped(use_sliding_window=window is not None, sliding_window=window or 0, max_window_layers=4)
    asked = Workload(kind="serve", isl=isl, osl=osl, concurrency=batch)
    assert throughput_bound(model, asked, H200) == pytest.approx(one_by_one(model, isl, osl, batch), rel=1e-9)


def test_one_token_out_is_a_prompt():
    kinds = [Workload(kind=kind, isl=500, osl=1, concurrency=64) for kind in ("serve", "prefill")]
    assert throughput_bound(LARGE, kinds[0], H200) == throughput_bound(LARGE, kinds[1], H200)


def test_a_piece_of_a_prompt_reads_no_more_than_its_first_token_sees():
    one = part(gemma(), Step(prefill=1, prefill_tokens=1, prefill_context=5000), "attention")
    per_token, in_and_out = 2 * 4 * 256 * 2, 2 * 2 * 8 * 256 * 34
    assert one.bytes == per_token * (29 * 1024 + 5 * 5001) + in_and_out
