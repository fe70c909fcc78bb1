import functools
import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core import memory
from advisor.core.errors import BadQuestion, Unfit
from advisor.core.model import facts
from advisor.core.records import GpuFacts, Workload
from advisor.core.settings import (
    captured_batch_sizes,
    default_batch,
    default_settings,
    read_defaults,
    serve_arguments,
    serve_environment,
    with_kv_bytes,
)
from advisor.shell.resources import load_yaml

DEFAULTS = read_defaults(load_yaml("vllm.yaml"))
GIB = 1024**3

# What an engine of vLLM 0.26 on an H200 reported as its cudagraph_capture_sizes.
# fmt: off
CAPTURED_ON_H200 = [
    1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 136, 144, 152, 160, 168, 176, 184, 192,
    200, 208, 216, 224, 232, 240, 248, 256, 272, 288, 304, 320, 336, 352, 368, 384, 400, 416, 432, 448, 464, 480, 496,
    512,
]
# fmt: on


@functools.cache
def model(size="0.5b", **options):
    document = load_yaml(f"models/qwen2.5-{size}.yaml")
    return facts(document["name"], document["config"], **options)


def gpu(name="NVIDIA H200", memory_gib=140, capability="9.0"):
    return GpuFacts(
        index=0,
        uuid="GPU-0",
        name=name,
        sms=132,
        memory_total_bytes=memory_gib * GIB,
        compute_capability=capability,
        driver="580.159",
        cuda="13.0",
        compute_mode="default",
        mig=False,
        gpm=True,
        power_limit_w=None,
    )


def load(kind="serve", isl=1024, osl=128):
    return Workload(kind=kind, isl=isl, osl=osl, concurrency=256)


def settings(card=None, workload=None, kv_bytes=24 * GIB, **options):
    return default_settings(model(**options), card or gpu(), DEFAULTS, workload or load(), kv_bytes)


@pytest.mark.parametrize(
    ("card", "batch"),
    [
        (gpu(), (8192, 1024)),
        (gpu("NVIDIA H100 80GB HBM3", 79), (8192, 1024)),
        (gpu("NVIDIA A100-SXM4-80GB", 79), (2048, 256)),
        (gpu("NVIDIA L4", 22), (2048, 256)),
    ],
)
def test_the_batch_depends_on_the_gpu_as_in_vllm(card, batch):
    chosen = default_batch(card, DEFAULTS)
    assert (chosen.max_num_batched_tokens, chosen.max_num_seqs) == batch


def test_every_default_names_its_source():
    document = load_yaml("vllm.yaml")
    assert document["version"] == "0.26.0"
    assert all(fact["source"].startswith("vllm/") for fact in document["defaults"].values())


def test_a_damaged_defaults_file_is_noticed():
    document = load_yaml("vllm.yaml")
    document["defaults"]["max_num_seqs"]["value"] = "many"
    with pytest.raises(msgspec.ValidationError):
        read_defaults(document)


def test_the_default_engine_is_what_vllm_serve_resolves_on_an_h200():
    resolved = settings()
    assert (resolved.max_num_batched_tokens, resolved.max_num_seqs) == (8192, 1024)
    assert resolved.max_cudagraph_capture_size == 512
    assert resolved.max_model_len == 32768
    assert (resolved.enable_prefix_caching, resolved.async_scheduling) == (True, True)
    assert (resolved.dtype, resolved.load_format, resolved.gpu_memory_utilization) == ("bfloat16", "dummy", 0.05)


def test_real_weights_are_loaded_and_not_made_up():
    assert settings(weights="real").load_format == "auto"


def test_decode_runs_without_prefix_caching():
    assert not settings(workload=load("decode")).enable_prefix_caching


def test_a_kv_cache_shorter_than_the_models_context_shortens_the_context():
    resolved = settings(kv_bytes=64 * 1024**2)  # 5461 tokens of 12 KiB: 341 blocks, one of them vLLM's own
    assert resolved.max_model_len == 340 * 16


def test_a_kv_cache_that_holds_no_request_is_a_programming_error():
    with pytest.raises(ValueError, match="less than one request"):
        settings(kv_bytes=1024**2)


def test_a_request_beyond_the_models_context_is_a_bad_question():
    with pytest.raises(BadQuestion, match="32768"):
        settings(workload=load(isl=32768))


def test_a_longrope_model_is_served_at_its_original_length_or_that_of_the_requests():
    document = load_yaml("models/qwen2.5-0.5b.yaml")
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    long = facts("m", {**document["config"], "rope_scaling": rope})
    assert default_settings(long, gpu(), DEFAULTS, load(), 24 * GIB).max_model_len == 4096
    assert default_settings(long, gpu(), DEFAULTS, load(isl=8000), 24 * GIB).max_model_len == 8128


def test_a_gpu_without_bfloat16_is_unfit_for_it_and_fit_for_float16():
    old = gpu("Tesla T4", 15, "7.5")
    with pytest.raises(Unfit, match="--dtype float16"):
        settings(card=old)
    assert settings(card=old, dtype="float16").dtype == "float16"


def test_a_very_short_context_lowers_budget_and_graphs_as_in_vllm():
    document = load_yaml("models/qwen2.5-0.5b.yaml")
    tiny = facts("m", {**document["config"], "max_position_embeddings": 1})
    with pytest.raises(BadQuestion):
        default_settings(tiny, gpu(), DEFAULTS, load(isl=1, osl=1), GIB)
    short = facts("m", {**document["config"], "max_position_embeddings": 4})
    resolved = default_settings(short, gpu(), DEFAULTS, load(isl=2, osl=2), GIB)
    assert (resolved.max_num_batched_tokens, resolved.max_num_seqs) == (4096, 1024)


def test_the_captured_batch_sizes_are_those_an_engine_reported():
    assert captured_batch_sizes(512) == CAPTURED_ON_H200
    assert captured_batch_sizes(512, 8192) == CAPTURED_ON_H200
    assert captured_batch_sizes(1024)[-3:] == [992, 1008, 1024]
    assert captured_batch_sizes(3) == [1, 2]
    assert captured_batch_sizes(512, 100)[-2:] == [96, 100]


@given(st.integers(1, 4096), st.none() | st.integers(1, 10000))
def test_captured_batch_sizes_ascend_and_never_exceed_the_limits(largest, budget):
    sizes = captured_batch_sizes(largest, budget)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] <= min(largest, budget or largest)


def test_another_kv_cache_changes_only_itself_and_the_context():
    first = settings()
    second = with_kv_bytes(first, model(), 64 * 1024**2)
    assert second.kv_cache_memory_bytes == 64 * 1024**2
    assert second.max_model_len == 340 * 16
    assert with_kv_bytes(second, model(), 24 * GIB).max_model_len == second.max_model_len
    assert second.max_num_batched_tokens == first.max_num_batched_tokens


@given(memory_gib=st.integers(8, 200), isl=st.integers(1, 30000), osl=st.integers(1, 2000), engines=st.integers(1, 8))
def test_what_memory_grants_always_makes_valid_settings(memory_gib, isl, osl, engines):
    card, workload = gpu(memory_gib=memory_gib), load(isl=isl, osl=osl)
    batch = default_batch(card, DEFAULTS)
    kv_bytes = memory.kv_bytes_per_engine(
        card,
        model(),
        max_num_batched_tokens=batch.max_num_batched_tokens,
        max_num_seqs=batch.max_num_seqs,
        workload=workload,
        engines=engines,
    )
    if kv_bytes is None:
        return
    resolved = default_settings(model(), card, DEFAULTS, workload, kv_bytes)
    assert isl + osl <= resolved.max_model_len <= 32768
    assert memory.whole_blocks(resolved.max_model_len) * memory.kv_bytes_per_token(model()) <= kv_bytes
    assert resolved.max_cudagraph_capture_size == captured_batch_sizes(512, resolved.max_num_batched_tokens)[-1]


def test_the_arguments_state_every_setting():
    arguments = serve_arguments(settings())
    pairs = dict(itertools.pairwise(arguments))
    assert pairs["--max-num-batched-tokens"] == "8192"
    assert pairs["--max-num-seqs"] == "1024"
    assert pairs["--max-cudagraph-capture-size"] == "512"
    assert pairs["--kv-cache-memory-bytes"] == str(24 * GIB)
    assert pairs["--max-model-len"] == "32768"
    assert pairs["--gpu-memory-utilization"] == "0.05"
    assert pairs["--dtype"] == "bfloat16"
    assert pairs["--kv-cache-dtype"] == "auto"
    assert pairs["--load-format"] == "dummy"
    assert pairs["--generation-config"] == "vllm"
    assert {"--enable-prefix-caching", "--async-scheduling"} <= set(arguments)
    assert "--quantization" not in arguments
    assert "--kv-transfer-config" not in arguments


def test_what_is_switched_off_is_said_to_be_off():
    off = msgspec.structs.replace(settings(), enable_prefix_caching=False, async_scheduling=False, quantization="fp8")
    arguments = serve_arguments(off)
    assert {"--no-enable-prefix-caching", "--no-async-scheduling"} <= set(arguments)
    assert arguments[arguments.index("--quantization") + 1] == "fp8"


def test_decode_fills_the_kv_cache_instead_of_computing_it():
    arguments = serve_arguments(settings(workload=load("decode")), "decode")
    connector = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    assert connector == {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}


def test_the_rust_front_end_is_not_given_what_it_refuses():
    told = serve_arguments(msgspec.structs.replace(settings(), rust_front_end=True))
    assert not {"--generation-config", "--api-server-count", "--stream-interval"} & set(told)
    assert serve_environment(msgspec.structs.replace(settings(), rust_front_end=True)) == {
        "VLLM_USE_RUST_FRONTEND": "1"
    }
    assert serve_environment(settings()) == {"VLLM_USE_RUST_FRONTEND": "0"}
