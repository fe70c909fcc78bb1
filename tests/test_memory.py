import functools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.memory import (
    BLOCK_TOKENS,
    GIB,
    explain,
    kv_bytes_per_engine,
    kv_bytes_per_token,
    kv_cap_bytes,
    plan,
    reserve_bytes,
    weights_bytes,
    whole_blocks,
)
from advisor.core.model import facts, parameters
from advisor.core.records import GpuFacts, Workload
from advisor.shell.resources import load_yaml

H200_BYTES = 150_754_820_096


@functools.cache
def model(size="0.5b", **options):
    document = load_yaml(f"models/qwen2.5-{size}.yaml")
    return facts(document["name"], document["config"], **options)


def gpu(memory_bytes=H200_BYTES):
    return GpuFacts(
        index=0,
        uuid="GPU-0",
        name="NVIDIA H200",
        sms=132,
        memory_total_bytes=memory_bytes,
        compute_capability="9.0",
        driver="580.159",
        cuda="13.0",
        compute_mode="default",
        mig=False,
        gpm=True,
        power_limit_w=700.0,
    )


def load(isl=1024, osl=128, concurrency=256):
    return Workload(kind="serve", isl=isl, osl=osl, concurrency=concurrency)


def planned(engines, size="0.5b", card=None, workload=None, tokens=8192, seqs=1024):
    return plan(
        card or gpu(),
        model(size),
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        workload=workload or load(),
        engines=engines,
    )


def test_the_estimate_for_one_small_engine_is_above_what_was_seen_on_an_h200_by_little():
    beyond_kv = weights_bytes(model()) + reserve_bytes(model(), 8192, 1024)
    seen = 4.2 * GIB
    assert seen < beyond_kv < seen + 2.5 * GIB


def test_sixteen_bit_weights_take_two_bytes_each():
    assert weights_bytes(model()) == 2 * 494_032_768


def test_fp8_halves_the_layers_and_leaves_the_embedding():
    plain, small = model("7b"), model("7b", quantization="fp8")
    head_and_embedding = 2 * 2 * 152064 * 3584
    assert weights_bytes(small) < weights_bytes(plain)
    assert weights_bytes(small) > head_and_embedding
    assert weights_bytes(small) - parameters(small) == pytest.approx(head_and_embedding / 2, rel=1e-3)


def test_a_token_of_qwen_half_a_billion_takes_twelve_kibibytes_of_kv_cache():
    assert kv_bytes_per_token(model()) == 12288
    assert kv_bytes_per_token(model(kv_cache_dtype="fp8")) == 6144
    assert 2_097_152 * kv_bytes_per_token(model()) == 24 * GIB  # what one engine reported for 24 GiB


def test_a_small_model_gets_the_same_kv_cache_for_one_and_for_four_engines():
    assert planned(1).kv_bytes == planned(4).kv_bytes == kv_cap_bytes(model(), load())


def test_the_cap_holds_four_times_the_requests_in_flight_and_one_longest_request():
    per_token = kv_bytes_per_token(model())
    assert kv_cap_bytes(model(), load()) >= 4 * 256 * 1152 * per_token
    assert kv_cap_bytes(model(), load(isl=16, osl=16, concurrency=1)) == 4 * GIB
    seven = model("7b")
    assert kv_cap_bytes(seven, load(isl=16, osl=16, concurrency=1)) >= 131072 * kv_bytes_per_token(seven)


def test_a_model_that_fits_once_but_not_twice_is_told_with_the_sums():
    once, twice = planned(1, "32b"), planned(2, "32b")
    assert once.kv_bytes is not None
    assert twice.kv_bytes is None
    line = explain(twice)
    assert "2 engines do not fit on NVIDIA H200" in line
    assert "61.0 weights" in line
    assert "1152 tokens" in line
    assert "129.2 GiB usable (92% of 140.4 GiB)" in line
    assert "\n" not in line
    assert explain(once).startswith("one engine fits on NVIDIA H200")


def test_a_model_that_does_not_fit_once_is_told_with_the_sums():
    none = planned(1, "32b", card=gpu(24 * GIB), tokens=2048, seqs=256)
    assert none.kv_bytes is None
    assert explain(none).startswith("one engine does not fit")


def test_no_engines_is_a_programming_error():
    with pytest.raises(ValueError, match="at least one"):
        planned(0)


LOADS = st.builds(
    load, isl=st.integers(1, 30000), osl=st.integers(1, 2000), concurrency=st.sampled_from([1, 7, 64, 256, 2048])
)


@given(
    size=st.sampled_from(["0.5b", "3b", "7b", "32b"]),
    memory_gib=st.integers(1, 200),
    workload=LOADS,
    engines=st.integers(1, 16),
)
def test_kv_cache_never_grows_with_engines_and_everything_fits(size, memory_gib, workload, engines):
    card = gpu(memory_gib * GIB)
    here, more = (planned(count, size, card, workload) for count in (engines, engines + 1))
    assert (more.kv_bytes or 0) <= (here.kv_bytes or 0)
    if here.kv_bytes is None:
        return
    each = here.weights_bytes + here.reserve_bytes + here.kv_bytes
    assert engines * each <= 0.92 * card.memory_total_bytes
    assert here.kv_bytes % (64 * 1024**2) == 0
    assert here.kv_bytes >= whole_blocks(workload.isl + workload.osl) * kv_bytes_per_token(model(size))


@given(st.integers(1, 10**6))
def test_whole_blocks_are_the_next_multiple_of_sixteen(tokens):
    assert 0 <= whole_blocks(tokens) - tokens < BLOCK_TOKENS
    assert whole_blocks(tokens) % BLOCK_TOKENS == 0


def test_kv_bytes_per_engine_is_the_plans_number():
    numbers = {"max_num_batched_tokens": 8192, "max_num_seqs": 1024, "workload": load(), "engines": 3}
    assert kv_bytes_per_engine(gpu(), model("7b"), **numbers) == planned(3, "7b").kv_bytes


def test_a_plan_survives_being_written_as_json():
    assert msgspec.json.decode(msgspec.json.encode(planned(2)), type=type(planned(2))) == planned(2)
