"""Whether a report may pass: against what was asked of it, and against an earlier report. Pure.

An interval is taken at its word. What lies wholly on the right side of a limit passes, what lies wholly on the wrong
side fails, and what straddles it is undecided: neither a pass nor a failure that noise alone may have brought about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from advisor.core import slo
from advisor.core.advised import advised, named
from advisor.core.errors import DamagedRecord
from advisor.core.records import Candidate, Record, Report, Value
from advisor.core.wording import times

State = Literal["passed", "failed", "undecided"]
Verdict = Literal["passed", "failed", "undecided", "not_comparable"]
EXIT_CODES: dict[Verdict, int] = {"passed": 0, "failed": 1, "not_comparable": 3, "undecided": 4}

# What a later report may lose where nobody says how much: with rates known to ±2 % an unchanged engine nearly always
# passes it.
DEFAULT_MAX_REGRESSION = 0.05
# Cores that differ by more than this are worth a word: the same host's differ by 7 % within an hour
# (docs/measurement.md).
CORES_DIFFER = 1.25
MOST_TOLD = 4  # of the figures in which two reports differ


class Asked(Record, frozen=True):
    """What has to hold. `expect` as `read_expected` gives it; shares as 0.05; `slo` in ms; `allow` names differences.

    None and empty: not asked. `max_regression` and `allow` mean nothing without a baseline.
    """

    expect: dict[str, int | bool | None]
    min_gain: float | None
    max_regression: float
    slo: dict[str, float]
    allow: list[str]


class Check(Record, frozen=True):
    """One thing that was asked, what was seen, and what that makes it. `value`: the figure that decided, where one
    did.
    """

    name: str
    state: State
    asked: str
    seen: str
    value: Value | None = None


class Difference(Record, frozen=True):
    """One respect in which two reports were not measured alike, as each of them has it."""

    name: str
    report: str
    baseline: str
    allowed: bool


class Gate(Record, frozen=True):
    """The verdict of a gate with everything that led to it. `notes` decide nothing."""

    verdict: Verdict
    exit_code: int
    checks: list[Check]
    differences: list[Difference]
    notes: list[str]


# ---------------------------------------------------------------- what is asked


def read_expected(text: str) -> dict[str, int | bool | None]:
    """“engines=2,mps=true,thread_percentage=none” as {"engines": 2, "mps": True, "thread_percentage": None}.

    Raises ValueError that says what is expected.
    """
    found: dict[str, int | bool | None] = {}
    for word in text.split(","):
        name, _, told = (part.strip().lower() for part in word.partition("="))
        if name in found:
            raise ValueError(f"{name} is given twice")
        number = int(told) if re.fullmatch(r"[0-9]{1,4}", told) else None
        if name == "engines" and number:
            found[name] = number
        elif name == "mps" and told in ("true", "false"):
            found[name] = told == "true"
        elif name == "thread_percentage" and (told == "none" or (number and number <= 100)):
            found[name] = number
        else:
            raise ValueError(
                f"“{word.strip()}” is nothing that can be expected; engines=2, mps=true or mps=false, and "
                "thread_percentage=50 or thread_percentage=none can"
            )
    return found


def read_allowed(words: Sequence[str]) -> list[str]:
    """Names of differences, each word one or several with commas. Raises ValueError that lists those there are."""
    names = [name.strip() for word in words for name in word.split(",")]
    for name in names:
        if name not in DIFFERENCES:
            raise ValueError(f"“{name}” is no difference that can be allowed; {', '.join(DIFFERENCES)} are")
    return names


# ---------------------------------------------------------------- the verdict


def judge(report: Report, baseline: Report | None, asked: Asked) -> Gate:
    """Every check that is asked for, always all of them, so that a dashboard sees the same ones every time.

    Raises DamagedRecord where a report recommends what is not among its candidates.
    """
    found = [] if baseline is None else differences(report, baseline, asked.allow)
    alike = all(one.allowed for one in found)
    chosen = _advised(report, "the report")
    before = None if baseline is None else _advised(baseline, "the baseline")
    checks = [_verdict("verdict", report, chosen)]
    if baseline is not None:
        checks = [_comparable(found), *checks, _verdict("baseline verdict", baseline, before)]
    checks += [_expected(name, wanted, chosen) for name, wanted in asked.expect.items()]
    if asked.min_gain is not None:
        checks.append(_min_gain(report, chosen, 1.0 + asked.min_gain))
    if baseline is not None:
        checks.append(_max_regression(report, chosen, before, 1.0 - asked.max_regression, alike))
    checks += [_objective(name, limit, report, chosen) for name, limit in asked.slo.items()]
    states = {one.state for one in checks}
    verdict: Verdict = "failed" if "failed" in states else "undecided" if "undecided" in states else "passed"
    if not alike:
        verdict = "not_comparable"
    return Gate(
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        checks=checks,
        differences=found,
        notes=[] if baseline is None else list(_notes(report, baseline, chosen, before)),
    )


def _advised(report: Report, which: str) -> Candidate | None:
    chosen = advised(report)
    if chosen is None and report.recommendation.status == "recommend":
        raise DamagedRecord(
            f"{which} recommends {named(report.recommendation)}, which is not among its candidates; "
            "take an undamaged copy or measure again"
        )
    return chosen


NOTHING_ADVISED = "nothing is recommended"


def _verdict(name: str, report: Report, chosen: Candidate | None) -> Check:
    if chosen is not None:
        return Check(name=name, state="passed", asked="a recommendation", seen=named(chosen))
    advice = report.recommendation
    seen = f"{advice.status}: {advice.sentence}".rstrip(": ")
    return Check(name=name, state="undecided", asked="a recommendation", seen=seen)


def _comparable(found: Sequence[Difference]) -> Check:
    asked = f"the same {', '.join(DIFFERENCES)}"
    told = [f"{one.name}{' (allowed)' if one.allowed else ''}: {one.report} against {one.baseline}" for one in found]
    state: State = "passed" if all(one.allowed for one in found) else "undecided"
    return Check(name="comparable", state=state, asked=asked, seen="; ".join(told) or "no difference")


def _expected(name: str, wanted: int | bool | None, chosen: Candidate | None) -> Check:
    def check(state: State, seen: str) -> Check:
        return Check(name=f"expect {name}", state=state, asked=_word(wanted), seen=seen)

    if chosen is None:
        return check("undecided", NOTHING_ADVISED)
    if name == "thread_percentage":
        each = sorted(set(chosen.thread_percentages or []))
        same = each == ([] if wanted is None else [wanted])
        return check("passed" if same else "failed", "/".join(map(str, each)) or _word(None))
    seen: int | bool = chosen.engines if name == "engines" else chosen.mps
    return check("passed" if seen == wanted else "failed", _word(seen))


def _word(value: int | bool | None) -> str:
    return "none" if value is None else str(value).lower()


def _min_gain(report: Report, chosen: Candidate | None, threshold: float) -> Check:
    """What MPS brings over the best without it, lower bound included: that it does has to be shown."""
    gained = chosen.gain_vs_best_without_mps if chosen is not None and chosen.mps else None

    def check(state: State, seen: str) -> Check:
        asked = f"at least {_factor(threshold)} where MPS is advised, lower bound included"
        return Check(name="min-gain", state=state, asked=asked, seen=seen, value=gained)

    if chosen is None:
        return check("undecided", NOTHING_ADVISED)
    if not chosen.mps:
        return check("passed", "MPS is not advised, so it has nothing to bring")
    if gained is None and report.question.slo:
        return check("passed", "nothing without MPS keeps to the report's objectives, so there is no gain to compare")
    if gained is None:
        return check("undecided", "the report has no gain over the best without MPS")
    if gained.low is None:
        return check("undecided", f"{gained.value:.3g}× without an interval")
    if gained.low >= threshold:
        return check("passed", times(gained, threshold))
    short = "not shown to reach it" if gained.value >= threshold else "less"
    return check("failed", f"{times(gained, threshold)}: {short}")


def _factor(value: float) -> str:
    """“1.10×”, with as many digits as it was asked with."""
    return f"{value:.2f}×" if abs(round(value, 2) - value) < 1e-9 else f"{value:.5g}×"


def _max_regression(report: Report, one: Candidate | None, base: Candidate | None, least: float, alike: bool) -> Check:
    """Whether no more throughput is lost than allowed. A loss counts when the whole interval of the ratio shows it; a
    pass takes as much. In between nothing is claimed.
    """
    found = ratio(one, base) if one is not None and base is not None and alike else None

    def check(state: State, seen: str) -> Check:
        asked = f"at least {_factor(least)} the baseline's throughput"
        return Check(name="max-regression", state=state, asked=asked, seen=seen, value=found)

    if one is None or base is None:
        return check("undecided", NOTHING_ADVISED + ("" if one is None else " by the baseline"))
    if not alike:
        return check("undecided", "the reports are not comparable")
    if found is None:
        return check("undecided", "a throughput is missing or not above zero")
    if found.low is None or found.high is None:
        return check("undecided", f"{found.value:.3g}× without an interval")
    rates = " against ".join(
        f"{told.throughput_tok_per_s.value:,.0f}" for told in (one, base) if told.throughput_tok_per_s
    )
    unit = "prompts/s" if report.workload.kind == "prefill" else "tokens/s"
    seen = f"{times(found, least)}, {rates} {unit}"
    if found.low >= least:
        return check("passed", seen)
    if found.high < least:
        return check("failed", seen)
    return check("undecided", f"{seen}: too uncertain to tell")


def _objective(name: str, limit: float, report: Report, chosen: Candidate | None) -> Check:
    """One latency of what is recommended. Percentiles come without an interval, and are taken as they are."""

    def check(state: State, seen: str) -> Check:
        return Check(name=f"slo {name}", state=state, asked=slo.shown({name: limit}), seen=seen)

    if chosen is None:
        return check("undecided", NOTHING_ADVISED)
    share, _ = slo.worst(chosen, {name: limit})
    seen = f"{slo.told(chosen, name)} with {chosen.concurrency or report.workload.concurrency} in flight"
    if math.isinf(share):
        return check("undecided", seen)
    return check("passed" if share <= 1.0 else "failed", seen)


def ratio(one: Candidate, base: Candidate) -> Value | None:
    """How many times the base's throughput, with a 90 % interval; None where one of them is missing or not positive.

    The intervals of both are symmetric on logarithms; so is that of the ratio, and half of it is the root of the sum
    of the squares of their halves. That holds for independent errors and equal degrees of freedom, and is a little too
    wide for others (see `intervals.log_ratio`, which has what a report does not keep). The same measurement is not
    compared with itself as if it were two: then the ratio is exactly 1.
    """
    if one == base and one.throughput_tok_per_s is not None:
        return Value(value=1.0, low=1.0, high=1.0)
    a, b = one.throughput_tok_per_s, base.throughput_tok_per_s
    if a is None or b is None or a.value <= 0 or b.value <= 0 or not 0 < a.value / b.value < math.inf:
        return None
    middle, halves = a.value / b.value, (_half(a), _half(b))
    if None in halves or (half := math.hypot(*(one for one in halves if one is not None))) > _WIDEST:
        return Value(value=middle)
    return Value(value=middle, low=middle * math.exp(-half), high=middle * math.exp(half))


# Beyond a factor of a billion an interval says nothing, and its ends would soon be no numbers.
_WIDEST = math.log(1e9)


def _half(rate: Value) -> float | None:
    """Half of a rate's interval on logarithms, None where it has none that makes sense."""
    if rate.low is None or rate.high is None or not 0 < rate.low <= rate.value <= rate.high:
        return None
    return (math.log(rate.high) - math.log(rate.low)) / 2


# ---------------------------------------------------------------- whether two reports may be compared


def _shape(report: Report) -> dict[str, object]:
    facts = report.model
    told: dict[str, object] = {"name": facts.name, "architecture": facts.architecture, "weights": facts.weights}
    sizes = (
        "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size", "tied_embeddings",
        "qkv_bias",
    )  # fmt: skip
    return told | {name.replace("_", " "): getattr(facts, name) for name in sizes}


def _gpu(report: Report) -> dict[str, object]:
    gpu = report.gpu
    limit = None if gpu.power_limit_w is None else f"{gpu.power_limit_w:g} W"
    return {"name": gpu.name, "SMs": gpu.sms, "power limit": limit, "MIG": gpu.mig}


def _vllm(report: Report) -> dict[str, object]:
    software = report.software
    return {"vLLM": software.vllm, "torch": software.torch, **software.environment}


def _precision(report: Report) -> dict[str, object]:
    model = report.model
    return {"dtype": model.dtype, "quantization": model.quantization or "none", "KV cache": model.kv_cache_dtype}


def _workload(report: Report) -> dict[str, object]:
    load = report.workload
    return {
        "kind": load.kind,
        "prompt tokens": _between(load.isl, load.isl_range),
        "output tokens": _between(load.osl, load.osl_range),
        "output spread": load.osl_spread,
        "in flight": load.concurrency,
        "temperature": load.temperature,
        "prompts": load.prompts,
    }


def _between(mean: int, ends: tuple[int, int] | None) -> str:
    return f"{ends[0]}:{ends[1]}" if ends else str(mean)


# What two reports have to have in common, by the names that --allow knows. Objectives are among them, because they
# decide at which load a candidate's throughput is quoted.
DIFFERENCES: dict[str, Callable[[Report], Mapping[str, object]]] = {
    "model": _shape,
    "gpu": _gpu,
    "driver": lambda report: {"version": report.gpu.driver},
    "vllm": _vllm,
    "precision": _precision,
    "workload": _workload,
    "slo": lambda report: {"objectives": slo.shown(report.question.slo) or "none"},
}


def differences(report: Report, baseline: Report, allow: Sequence[str]) -> list[Difference]:
    """In what two reports were not measured alike, the differing figures of each side by side."""
    found = []
    for name, facts in DIFFERENCES.items():
        mine, theirs = facts(report), facts(baseline)
        keys = dict.fromkeys([*mine, *theirs])
        apart = [key for key in keys if mine.get(key) != theirs.get(key) or (key in mine) != (key in theirs)]
        if apart:
            told = [
                _few([f"{key} {_shown(side[key]) if key in side else 'not set'}" for key in apart])
                for side in (mine, theirs)
            ]
            found.append(Difference(name=name, report=told[0], baseline=told[1], allowed=name in allow))
    return found


def _shown(value: object) -> str:
    if value is None:
        return "unknown"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _notes(report: Report, baseline: Report, one: Candidate | None, base: Candidate | None) -> Iterator[str]:
    """What does not forbid a comparison, and may explain it."""
    if one is not None and base is not None and named(one) != named(base):
        yield f"The advice has changed: {named(one)}; the baseline's was {named(base)}."
    here, there = report.host, baseline.host
    if (here.cpu, len(here.cores)) != (there.cpu, len(there.cores)):
        yield (
            f"Another host: {len(here.cores)} cores of {here.cpu}; the baseline had {len(there.cores)} of {there.cpu}. "
            "What waits for the CPU changes with it."
        )
    speeds = (report.core_s, baseline.core_s)
    if speeds[0] and speeds[1] and max(speeds[0] / speeds[1], speeds[1] / speeds[0]) > CORES_DIFFER:
        yield (
            f"Cores of another speed: {speeds[0] * 1000:.1f} ms for the same work; the baseline's took "
            f"{speeds[1] * 1000:.1f} ms. What waits for the CPU changes with them."
        )
    rules, theirs = report.protocol, baseline.protocol
    apart = [key for key in rules.__struct_fields__ if getattr(rules, key) != getattr(theirs, key)]
    if apart:
        yield f"Measured by other rules than the baseline: {_few(apart)}."


def _few(words: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(words) - MOST_TOLD
    return ", ".join(words[:MOST_TOLD]) + (f" and {more} more" if more > 0 else "")
