"""The check of thread percentages: which products, how they are judged, and how the worker is run."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.numerics import NOT_FINITE, Product, judge_products, products, sms_at
from advisor.core.records import EngineSettings, ModelFacts, NumericsResult, RawNumerics
from advisor.shell import numerics, numerics_worker

ROOT = Path(__file__).parent.parent


def model(**changes):
    facts = {
        "name": "Qwen/Qwen2.5-0.5B",
        "architecture": "Qwen2ForCausalLM",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "head_dim": 64,
        "vocab_size": 151936,
        "tied_embeddings": True,
        "qkv_bias": True,
        "max_context": 32768,
        "dtype": "bfloat16",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "weights": "dummy",
        "config": {},
    }
    return ModelFacts(**{**facts, **changes})


def settings(**changes):
    told = {
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 256,
        "max_cudagraph_capture_size": 512,
        "enable_prefix_caching": True,
        "async_scheduling": True,
        "kv_cache_memory_bytes": 2**30,
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.1,
        "dtype": "bfloat16",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "load_format": "dummy",
    }
    return EngineSettings(**{**told, **changes})


def result(percentage=50, product="gate_up", rows=64, worst_error=0.0017, unstable=False, sms=66):
    return NumericsResult(
        percentage=percentage,
        sms=sms,
        product=product,
        rows=rows,
        columns=9728,
        inner=896,
        worst_error=worst_error,
        unstable=unstable,
    )


def raw(*results, failed=None):
    return RawNumerics(results=list(results), failed=failed or {}, seconds=1.0)


# ---------------------------------------------------------------- which products


def test_the_products_have_the_shapes_of_the_models_layers():
    found = {p.name: (p.inner, p.columns, p.bias) for p in products(model(), settings(), [1, 2, 4])}
    assert found == {
        "qkv": (896, (14 + 2 * 2) * 64, True),
        "o": (14 * 64, 896, False),
        "gate_up": (896, 2 * 4864, False),
        "down": (4864, 896, False),
        "lm_head": (896, 151936, False),
    }


def test_a_head_dimension_of_its_own_shapes_attention():
    found = {p.name: p for p in products(model(hidden_size=2560, heads=8, kv_heads=4, head_dim=256), settings(), [1])}
    assert (found["qkv"].inner, found["qkv"].columns) == (2560, 4096)
    assert (found["o"].inner, found["o"].columns) == (2048, 2560)


def test_a_vocabulary_is_padded_as_the_engine_pads_it():
    assert products(model(vocab_size=50257), settings(), [1])[-1].columns == 50304


def test_layers_are_checked_at_captured_sizes_sequences_and_budget():
    layers = products(model(), settings(max_num_seqs=200), [512, 1, 8, 8])[:-1]
    assert {tuple(p.rows) for p in layers} == {(1, 8, 200, 512, 8192)}


def test_the_unembedding_is_checked_up_to_the_sequences_that_can_be_sampled():
    assert products(model(), settings(max_num_seqs=200), [1, 8, 512])[-1].rows == [1, 8, 200]


@pytest.mark.parametrize("where", ["model", "settings"])
def test_a_quantised_model_has_no_products_that_a_plain_one_could_stand_in_for(where):
    changes = {"quantization": "fp8"}
    facts, told = (model(**changes), settings()) if where == "model" else (model(), settings(**changes))
    assert products(facts, told, [1]) == []


# ---------------------------------------------------------------- judging products


def test_a_percentage_with_right_products_is_approved():
    verdict = judge_products(raw(result(), result(rows=1, worst_error=0.002)), 50)
    assert (verdict.ok, verdict.worst_error, verdict.why) == (True, 0.002, None)


def test_a_wrong_product_is_named_with_its_rows_and_error():
    verdict = judge_products(raw(result(), result(product="down", rows=512, worst_error=0.37)), 50)
    assert (verdict.ok, verdict.worst_error) == (False, 0.37)
    assert verdict.why == "matrix product down at batch 512 off by 0.37"


@pytest.mark.parametrize("error", [math.nan, math.inf, NOT_FINITE])
def test_a_product_that_is_not_finite_is_refused_even_beside_a_larger_number(error):
    verdict = judge_products(raw(result(worst_error=5.0), result(product="o", worst_error=error)), 50)
    assert (verdict.ok, verdict.why) == (False, "matrix product o at batch 64 never written or not finite in parts")
    assert math.isfinite(verdict.worst_error)


def test_a_product_that_differs_between_launches_is_refused():
    verdict = judge_products(raw(result(), result(product="qkv", rows=8, unstable=True)), 50)
    assert (verdict.ok, verdict.why) == (False, "matrix product qkv at batch 8 differs between repeated launches")


@pytest.mark.parametrize("why", ["RuntimeError: CUDA error", ""])
def test_a_failed_check_is_refused_however_good_what_it_finished(why):
    verdict = judge_products(raw(result(), failed={"50": why}), 50)
    assert not verdict.ok
    assert verdict.why == f"numerics check failed: {why}"


def test_a_wrong_product_is_told_rather_than_that_the_check_was_cut_short():
    verdict = judge_products(raw(result(worst_error=0.56), failed={"50": "not done after 60 s"}), 50)
    assert verdict.why == "matrix product gate_up at batch 64 off by 0.56"


def test_a_percentage_that_was_not_checked_is_refused():
    verdict = judge_products(raw(result(percentage=50)), 25)
    assert (verdict.ok, verdict.worst_error) == (False, None)
    assert verdict.why == "numerics not checked at this percentage"


def test_a_percentage_checked_at_fewer_batch_sizes_than_another_is_refused():
    evidence = raw(result(), result(percentage=25), result(percentage=25, rows=8192))
    assert judge_products(evidence, 25).ok
    verdict = judge_products(evidence, 50)
    assert (verdict.ok, verdict.why) == (
        False,
        "numerics check incomplete: gate_up with 8192 rows is missing (1 in all)",
    )


def test_a_percentage_that_was_not_in_force_is_refused():
    evidence = raw(result(sms=132), result(percentage=100, sms=132))
    assert judge_products(evidence, 100, sms_total=132).ok
    assert (
        judge_products(evidence, 50, sms_total=132).why == "the client saw all 132 SMs: the percentage was not in force"
    )


def test_another_percentages_wrong_product_does_not_count():
    evidence = raw(result(percentage=42, worst_error=0.37), result(percentage=50))
    assert (judge_products(evidence, 50).ok, judge_products(evidence, 42).ok) == (True, False)


@given(
    st.lists(st.floats(min_value=0, max_value=1e-2), max_size=6),
    st.floats(min_value=0.0101, allow_nan=False),
    st.integers(min_value=0, max_value=6),
)
def test_one_wrong_product_among_right_ones_is_always_refused(errors, wrong, place):
    errors.insert(place, wrong)
    verdict = judge_products(raw(*(result(rows=i + 1, worst_error=e) for i, e in enumerate(errors))), 50)
    assert not verdict.ok
    assert f"at batch {errors.index(wrong) + 1}" in verdict.why


def test_the_multiprocessors_that_a_client_saw_are_read_from_its_results():
    evidence = raw(result(percentage=42, sms=54), result(percentage=75, sms=98))
    assert [sms_at(evidence, percentage) for percentage in (42, 75, 50)] == [54, 98, None]


# ---------------------------------------------------------------- running the worker

PRODUCTS = [Product(name="o", inner=96, columns=80, bias=False, rows=[1, 70])]
ANSWER = {"product": "o", "columns": 80, "inner": 96, "worst_error": 0.0017, "unstable": False, "sms": 66}
STUB_HEAD = f"""
import json, os, subprocess, sys, time
config = json.load(sys.stdin)
percentage = os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"]
def say(**line):
    print(json.dumps(line), flush=True)
def answer(rows, **changes):
    say(**{{**{ANSWER!r}, "rows": rows, **changes}})
"""


@pytest.fixture
def checked(tmp_path):
    """Runs a stub worker with the given body, which may use config, percentage, say and answer."""

    def run(body, percentages=(50,), timeout_s=30.0, base=None, asked=PRODUCTS):
        stub = tmp_path / "stub.py"
        stub.write_text(STUB_HEAD + body)
        return numerics.check(
            percentages,
            asked,
            lambda percentage: {"CUDA_MPS_PIPE_DIRECTORY": f"/pipe/{percentage}"},
            base or {"PATH": "/bin"},
            sys.executable,
            timeout_s,
            worker=[str(stub)],
        )

    return run


FINISH = """
for product in config["products"]:
    for rows in product["rows"]:
        answer(rows)
say(done=True, sms=66, seconds=0.1)
"""


def test_every_percentage_is_answered_by_a_worker_of_its_own(checked):
    evidence = checked(FINISH, percentages=[50, 75, 50])
    assert [(r.percentage, r.rows, r.sms) for r in evidence.results] == [
        (50, 1, 66),
        (50, 70, 66),
        (75, 1, 66),
        (75, 70, 66),
    ]
    assert evidence.failed == {}
    assert judge_products(evidence, 75).ok


def test_a_worker_sees_the_environment_that_was_built_for_it_and_nothing_else(checked, tmp_path, monkeypatch):
    monkeypatch.setenv("FROM_THE_PARENT", "1")
    seen = tmp_path / "seen.json"
    checked(f"open({str(seen)!r}, 'w').write(json.dumps(dict(os.environ)))", base={"GIVEN": "2"})
    environment = json.loads(seen.read_text())
    environment.pop("LC_CTYPE", None)  # the interpreter's own
    assert environment == {
        "GIVEN": "2",
        "CUDA_MPS_PIPE_DIRECTORY": "/pipe/50",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50",
    }


def test_a_worker_that_dies_is_recorded_with_its_last_word_and_the_others_go_on(checked):
    body = "if percentage == '42':\n    answer(1)\n    sys.exit('RuntimeError: CUDA error: 805\\n')\n" + FINISH
    evidence = checked(body, percentages=[42, 50])
    assert evidence.failed == {"42": "RuntimeError: CUDA error: 805"}
    assert [r.percentage for r in evidence.results] == [42, 50, 50]
    assert (judge_products(evidence, 42).ok, judge_products(evidence, 50).ok) == (False, True)


def test_a_worker_that_is_killed_is_recorded_with_the_signal(checked):
    assert checked("os.kill(os.getpid(), 9)").failed == {"50": "the worker was ended by signal 9"}


def test_a_worker_that_ends_early_without_an_error_is_a_failure(checked):
    evidence = checked("answer(1)")
    assert evidence.failed == {"50": "the worker ended before it was done"}
    assert len(evidence.results) == 1


@pytest.mark.parametrize("line", ["print('hello')", "say(product='o')", "answer(1, worst_error=float('nan'))"])
def test_an_answer_that_is_damaged_is_a_failure(checked, line):
    evidence = checked(f"answer(1)\n{line}\n{FINISH}")
    assert evidence.failed["50"].startswith("the worker's answer is damaged")


def test_a_worker_that_cannot_be_started_is_a_failure():
    evidence = numerics.check([50], PRODUCTS, lambda percentage: {}, {}, "/no/such/python", 5.0)
    assert evidence.failed["50"].startswith("the worker could not be started")


def test_without_products_nothing_is_started_and_nothing_approved(checked, tmp_path):
    evidence = checked(f"open({str(tmp_path / 'started')!r}, 'w')", asked=[])
    assert not (tmp_path / "started").exists()
    assert not judge_products(evidence, 50).ok


HANG = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
answer(1)
open({pids!r} + ".new", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename({pids!r} + ".new", {pids!r})
time.sleep(300)
"""


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_worker_that_hangs_is_ended_with_its_children_and_keeps_what_it_finished(checked, tmp_path):
    pids = tmp_path / "pids"
    evidence = checked(HANG.format(pids=str(pids)), timeout_s=2.5)
    assert evidence.failed == {"50": "not done after 2.5 s"}
    assert [r.rows for r in evidence.results] == [1]
    assert until(lambda: all(gone(int(pid)) for pid in pids.read_text().split()))


def test_a_worker_that_ignores_the_polite_signal_is_killed(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "_END_S", 0.3)
    pids = tmp_path / "pids"
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    checked(deaf + HANG.format(pids=str(pids)), timeout_s=2.5)
    assert until(lambda: all(gone(int(pid)) for pid in pids.read_text().split()))


def test_an_interrupt_ends_the_worker_and_is_handed_on(tmp_path):
    stub, pids = tmp_path / "stub.py", tmp_path / "pids"
    stub.write_text(STUB_HEAD + HANG.format(pids=str(pids)))
    caller = f"""
import sys
from advisor.core.numerics import Product
from advisor.shell import numerics
product = Product(name="o", inner=96, columns=80, bias=False, rows=[1])
numerics.check([50], [product], lambda percentage: {{}}, {{}}, sys.executable, 60.0, worker=[{str(stub)!r}])
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", caller], cwd=ROOT, stderr=subprocess.PIPE, env={"PATH": os.environ["PATH"]}
    )
    try:
        assert until(pids.exists)
        parent.send_signal(signal.SIGINT)
        _, errors = parent.communicate(timeout=30)
    finally:
        parent.kill()
    assert errors.decode().strip().endswith("KeyboardInterrupt")
    assert until(lambda: all(gone(int(pid)) for pid in pids.read_text().split()))


# ---------------------------------------------------------------- the worker itself


def real_worker(base, asked=PRODUCTS, **options):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **base}
    return numerics.check([50], asked, lambda percentage: {}, environment, sys.executable, 100.0, **options)


def test_whatever_else_the_worker_prints_stays_out_of_its_answer(tmp_path):
    (tmp_path / "torch.py").write_text("print('banner', flush=True)\nraise ImportError('no CUDA library')\n")
    evidence = real_worker({"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert evidence.failed == {"50": "ImportError: no CUDA library"}


@given(st.integers(min_value=1, max_value=5000), st.integers(min_value=0, max_value=700))
def test_blocks_cover_everything_once_and_cut_only_between_tiles(total, width):
    parts = list(numerics_worker.blocks(total, width))
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(total))
    assert all(part.start % numerics_worker.TILE == 0 for part in parts)
    assert all(part.stop - part.start <= max(width, numerics_worker.TILE) for part in parts)


@given(st.integers(min_value=1, max_value=5000), st.integers(min_value=1, max_value=100))
def test_sampled_places_are_distinct_and_reach_both_ends(total, count):
    places = numerics_worker.spread(total, count)
    assert len(set(places)) == len(places) == min(total, count)
    assert places[0] == 0
    assert count == 1 or places[-1] == total - 1


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def by_hand(out, reference):
    """The worst tile's error, element by element."""
    tiles = {}
    for i, (row, expected) in enumerate(zip(out, reference, strict=True)):
        for j, (value, wanted) in enumerate(zip(row, expected, strict=True)):
            off, norm = tiles.get((i // 64, j // 64), (0.0, 0.0))
            tiles[i // 64, j // 64] = (off + (value - wanted) ** 2, norm + wanted**2)
    return max(math.sqrt(off / norm) for off, norm in tiles.values())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 64), (65, 130), (64, 128), (130, 63)])
def test_the_worst_tile_is_the_one_found_element_by_element(torch, rows, columns, monkeypatch):
    monkeypatch.setattr(numerics_worker, "BLOCK_BYTES", 64 * 8 * rows)  # several blocks even here
    reference = torch.randn(rows, columns, dtype=torch.float64)
    out = reference + 0.01 * torch.randn(rows, columns, dtype=torch.float64)
    assert numerics_worker.tile_error(out, reference) == pytest.approx(by_hand(out.tolist(), reference.tolist()))


def test_one_wrong_element_in_a_large_product_is_found(torch):
    reference = torch.randn(256, 1024)
    out = reference.bfloat16()
    assert numerics_worker.tile_error(out, reference) < 4e-3
    out[200, 1000] += 8
    assert numerics_worker.tile_error(out, reference) > 1e-2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_product_that_left_a_place_unwritten_is_recorded_as_not_finite(torch, value):
    reference = torch.randn(70, 80)
    out = reference.bfloat16()
    out[69, 79] = value
    assert numerics_worker.compare(lambda: out, reference, 2) == (NOT_FINITE, False)


def test_a_launch_that_differs_from_the_first_is_unstable_and_counts(torch):
    reference = torch.randn(70, 80)
    outs = iter([reference.bfloat16(), reference.bfloat16(), 2 * reference.bfloat16()])
    error, unstable = numerics_worker.compare(lambda: next(outs), reference, 3)
    assert unstable
    assert error == pytest.approx(1.0, rel=0.01)


def test_a_reference_that_is_off_at_a_sampled_place_is_refused(torch):
    x, weight, bias = torch.randn(70, 96), torch.randn(80, 96), torch.randn(80)
    exact = x.double() @ weight.double().T + bias.double()
    numerics_worker.verify(exact, x, weight, bias, 16, 4096)
    for value in (1e-6, math.nan):
        wrong = exact.clone()
        wrong[69, 3] += value
        with pytest.raises(numerics_worker.ReferenceWrong, match="float64 reference itself is off"):
            numerics_worker.verify(wrong, x, weight, bias, 16, 4096)


def test_the_reference_is_the_exact_product_however_it_is_cut(torch, monkeypatch):
    monkeypatch.setattr(numerics_worker, "BLOCK_BYTES", 64 * 8 * 96)
    x, weight, bias = torch.randn(200, 96).bfloat16(), torch.randn(150, 96).bfloat16(), torch.randn(150).bfloat16()
    exact = (x.double() @ weight.double().T + bias.double()).float()
    assert torch.equal(numerics_worker.reference_of(x, weight, bias), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_real_worker_finds_a_processors_products_right(torch, dtype):
    asked = [*PRODUCTS, Product(name="qkv", inner=128, columns=200, bias=True, rows=[3, 65])]
    evidence = real_worker({}, asked, dtype=dtype, device="cpu")
    assert evidence.failed == {}
    assert [(r.product, r.rows, r.columns) for r in evidence.results] == [
        ("o", 1, 80),
        ("o", 70, 80),
        ("qkv", 3, 200),
        ("qkv", 65, 200),
    ]
    assert judge_products(evidence, 50).ok
    assert all(0 < r.worst_error < 5e-3 for r in evidence.results)
