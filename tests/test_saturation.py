"""Kernels of a trace are told by their place in the step, and what cannot be told is said to be."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_terminal import report

from advisor.core.records import Ceilings, RawKernel, RawTrace, Step
from advisor.core.roofline import work
from advisor.core.saturation import PAUSE_S, Saturation, saturation

MODEL = msgspec.structs.replace(report().model, layers=3)
STEP = Step(decode=256, decode_context=1024)
CEILINGS = Ceilings(copy_bytes_per_s=4e12, bf16_flops_per_s=8e14, source="measured")
SMS = 132

FA3 = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::Mainloop>>>"
COMBINE = "void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<>>>"
KV = "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>"
NORM, SILU, ROPE = "triton_red_fused_add_mean_mul_rsqrt_0", "triton_poi_fused_mul_silu_1", "triton_poi_fused_cat_2"
GEMM, SPLIT, REDUCE = "nvjet_tst_128x64_64x8", "sm90_xmma_gemm_bf16bf16", "void cublasLt::splitKreduce_kernel<32>"
EMBED, ARGMAX, COPY = "triton_poi_fused_embedding_0", "void at::native::reduce_kernel<ArgMaxOps>", "Memcpy DtoD"

BEFORE = [NORM, GEMM, ROPE, KV]
AFTER = [GEMM, NORM, GEMM, SILU, SPLIT, REDUCE]
LAYER = [*BEFORE, FA3, COMBINE, *AFTER]
ENTIRE = [EMBED, *LAYER, *LAYER, *LAYER, NORM, GEMM, COPY, ARGMAX]


def trace(*steps: list[str], us: float = 10.0, blocks: int = 66, overlap_us: float = 0.0) -> RawTrace:
    """Kernels of `us` microseconds each, one after another, the steps apart."""
    names = sorted({name for step in steps for name in step})
    kernels, at = [], 1.0
    for step in steps:
        for name in step:
            count = SMS if name == FA3 else 0 if name == COPY else blocks
            kernels.append(RawKernel(name=names.index(name), start_s=at, seconds=us * 1e-6, blocks=count))
            at += (us - overlap_us) * 1e-6
        at += 4 * PAUSE_S
    return RawTrace(step=0, engine=0, names=names, kernels=kernels)


def told(*steps: list[str], **how) -> Saturation:
    found = saturation(trace(*steps, **how), STEP, MODEL, SMS, CEILINGS)
    assert isinstance(found, Saturation)
    return found


def test_each_kernel_is_told_by_its_place_between_the_attentions():
    found = told(ENTIRE, ENTIRE)
    counts = {part.label: round(part.seconds / 10e-6) for part in found.parts}
    assert counts == {
        "attention": 6,  # with what combines its parts
        "mlp": 9,  # with the second half of a product that is split
        "projections": 6,
        "lm_head": 1,
        "norm_activation": 12,
        "sampling": 1,
        "kv_writes": 3,
        "other": 3,  # embedding with the first norm, and a copy
    }
    assert (found.steps, found.why_unlabelled) == (2, "")
    assert sum(part.share for part in found.parts) == pytest.approx(1.0)


def test_the_achieved_fraction_is_the_ceilings_time_over_the_time_taken():
    mlp = told(ENTIRE).part("mlp")
    least = sum(one.bound_s(CEILINGS) for one in work(MODEL, STEP) if one.part == "mlp")
    assert mlp is not None and mlp.achieved == pytest.approx(least / 90e-6)
    norm = told(ENTIRE).part("norm_activation")
    assert norm is not None and norm.achieved is None
    alone = saturation(trace(ENTIRE), STEP, MODEL, SMS, None)
    assert isinstance(alone, Saturation) and all(part.achieved is None for part in alone.parts)


def test_multiprocessors_count_as_covered_by_blocks_except_where_a_kernel_persists():
    half = told(ENTIRE)
    mlp, attention, other = half.part("mlp"), half.part("attention"), half.part("other")
    assert mlp is not None and mlp.sms_covered == pytest.approx(0.5)
    assert attention is not None and attention.sms_covered == pytest.approx(0.5)  # of what combines its parts
    assert other is not None and other.sms_covered == pytest.approx(0.5)  # a copy has no blocks
    full = told(ENTIRE, blocks=1000).part("mlp")
    assert full is not None and full.sms_covered == 1.0
    persistent = told(ENTIRE, blocks=SMS).part("mlp")
    assert persistent is not None and persistent.sms_covered is None


def test_kernels_that_run_at_the_same_time_count_once():
    found = told(ENTIRE, us=10.0, overlap_us=4.0)
    assert found.busy_s == pytest.approx(found.span_s)
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.busy_s)


def test_a_stretch_with_another_number_of_products_is_unlabelled_and_the_rest_is_not():
    strange = [EMBED, *LAYER, *BEFORE, FA3, GEMM, NORM, GEMM, *LAYER, NORM, GEMM, ARGMAX]
    found = told(strange)
    unlabelled = found.part("unlabelled")
    assert unlabelled is not None and round(unlabelled.seconds / 10e-6) == 7
    assert found.why_unlabelled == "3 matrix products where o, gate_up, down, qkv were expected"
    assert found.part("lm_head") is not None


def test_a_step_with_another_number_of_layers_is_unlabelled_as_a_whole():
    found = told([EMBED, *LAYER, *LAYER, NORM, GEMM, ARGMAX])
    assert [part.label for part in found.parts] == ["unlabelled"]
    assert found.why_unlabelled == "2 attentions in a step of 3 layers"


def test_an_empty_trace_says_so():
    assert saturation(trace(), STEP, MODEL, SMS, CEILINGS) == "nothing was traced"


@given(
    st.lists(st.lists(st.sampled_from([*ENTIRE, "something else"]), min_size=1, max_size=60), min_size=1, max_size=3),
    st.floats(0.0, 9.0),
)
def test_shares_of_any_trace_add_up_to_one(steps, overlap_us):
    found = saturation(trace(*steps, overlap_us=overlap_us), STEP, MODEL, SMS, CEILINGS)
    assert isinstance(found, Saturation) and found.steps == len(steps)
    assert sum(part.share for part in found.parts) == pytest.approx(1.0)
    assert found.busy_s <= found.span_s * (1 + 1e-9)
    assert all(part.sms_covered is None or 0 < part.sms_covered <= 1 for part in found.parts)
