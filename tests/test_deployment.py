"""What a deployment consists of, and what MPS costs: pure, from the shipped reports."""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core import cores
from advisor.core.deployment import Asked, commands, cost_of_mps, deployment, environment, slug
from advisor.core.errors import BadQuestion, NoHonestAnswer, Unfit
from advisor.core.memory import weights_bytes
from advisor.report.as_json import loads

DATA = Path(__file__).parent.parent / "data"
FOUR = loads((DATA / "h200-qwen2.5-0.5b-serve-1024-call-2" / "report.json").read_bytes(), "report.json")
ONE = loads((DATA / "h200-qwen2.5-3b-serve-1024-call-2" / "report.json").read_bytes(), "report.json")
TARGETS = ("shell", "systemd", "compose", "kubernetes")


def changed(report, **fields):
    return msgspec.structs.replace(report, recommendation=msgspec.structs.replace(report.recommendation, **fields))


def named(report, name):
    return msgspec.structs.replace(report, model=msgspec.structs.replace(report.model, name=name))


@pytest.mark.parametrize("report", [FOUR, ONE], ids=["four", "one"])
def test_the_commands_of_a_shipped_report_are_what_the_same_report_still_gives(report):
    plain = [sorted(shlex.split(line)) for line in report.recommendation.commands]
    assert [sorted(shlex.split(line)) for line in commands(report, report.recommendation)] == plain
    assert environment(report, report.recommendation) == report.recommendation.environment


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("report", [FOUR, ONE], ids=["four", "one"])
def test_every_target_starts_engines_with_the_flags_and_cores_of_the_recommendation(report, target):
    made = deployment(report, Asked(target=target))
    shown = [shlex.split(line) for line in report.recommendation.commands if " vllm serve " in f" {line} "]
    assert len(made.engines) == report.recommendation.engines == len(shown)
    for engine, line in zip(made.engines, shown, strict=True):
        flags = line[line.index("--max-num-batched-tokens") :]
        assert engine.arguments[-len(flags) :] == flags
        assert engine.arguments[:2] == ["serve", report.model.name]
        assert ",".join(map(str, engine.cores)) == line[line.index("-c") + 1]


@pytest.mark.parametrize("target", TARGETS)
def test_every_engine_under_mps_has_its_percentage_and_the_way_to_the_daemon(target):
    made = deployment(FOUR, Asked(target=target))
    assert made.daemon is not None
    for engine in made.engines:
        assert engine.environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
        assert engine.environment["CUDA_MPS_PIPE_DIRECTORY"] == made.daemon.pipe_directory
    # The longest socket name has 20 bytes, a path 107.
    assert len(made.daemon.pipe_directory) < 80


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_without_mps_is_kept_from_every_daemon(target):
    made = deployment(ONE, Asked(target=target))
    assert made.daemon is None and made.cost_of_mps == []
    assert made.engines[0].environment["CUDA_MPS_PIPE_DIRECTORY"].endswith("/empty")


@pytest.mark.parametrize("port", [80, 8000, 9123])
@pytest.mark.parametrize("target", TARGETS)
def test_clients_use_one_port_whether_there_is_a_balancer_or_not(target, port):
    several, single = (deployment(report, Asked(target=target, port=port)) for report in (FOUR, ONE))
    assert several.balancer is not None and several.balancer.port == port == several.port
    assert port not in [engine.port for engine in several.engines]
    assert len({engine.port for engine in several.engines}) == 4
    assert all(engine.port >= 1024 for engine in several.engines)
    assert single.balancer is None and single.engines[0].port == port == single.port


def test_engines_behind_a_balancer_are_not_open_to_others():
    made = deployment(FOUR, Asked(target="shell", host="0.0.0.0"))
    assert made.host == "0.0.0.0"
    assert all(engine.arguments[2:4] == ["--host", "127.0.0.1"] for engine in made.engines)


def test_the_balancer_has_cores_that_no_engine_has():
    made = deployment(FOUR, Asked(target="shell"))
    assert made.balancer is not None and made.balancer.cores
    assert not set(made.balancer.cores) & {core for engine in made.engines for core in engine.cores}
    assert made.balancer.cores == cores.plan(FOUR.host.cores, 4).load_cores


def test_weights_elsewhere_are_still_asked_for_by_the_models_name():
    made = deployment(FOUR, Asked(target="shell", model="/srv/my weights"))
    assert made.engines[0].arguments[:4] == ["serve", "/srv/my weights", "--served-model-name", "Qwen/Qwen2.5-0.5B"]
    assert not any("random values" in note for note in made.notes)


def test_a_container_finds_a_folder_of_its_host_at_one_place():
    for target in ("compose", "kubernetes"):
        made = deployment(FOUR, Asked(target=target, model="/srv/w"))
        assert made.engines[0].arguments[1] == "/model" and made.loaded == "/srv/w"


def test_a_pod_is_told_no_gpu_because_the_cluster_chooses_it():
    made = deployment(FOUR, Asked(target="kubernetes"))
    assert "CUDA_VISIBLE_DEVICES" not in made.engines[0].environment
    assert made.daemon is not None and "CUDA_VISIBLE_DEVICES" not in made.daemon.environment


def test_another_gpu_reaches_daemon_and_engines_alike():
    made = deployment(FOUR, Asked(target="shell", gpu="GPU-other"))
    assert made.daemon is not None
    told = [made.daemon.environment, *(engine.environment for engine in made.engines)]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in told} == {"GPU-other"} and made.gpu == "GPU-other"


@pytest.mark.parametrize("status", ["inconclusive", "infeasible", "no_slo"])
def test_what_is_not_recommended_is_not_deployed(status):
    with pytest.raises(NoHonestAnswer, match=status):
        deployment(changed(FOUR, status=status), Asked(target="shell"))


@pytest.mark.parametrize(
    "asked",
    [
        Asked(target="shell", port=0),
        Asked(target="shell", port=65536),
        Asked(target="shell", port=65533),
        Asked(target="shell", host="a b"),
        Asked(target="shell", host="x;reboot"),
        Asked(target="shell", gpu="GPU-1 2"),
        Asked(target="shell", gpu="$(reboot)"),
        Asked(target="shell", model=""),
        Asked(target="shell", model="a\nb"),
        Asked(target="shell", model="--trust-remote-code"),
        Asked(target="kubernetes", host="0.0.0.0"),
        Asked(target="kubernetes", gpu="0"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked):
    with pytest.raises(BadQuestion):
        deployment(FOUR, asked)


def test_a_report_whose_model_has_no_printable_name_is_refused():
    with pytest.raises(Unfit, match="printable"):
        deployment(named(FOUR, "a\x1b[2Jb"), Asked(target="shell"))


@given(st.text(max_size=80))
def test_a_slug_is_a_name_that_containers_and_services_take(name):
    made = slug(name)
    assert 1 <= len(made) <= 40 and made[0].isalpha() and made[-1].isalnum()
    assert all(letter in "abcdefghijklmnopqrstuvwxyz0123456789-" for letter in made)


def test_the_costs_of_mps_are_there_with_the_memory_of_the_copies():
    told = " ".join(cost_of_mps(FOUR.model, FOUR.recommendation))
    for words in ("daemon", "without MPS and says nothing", "server dies", "No isolation", "load balancer"):
        assert words in told
    assert "prefix cache is split 4 ways" in told
    each = weights_bytes(FOUR.model) / 2**30
    assert f"{each:.1f} GiB each: {4 * each:.1f} GiB" in told


def test_without_mps_there_is_nothing_that_it_costs():
    assert cost_of_mps(ONE.model, ONE.recommendation) == []


def test_no_cache_no_split_cache_and_no_sum_where_the_weights_size_is_not_known():
    settings = msgspec.structs.replace(FOUR.recommendation.settings, enable_prefix_caching=False)
    model = msgspec.structs.replace(FOUR.model, quantization="awq")
    told = " ".join(cost_of_mps(model, changed(FOUR, settings=settings).recommendation))
    assert "prefix cache" not in told and "4 copies of the weights" in told and "GiB" not in told
