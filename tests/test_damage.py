"""Damaged records: an error that names file and field, never a traceback and never a verdict.

Of every mutation two things are known beforehand: whether the value could have been measured (then any report is fair),
and whether it could not (then there must be none). `pytest tests/test_damage.py --mutations 10000` runs many.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import raw as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advisor import flow
from advisor.core import damage, tried
from advisor.core.errors import AdvisorError
from advisor.core.numerics import judge_products
from advisor.core.records import ACCIDENTS, NumericsResult, RawNumerics, RawTrial
from advisor.report.as_json import dumps
from advisor.shell.replay import Replay
from advisor.shell.store import RunFolder

ROOT = Path(__file__).parent.parent
RUNS = sorted(path.parent for path in (ROOT / "data").glob("*/manifest.json"))
STUDIES = sorted(path.parent for path in (ROOT / "data" / "studies").glob("*/manifest.json"))
SMALL = ROOT / "data" / "h200-qwen2.5-3b-serve-1024-faster-host"
# Of the same question, on another host: its trials fit by everything but the GPU.
NEIGHBOUR = ROOT / "data" / "h200-qwen2.5-3b-serve-1024"

# ---------------------------------------------------------------- a run in memory, and on disk as often as wanted

Json = Any
Steps = tuple[str | int, ...]


def documents(folder: Path) -> dict[str, Json]:
    """Every file of a run, decoded, by its name."""
    found = {"manifest.json": json.loads((folder / "manifest.json").read_text())}
    for path in sorted((folder / "trials").glob("*.json.gz")):
        found[f"trials/{path.name}"] = json.loads(gzip.decompress(path.read_bytes()))
    return found


def write(folder: Path, name: str, document: Json) -> None:
    text = json.dumps(document).encode()
    (folder / name).write_bytes(text if name == "manifest.json" else gzip.compress(text, compresslevel=1))


def places(node: Json, steps: Steps = ()) -> Iterator[Steps]:
    """Where every value of a document is."""
    for step, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*steps, step)
        yield from places(inner, (*steps, step))


def at(document: Json, steps: Steps) -> Json:
    for step in steps:
        document = document[step]
    return document


def verdict(folder: Path) -> tuple[str, str]:
    """What a replay says: the report's status, or the error's class, and its text. Anything else is a traceback."""
    try:
        run = RunFolder(folder)
        report = flow.profile(run.manifest(), Replay(run), created="now", replayed=True)
        dumps(report)
    except AdvisorError as error:
        assert "\n" not in str(error)
        return type(error).__name__, str(error)
    return report.recommendation.status, report.recommendation.sentence


@pytest.mark.parametrize("folder", [*RUNS, *STUDIES], ids=lambda path: path.name)
def test_nothing_that_was_ever_recorded_is_called_damaged(folder: Path):
    run = RunFolder(folder)
    assert list(damage.of_manifest(run.manifest())) == []
    assert run.own()
    assert all(damage.kept(raw) is raw for raw in run.trials())


# ---------------------------------------------------------------- mutations

HUGE = [1e30, 10**30, 1e18, -1e30]
# Where an extreme is a fair value: a signal's exit code, a quotation, a number that only names something.
FREE = re.compile(r"exit_code|config|seed|throttle_reasons|worst_error|^schema_version$")


def wrong_for(value: Json, chooser: random.Random) -> Json:
    """A value of another type than this one, and than None."""
    others: list[Json] = [True, "x", ["x"], {"x": 1}]
    if isinstance(value, bool):
        others = [17, "x", ["x"], {"x": 1}]
    elif isinstance(value, str):
        others = [17, True, ["x"], {"x": 1}]
    elif isinstance(value, list):
        others = [17, "x", True, {"x": 1}]
    elif isinstance(value, dict):
        others = [17, "x", True, ["x"]]
    return chooser.choice(others)


def mutate(document: Json, chooser: random.Random) -> tuple[str, Steps, bool]:
    """Change one thing in a document. Returns what, where, and whether no measurement can have given it."""
    every = list(places(document))
    numbers = [steps for steps in every if is_number(at(document, steps))]

    def any_of(found: list[Steps]) -> Steps:
        """A field first, then one of its places: lists have thousands of them, and would be all that is hit."""
        fields: dict[tuple[str, ...], list[Steps]] = {}
        for steps in found:
            fields.setdefault(
                tuple("*" if str(step).lstrip("-").isdigit() else str(step) for step in steps), []
            ).append(steps)
        return chooser.choice(fields[chooser.choice(sorted(fields))])

    kind = chooser.choice(["negative", "huge", "infinite", "NaN", "type", "missing", "unknown", "backwards", "null",
                           "plausible"])  # fmt: skip
    if kind in ("negative", "huge", "infinite", "NaN", "plausible"):
        steps = any_of(numbers)
        value = at(document, steps)
        name = ".".join(map(str, steps))
        free = bool(FREE.search(name)) or "prompt_logprobs" in name
        new = {
            "negative": -abs(value) - 1,
            "huge": chooser.choice(HUGE),
            "infinite": chooser.choice([math.inf, -math.inf]),
            "NaN": math.nan,
            "plausible": value * chooser.choice([0, 0.5, 2, 10]) if isinstance(value, float) else value + 1,
        }[kind]
        put(document, steps, new)
        return kind, steps, kind in ("infinite", "NaN") or (kind != "plausible" and not free)
    if kind == "backwards":
        rising = [steps for steps in every if steps[-1] in ("at_s", "gpm_at_s", "timeline", "marks", "window")]
        rising = [steps for steps in rising if isinstance(at(document, steps), list) and len(at(document, steps)) > 1]
        if rising:
            steps = any_of(rising)
            at(document, steps).reverse()
            return kind, steps, True
        kind = "type"
    steps = any_of(every)
    holder, value = at(document, steps[:-1]), at(document, steps)
    free = "config" in steps
    if kind == "type":
        put(document, steps, wrong_for(value, chooser))
        return kind, steps, not free and value is not None
    if kind == "null":
        put(document, steps, None)
        return kind, steps, False  # many fields may be unknown
    if kind == "unknown" and isinstance(holder, dict):
        holder["never heard of"] = 1
        return kind, (*steps[:-1], "never heard of"), False  # in a free-form mapping it may stand
    del holder[steps[-1]]
    return "missing", steps, False  # what has a default may be missing


def is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def put(document: Json, steps: Steps, value: Json) -> None:
    at(document, steps[:-1])[steps[-1]] = value


class Bench:
    """A copy of a run in which one file at a time is damaged."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.whole, self.folder = documents(source), folder
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("report.json"))
        self.kept = {name: (folder / name).read_bytes() for name in self.whole}
        self.status, self.sentence = verdict(folder)
        self.seen: Counter[tuple[str, str]] = Counter()

    def try_one(self, seed: int) -> None:
        chooser = random.Random(seed)
        name = chooser.choice(list(self.whole))
        document = copy.deepcopy(self.whole[name])
        kind, steps, never = mutate(document, chooser)
        write(self.folder, name, document)
        try:
            status, text = verdict(self.folder)
        finally:
            (self.folder / name).write_bytes(self.kept[name])
        self.seen[kind, status] += 1
        where = f"seed {seed}: {kind} at {name} $.{'.'.join(map(str, steps))}"
        if never:
            assert status in ("DamagedRecord", "Unfit"), f"{where} gave {status}: {text}"
            assert name in text, f"{where} is not named: {text}"
        elif status in ("recommend", "inconclusive"):
            # A value that could have been measured, or a gap that older records have: any verdict is the evidence's.
            assert text
        else:
            assert status in ("DamagedRecord", "Unfit", "NotRecorded"), f"{where} gave {status}: {text}"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(SMALL, tmp_path_factory.mktemp("damaged") / "run")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_no_damage_gives_a_traceback_or_a_verdict(bench: Bench, seed: int):
    bench.try_one(seed)


@pytest.mark.timeout(0)
def test_no_damage_of_as_many_as_are_wanted_does(bench: Bench, request: pytest.FixtureRequest):
    count = request.config.getoption("--mutations")
    if not count:
        pytest.skip("--mutations N tries so many")
    for seed in range(count):
        bench.try_one(seed)
    told = Counter(status for _, status in bench.seen.elements())
    print(f"{count} mutations:", dict(told))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_was_cut_off_anywhere_is_named_and_gives_no_verdict(bench: Bench, data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(bench.kept)))
    length = data.draw(st.integers(0, len(bench.kept[name]) - 2))
    damaged(bench, name, bench.kept[name][:length])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_of_a_trial_is_named_and_gives_no_verdict(bench: Bench, data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(name for name in bench.kept if name != "manifest.json")))
    whole = bytearray(bench.kept[name])
    # A gzip file's first bytes say when and where it was made; nothing else is without meaning.
    place = data.draw(st.integers(10, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    damaged(bench, name, bytes(whole))


def damaged(bench: Bench, name: str, content: bytes) -> str:
    (bench.folder / name).write_bytes(content)
    try:
        status, text = verdict(bench.folder)
    finally:
        (bench.folder / name).write_bytes(bench.kept[name])
    assert (status, str(bench.folder / name) in text) == ("DamagedRecord", True), (status, text)
    return text


# ---------------------------------------------------------------- what one sees of it


def changed(bench: Bench, name: str, steps: Steps, value: Json) -> str:
    document = copy.deepcopy(bench.whole[name])
    put(document, steps, value)
    text = json.dumps(document).encode()
    return damaged(bench, name, text if name == "manifest.json" else gzip.compress(text))


FIRST = "trials/000-1-engine-no-mps.json.gz"


@pytest.mark.parametrize(
    ("name", "steps", "value", "field"),
    [
        (FIRST, ("loads", 0, "tokens", 9), -1.0, "$.loads[0].tokens[9] is -1.0"),
        (FIRST, ("loads", 0, "tokens", 9), 1e30, "$.loads[0].tokens[9] is 1e+30, beyond anything that can be measured"),
        (FIRST, ("loads", 0, "tokens", 9), "many", "`$.loads[0].tokens[9]`"),
        (FIRST, ("loads", 0, "tokens", 9), None, "`$.loads[0].tokens[9]`"),
        (FIRST, ("loads", 0, "completed"), 3, "$.loads[0].completed is 3, its bins hold "),
        (FIRST, ("loads", 0, "output_tokens"), 3, "$.loads[0].output_tokens is 3, its bins hold "),
        (FIRST, ("loads", 0, "bin_s"), 0.2, "$.loads[0].bin_s is 0.2, but 0.1 was asked for"),
        (FIRST, ("loads", 0, "e2e", "counts"), {"1": 10**6}, "$.loads[0].e2e holds 1000000 durations"),
        (FIRST, ("engines", 0, "prompt_logprobs", 0, 0), 0.5, "$.engines[0].prompt_logprobs holds a log-probability"),
        (FIRST, ("engines", 0, "counters_end", "steps_by_tokens"), {"1": 5.0, "8": 3.0}, "steps_by_tokens falls"),
        (FIRST, ("engines", 0, "counters_end", "at_s"), 1.0, "$.engines[0].counters_end: its counters run backwards"),
        (FIRST, ("timeline", 0, "end_s"), 9999.0, "$.timeline[1] (check) starts at "),
        (FIRST, ("gpu", "at_s", 5), 0.0, "$.gpu.at_s[5] is 0.0, before the sample that it follows"),
        (FIRST, ("gpu", "energy_end_j"), 1.0, "$.gpu.energy_end_j is 1.0, less than at the start"),
        (FIRST, ("spec", "engines"), 0, "$.spec.engines is 0"),
        (FIRST, ("spec", "workload", "concurrency"), 0, "$.spec.workload.concurrency is 0"),
        (FIRST, ("spec", "engines"), 2, "its `$.spec` is of a trial “2-engines-no-mps”"),
        (FIRST, ("spec", "protocol", "unsteady_log"), 9.0, "$.spec.protocol.unsteady_log is 9.0, in the run"),
        (FIRST, ("gpu_uuid",), "GPU-other", "is not of this run: `$.gpu_uuid is GPU-other, but the run was "),
        (FIRST, ("spec", "load_cores"), [10**5], "name cores that the run's machine has not (100000)"),
        ("manifest.json", ("host", "cores"), [], "$.host.cores is empty"),
        ("manifest.json", ("model", "layers"), 0, "$.model.layers is 0; 1 or more is expected"),
        ("manifest.json", ("question", "workload", "isl_range"), [9, 3], "$.question.workload.isl_range is (9, 3)"),
        ("manifest.json", ("protocol", "curve"), [2.0], "$.protocol.curve is [2.0]"),
        ("manifest.json", ("schema_version",), 0, "schema_version is 0"),
    ],
)  # fmt: skip
def test_the_error_names_file_and_field(bench: Bench, name: str, steps: Steps, value: Json, field: str):
    assert field in changed(bench, name, steps, value)


def test_a_trial_of_another_machine_among_a_runs_own_is_refused(bench: Bench):
    """It has the right question, model and candidate: everything but the machine."""
    stray = sorted((NEIGHBOUR / "trials").glob("*-2-engines-mps.json.gz"))[0]
    own = next(name for name in bench.kept if name.endswith("-2-engines-mps.json.gz"))
    assert "gpu_uuid is GPU-" in damaged(bench, own, stray.read_bytes())
    beside = bench.folder / "trials" / f"900-{stray.name[4:]}"
    beside.write_bytes(stray.read_bytes())
    try:
        status, text = verdict(bench.folder)
    finally:
        beside.unlink()
    assert status == "DamagedRecord" and str(beside) in text and "hold the same trial" in text


def test_a_trial_that_is_there_twice_is_refused_by_both_names(bench: Bench):
    again = bench.folder / FIRST.replace("000-", "901-")
    again.write_bytes(bench.kept[FIRST])
    try:
        status, text = verdict(bench.folder)
    finally:
        again.unlink()
    assert status == "DamagedRecord" and again.name in text and Path(FIRST).name in text


def test_what_was_never_finished_is_no_damage(bench: Bench):
    left = bench.folder / "trials" / f".{Path(FIRST).name}.4711.tmp"
    left.write_bytes(bench.kept[FIRST][:100])
    try:
        assert verdict(bench.folder) == (bench.status, bench.sentence)
    finally:
        left.unlink()


# ---------------------------------------------------------------- what is measured and cannot be true


TRIAL = made.trial(1, mps=False)


def test_nonsense_that_a_driver_answers_is_not_put_on_record_and_the_trial_may_be_tried_again():
    gpu = msgspec.structs.replace(TRIAL.gpu, power_w=[math.nan, *TRIAL.gpu.power_w[1:]])
    kept = damage.kept(msgspec.structs.replace(TRIAL, gpu=gpu))
    assert (kept.ended, kept.gpu, kept.window, kept.loads) == ("refused", None, None, [])
    assert kept.detail == "the evidence cannot be true: gpu.power_w[0] is nan"
    judged = tried.judge(kept)
    assert (judged.outcome, judged.why) == ("invalid", kept.detail)
    assert judged.outcome in ACCIDENTS
    assert list(damage.of_trial(kept)) == []
    assert msgspec.json.decode(msgspec.json.encode(kept), type=RawTrial) == kept


def test_what_is_bad_but_true_stays_on_record_for_validity_to_judge():
    load, engine = TRIAL.loads[0], TRIAL.engines[0]
    # Requests that were cut off in mid-answer, or failed there: the server never told how many tokens they had.
    none = msgspec.structs.replace(load.e2e, counts={})
    cut_off = msgspec.structs.replace(load, completed=0, completions=[0] * len(load.tokens), output_tokens=0, e2e=none)
    failed = msgspec.structs.replace(cut_off, failed=cut_off.sent)
    # A server that did not answer when the window began, and did when it ended.
    once = msgspec.structs.replace(engine, counters_start=engine.counters_end, counters_end=None)
    # A bit for every reason, as NVML has one for reasons that it does not know.
    gpu = msgspec.structs.replace(TRIAL.gpu, throttle_reasons=[1 << 63] * len(TRIAL.gpu.at_s))
    for change in ({"loads": [cut_off]}, {"loads": [failed]}, {"engines": [once]}, {"gpu": gpu}):
        assert list(damage.of_trial(msgspec.structs.replace(TRIAL, **change))) == []


def test_how_a_trial_failed_stays_known_though_its_evidence_goes():
    failed = msgspec.structs.replace(TRIAL, ended="crash", detail="engine 0 died", steal_s=-1.0)
    kept = damage.kept(failed)
    assert (kept.ended, kept.detail, kept.steal_s) == ("crash", "engine 0 died", None)
    assert [engine.log_tail for engine in kept.engines] == [engine.log_tail for engine in TRIAL.engines]


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_whatever_cannot_be_true_goes(bad):
    stages = [msgspec.structs.replace(TRIAL.timeline[0], end_s=bad), *TRIAL.timeline[1:]]
    kept = damage.kept(msgspec.structs.replace(TRIAL, timeline=stages))
    assert (kept.ended, kept.timeline, list(damage.of_trial(kept))) == ("refused", [], [])


@pytest.mark.parametrize("error", [-1.0, math.nan, -math.inf])
def test_a_product_with_an_error_that_is_none_is_never_approved(error):
    right = NumericsResult(
        percentage=50, sms=66, product="qkv", rows=1, columns=64, inner=64, worst_error=error, unstable=False
    )
    raw = RawNumerics(results=[right], failed={}, seconds=1.0)
    assert not judge_products(raw, 50, sms_total=132).ok
