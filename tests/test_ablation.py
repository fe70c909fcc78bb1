"""A model taken apart: what is asked of engines, what comes of it, and the plug-in that does it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import pytest
from test_profile import assert_refused, rewrite, trials, without_stamp
from test_search import World, made

from advisor.core import ablation, memory, specs
from advisor.core.errors import NoHonestAnswer
from advisor.core.intervals import LogMean
from advisor.core.records import Ablation, RawStep, RawTrial, Step
from advisor.core.tried import Tried, slug
from advisor.shell import ablated
from advisor.shell.plugged import plugged_in

# ---------------------------------------------------------------- what is asked, and what comes of it


def manifest(*contexts: int, batch: int = 256):
    asked = specs.asking(made(), batch)
    workload = msgspec.structs.replace(asked.question.workload, isl=max(contexts), osl=1)
    question = msgspec.structs.replace(asked.question, workload=workload)
    return msgspec.structs.replace(
        asked, question=question, ablation=Ablation(contexts=list(contexts), batches=[batch] * len(contexts))
    )


def answered(spec, rate) -> Tried:
    """A trial in which all engines together do `rate(spec, step)` tokens per second."""

    def marks(step):
        each_s = step.tokens * spec.engines / rate(spec, step)
        return [(8 * each_s * number, 8 * number) for number in range(40)]

    raw = RawTrial(
        schema_version=1, spec=spec, created="", ended="completed", detail="", gpu_uuid="", window=(0.0, 15.0),
        engines=[], loads=[], cpu=[], steal_s=None, gpu=None, mps=None, foreign_pids=[], teardown=None, numerics=None,
        timeline=[], steps=[
            RawStep(step=number, engine=engine, tokens=step.tokens, sequences=1, mode="", graphed=True, detail="",
                    refused="", marks=marks(step))
            for number, step in enumerate(spec.steps) for engine in range(spec.engines)
        ],
    )  # fmt: skip
    return Tried(spec=spec, raw=raw, outcome="ok", measurement=None, why="", cautions=[])


SECONDS = {None: 1.0, "mlp": 0.8, "attention": 0.3, "both": 0.1}  # 0.7 of attention, 0.2 of MLPs, 0.1 of both


def rates(spec, step) -> float:
    """Two engines do attention in half of the time, the rest in as much; half a batch takes 0.6 of the time."""
    attention, mlp = 0.7 * (spec.without not in ("attention", "both")), 0.2 * (spec.without not in ("mlp", "both"))
    if spec.engines == 2:
        return 1000 / (attention / 2 + mlp + 0.1)
    half = step.decode == 128
    return 1000 / (attention + mlp + 0.1) * (0.5 / 0.6 if half else 1.0)


def concluded(asked, *, but=lambda spec: False, rate=rates):
    tried = [answered(spec, rate) for spec in ablation.trials(asked) if not but(spec)]
    return ablation.conclude(asked, tried, created="", replayed=False)


def test_one_engine_and_two_under_mps_are_asked_of_the_model_and_of_each_part():
    asked = ablation.trials(manifest(128, 1024, batch=512))
    assert [slug(spec) for spec in asked] == [
        "steps-1-engine-no-mps", "steps-2-engines-mps",
        "steps-1-engine-no-mps-without-mlp", "steps-2-engines-mps-without-mlp",
        "steps-1-engine-no-mps-without-attention", "steps-2-engines-mps-without-attention",
        "steps-1-engine-no-mps-without-both", "steps-2-engines-mps-without-both",
    ]  # fmt: skip
    steps = [(s.decode, s.decode_context, s.prefill, s.prefill_tokens) for s in asked[1].steps]
    assert steps == [(256, 128, 0, 0), (0, 0, 64, 128), (256, 1024, 0, 0), (0, 0, 8, 1024)]
    alone = [(s.decode, s.decode_context) for s in asked[0].steps if s.decode]
    assert alone == [(512, 128), (512, 1024), (256, 128), (256, 1024)]
    assert {spec.settings.max_cudagraph_capture_size for spec in asked} == {512}


def test_a_prompt_longer_than_the_budget_is_read_in_its_middle_and_short_ones_by_as_many_as_may_run():
    base = made().settings
    assert specs.prompt_step(16384, base) == Step(prefill=1, prefill_tokens=8192, prefill_context=4096)
    assert specs.prompt_step(2, base).prefill == base.max_num_seqs


def test_the_expected_gain_is_that_of_the_parts_times_added_up():
    report = concluded(manifest(1024))
    decode = report.steps[0]
    # 1.0 with one engine, 0.35 + 0.2 + 0.1 with two; of the parts 0.8 to 0.45 and 0.3 to 0.3.
    assert decode.whole.gain.value == pytest.approx(1 / 0.65, rel=1e-3)
    assert decode.attention_only.gain.value == pytest.approx(0.8 / 0.45, rel=1e-3)
    assert decode.mlp_only.gain.value == pytest.approx(1.0, rel=1e-3)
    assert decode.closure.value == pytest.approx(1.0, rel=1e-3)
    assert decode.expected.value == pytest.approx(decode.whole.gain.value, rel=1e-3)
    assert decode.expected_over_whole.value == pytest.approx(1.0, rel=1e-3)
    assert decode.expected.source == "predicted" and decode.whole.gain.source == "measured"
    # The mean by shares of the time counts what both have twice.
    share = 0.8 / 1.1
    assert decode.attention_share.value == pytest.approx(100 * share)
    assert decode.weighted_mean.value == pytest.approx(share * 0.8 / 0.45 + (1 - share) * 1.0, rel=1e-3)
    assert [(one.kind, one.context) for one in report.steps] == [("decode", 1024), ("prefill", 1024)]
    assert "1.54× (" in report.sentence and "attention only 1.78× (" in report.sentence


def test_overlap_is_told_from_what_smaller_batches_cost():
    decode, prefill = concluded(manifest(1024)).steps
    assert decode.whole.overlap.value == pytest.approx(1 / 0.65 * 0.6 / 0.5, rel=1e-3)
    assert decode.mlp_only.overlap.value == pytest.approx(0.6 / 0.5, rel=1e-3)
    assert prefill.whole.overlap is None and prefill.whole.gain is not None


def test_the_errors_are_those_of_the_parts_by_their_share():
    rough, sure = LogMean(0.0, 0.1, 10.0), LogMean(0.0, 0.0, 10.0)
    assert ablation._mean([(0.5, rough), (0.5, sure)]).log_se == pytest.approx(0.05)
    assert ablation._mean([(0.1, rough), (0.9, sure)]).log_se == pytest.approx(0.01)
    assert ablation._added(rough, sure, sure).log_se == pytest.approx(0.1)
    assert ablation._added(sure, sure, LogMean(-1.0, 0.0, 10.0)) is None


def test_what_is_missing_is_said_and_the_rest_is_told():
    report = concluded(manifest(1024), but=lambda spec: spec.without == "attention" and spec.engines == 2)
    decode = report.steps[0]
    assert decode.mlp_only.gain is None and decode.mlp_only.why == "several engines: not measured yet"
    assert decode.attention_share is not None and decode.closure is not None and decode.expected is None
    assert decode.whole.gain is not None


def test_steps_for_which_the_gpu_waited_are_no_steps_of_the_gpu_alone():
    asked = manifest(1024)
    tried = [answered(spec, rates) for spec in ablation.trials(asked)]
    rows = [msgspec.structs.replace(row, graphed=False, detail="no room") for row in tried[0].raw.steps]
    tried[0] = msgspec.structs.replace(tried[0], raw=msgspec.structs.replace(tried[0].raw, steps=rows))
    whole = ablation.conclude(asked, tried, created="", replayed=False).steps[0].whole
    assert whole.gain is None and whole.why == "the GPU waited for Python: no room"


def test_of_a_trial_that_was_run_again_the_one_that_worked_counts():
    asked = manifest(1024)
    tried = [answered(spec, rates) for spec in ablation.trials(asked)]
    failed = msgspec.structs.replace(tried[0], outcome="crash", why="it died")
    again = msgspec.structs.replace(tried[0], spec=msgspec.structs.replace(tried[0].spec, repeat=1))
    report = ablation.conclude(asked, [failed, again, *tried[1:]], created="", replayed=False)
    assert report.steps[0].whole.gain is not None and report.warnings == []


def test_the_batch_is_the_largest_that_fits_twice():
    asked = manifest(4096)

    def batch(gib):
        gpu = msgspec.structs.replace(asked.gpu, memory_total_bytes=gib * memory.GIB)
        try:
            return ablation.largest_batches(msgspec.structs.replace(asked, gpu=gpu), [4096], 2)[0]
        except NoHonestAnswer:
            return 0

    found = [batch(gib) for gib in range(10, 142, 2)]
    assert found == sorted(found) and set(found) == {0, 256, 512, 1024}


def test_shorter_contexts_have_larger_batches_and_all_fit_with_the_graphs_of_the_largest():
    asked = manifest(8192)
    gpu = msgspec.structs.replace(asked.gpu, memory_total_bytes=80 * memory.GIB)
    found = ablation.largest_batches(msgspec.structs.replace(asked, gpu=gpu), [128, 4096, 8192], 2)
    assert found == [1024, 1024, 512]
    whole = ablation.trials(
        msgspec.structs.replace(asked, ablation=Ablation(contexts=[128, 4096, 8192], batches=found))
    )
    assert [(step.decode, step.decode_context) for step in whole[1].steps if step.decode] == [
        (512, 128), (512, 4096), (256, 8192),
    ]  # fmt: skip
    assert {spec.settings.max_cudagraph_capture_size for spec in whole} == {1024}


def test_a_batch_that_does_not_fit_at_all_is_refused_with_the_sums():
    asked = manifest(4096)
    gpu = msgspec.structs.replace(asked.gpu, memory_total_bytes=5 * memory.GIB)
    with pytest.raises(NoHonestAnswer, match=r"not even 256 sequences of 4,096 tokens fit into 2 engines: "):
        ablation.largest_batches(msgspec.structs.replace(asked, gpu=gpu), [512, 4096], 2)


# ---------------------------------------------------------------- the plug-in


class Attention:
    def forward(self, positions, hidden_states):
        return hidden_states + positions


class Mlp:
    def forward(self, x):
        return 2 * x


class Layer:
    def __init__(self):
        self.self_attn, self.mlp = Attention(), Mlp()


class Model:
    def __init__(self, *, vllm_config, prefix=""):
        self.layers = [Layer() for _ in range(vllm_config)]

    def modules(self):
        for layer in self.layers:
            yield from (layer, layer.self_attn, layer.mlp)


class Headless(Model):
    def modules(self):
        return iter(())


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM that knows one model."""
    registry = types.SimpleNamespace(models={})
    registry.register_model = registry.models.__setitem__
    registry.models["Plain"] = types.SimpleNamespace(load_model_cls=lambda: Model)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setenv(ablated.BASE, "Plain")
    for name in ablated.PARTS:
        monkeypatch.delitem(ablated.__dict__, name, raising=False)
    yield registry
    for name in ablated.PARTS:
        ablated.__dict__.pop(name, None)


def test_the_plug_in_names_a_model_without_each_part(vllm):
    ablated.register()
    assert {name: vllm.models[name] for name in ablated.PARTS} == {
        "MpsAdvisorWithoutAttention": "advisor.shell.ablated:MpsAdvisorWithoutAttention",
        "MpsAdvisorWithoutMlp": "advisor.shell.ablated:MpsAdvisorWithoutMlp",
        "MpsAdvisorWithoutBoth": "advisor.shell.ablated:MpsAdvisorWithoutBoth",
    }


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [("MpsAdvisorWithoutAttention", 10, 20), ("MpsAdvisorWithoutMlp", 17, 10), ("MpsAdvisorWithoutBoth", 10, 10)],
)
def test_every_layer_passes_by_the_part_and_keeps_the_other(vllm, name, attention, mlp):
    model = getattr(ablated, name)(vllm_config=3)
    assert isinstance(model, Model) and getattr(ablated, name) is type(model)
    for layer in model.layers:
        assert layer.self_attn.forward(positions=7, hidden_states=10) == attention
        assert layer.self_attn.forward(7, 10) == attention
        assert layer.mlp.forward(10) == mlp
        assert isinstance(layer.self_attn, Attention) and isinstance(layer.mlp, Mlp)
    assert Layer().mlp.forward(10) == 20  # other models are left alone


def test_a_model_without_such_layers_is_refused(vllm):
    with pytest.raises(ValueError, match="no layer with “mlp”"):
        ablated.without(Headless, ("mlp",), "Without")(vllm_config=1)


def test_other_names_are_none_of_the_plug_in():
    with pytest.raises(AttributeError):
        ablated.SomethingElse  # noqa: B018


def test_an_engines_python_finds_the_plug_in_as_if_it_were_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    argv, environment = plugged_in(tmp_path / "inside", "mlp", "Qwen2ForCausalLM")
    assert argv[-2:] == ["--hf-overrides", '{"architectures": ["MpsAdvisorWithoutMlp"]}']
    assert environment["VLLM_PLUGINS"] == "lora,mps_advisor_ablated"
    assert environment[ablated.BASE] == "Qwen2ForCausalLM"
    look = (
        "import importlib.metadata as m; (p,) = m.entry_points(group='vllm.general_plugins'); print(p.load().__name__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", look], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    assert found.stdout == "register\n"
    plain, without_plug_in = plugged_in(tmp_path / "plain", None, "Qwen2ForCausalLM")
    assert "--hf-overrides" not in plain and ablated.BASE not in without_plug_in
    assert not list(importlib.metadata.distributions(path=[str(tmp_path / "plain")]))


# ---------------------------------------------------------------- the verb


def ablate(bench, *words: str, **more):
    command = bench.command("ablate", *words)
    return subprocess.run(
        command, env=bench.environment, cwd=bench.directory, capture_output=True, text=True, timeout=110, check=False
    )


def test_a_model_is_taken_apart_live_and_its_replay_says_the_same(bench):
    left = {"MpsAdvisorWithoutMlp": 0.7, "MpsAdvisorWithoutAttention": 0.4, "MpsAdvisorWithoutBoth": 0.1}
    bench.engine_faults({"all": {"steps": {"ms_per_token": 0.02, "left": left}}})
    asked = ("--model", str(bench.tiny), "--ctx", "64", "--vllm", " ".join(bench.vllm))
    live = ablate(bench, *asked, "--out", "run", "--format", "json")
    assert live.returncode == 0, live.stderr
    report = json.loads(live.stdout)
    assert report["ablation"] == {"contexts": [64], "batches": [1024], "engines": 2, "loads": [], "parts": True}
    decode, prefill = report["steps"]
    assert (decode["kind"], prefill["kind"]) == ("decode", "prefill")
    for part, share in (("attention_only", 0.7), ("mlp_only", 0.4)):
        assert decode[part]["step_ms"]["value"] == pytest.approx(share * decode["whole"]["step_ms"]["value"], rel=0.02)
    assert decode["attention_share"]["value"] == pytest.approx(100 * 0.7 / 1.1, rel=0.02)
    assert decode["expected"]["value"] == pytest.approx(2.0, rel=0.02)  # stand-ins share nothing
    assert [path.name.partition("-")[2] for path in trials(bench.directory / "run")] == [
        "steps-1-engine-no-mps.json.gz", "steps-2-engines-mps.json.gz",
        "steps-1-engine-no-mps-without-mlp.json.gz", "steps-2-engines-mps-without-mlp.json.gz",
        "steps-1-engine-no-mps-without-attention.json.gz", "steps-2-engines-mps-without-attention.json.gz",
        "steps-1-engine-no-mps-without-both.json.gz", "steps-2-engines-mps-without-both.json.gz",
    ]  # fmt: skip
    assert (bench.processes(), bench.gpu_processes(), bench.scratch()) == ([], [], [])

    replayed = ablate(bench, "--replay", "run", "--format", "json")
    assert without_stamp(json.loads(replayed.stdout)) == without_stamp(report)
    shown = ablate(bench, "--replay", "run")
    assert shown.returncode == 0 and max(map(len, shown.stdout.splitlines()[2:])) <= 80
    assert "each with its share of the batch" in shown.stdout and "replayed from a recorded run" in shown.stdout

    # Each verb replays its own runs.
    assert_refused(bench.run("--replay", "run"), 3, "ablation", "mps-advisor ablate")
    assert_refused(ablate(bench, "--replay", "run", "--ctx", "128"), 3, "answers another question", "--ctx 64")

    # What a run lacks is missing in its report, and nothing is made up for it.
    for path in trials(bench.directory / "run")[-4:]:
        path.unlink()
    short = json.loads(ablate(bench, "--replay", "run", "--format", "json").stdout)
    assert short["steps"][0]["mlp_only"]["gain"] is None and short["steps"][0]["whole"]["gain"] is not None
    rewrite(trials(bench.directory / "run")[0], lambda raw: raw["steps"][0].update(marks=[]))
    assert ablate(bench, "--replay", "run").returncode == 4


@pytest.mark.parametrize("parts", [True, False])
def test_asynchronous_scheduling_is_turned_off_and_on_under_load(bench, parts):
    slow = [{"tokens_per_s": 1000, "steps": {"ms_per_token": 0.02}}]
    bench.engine_faults({"all": slow})
    asked = ("--model", str(bench.tiny), "--ctx", "64", "--osl", "16", "--vllm", " ".join(bench.vllm))
    live = ablate(bench, *asked, "--async-scheduling", "4,8", "--out", "run", "--format", "json",
                  *([] if parts else ["--no-parts"]))  # fmt: skip
    assert live.returncode == 0, live.stderr
    report = json.loads(live.stdout)
    rows = [(one["concurrency"], one["engines"], one["mps"], one["async_scheduling"]) for one in report["scheduling"]]
    assert rows == [
        (load, engines, engines == 2, on) for load in (4, 8) for engines in (1, 2) for on in (False, True)
    ]  # fmt: skip
    assert all(one["throughput_tok_per_s"]["value"] > 0 and one["e2e_ms"]["p50"] > 0 for one in report["scheduling"])
    # Over one engine without it at the same load, which has no gain over itself.
    gains = {row: one["gain"] for row, one in zip(rows, report["scheduling"], strict=True)}
    assert gains[8, 1, False, False] is None
    assert gains[8, 1, False, True]["value"] == pytest.approx(1.0, abs=0.1)
    assert gains[8, 2, True, False]["value"] == pytest.approx(2.0, abs=0.2)
    manifest = json.loads((bench.directory / "run" / "manifest.json").read_text())
    assert manifest["ablation"]["loads"] == [4, 8]
    shown = ablate(bench, "--replay", "run")
    assert shown.returncode == 0 and "Asynchronous scheduling off and on, under load:" in shown.stdout
    assert max(map(len, shown.stdout.splitlines()[2:])) <= 80
    assert bool(report["steps"]) == parts == ("taken apart" in " ".join(shown.stdout.split()))
    if not parts:
        told = "At 8 requests in flight asynchronous scheduling alone brings one engine"
        assert report["sentence"].startswith(told) and "without it, 2 engines under MPS bring" in report["sentence"]


def test_an_ablation_of_nothing_is_a_malformed_question(bench):
    assert_refused(ablate(bench, "--model", str(bench.tiny), "--ctx", "64", "--no-parts"), 2, "--async-scheduling")


@pytest.mark.parametrize("ctx", ["", "1", "x", "128,", "128:256", "-5"])
def test_a_context_that_is_none_is_a_malformed_question(bench, ctx):
    assert_refused(ablate(bench, "--model", str(bench.tiny), "--ctx", ctx), 2, "--ctx")


def test_a_profile_is_no_ablation(bench):
    run = next(Path(__file__).parents[1].glob("data/h200-*"))
    assert_refused(ablate(bench, "--replay", str(run)), 3, "holds no ablation", "mps-advisor profile")
    assert_refused(ablate(bench, "--replay", "auto"), 2, "--model")


def test_worlds_of_profiles_have_no_ablation():
    assert World(lambda spec: 1.0).profile(max_engines=1).profile is not None
    with pytest.raises(ValueError, match="only a run of `ablate`"):
        ablation.trials(made())
