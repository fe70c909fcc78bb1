"""A trial after judgement: what it says, and whether it may count."""

from __future__ import annotations

import msgspec

from advisor.core import cautions, measure, validity
from advisor.core.records import Caution, Measurement, Outcome, RawTrial, Record, TrialSpec
from advisor.core.tuning import bare


class Tried(Record, frozen=True):
    """Of a load trial `measurement` is there exactly when `outcome` is "ok"; otherwise `why` says what happened."""

    spec: TrialSpec
    raw: RawTrial
    outcome: Outcome
    measurement: Measurement | None
    why: str
    cautions: list[Caution]

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def rate(self) -> float:
        """Output tokens per second, 0.0 for a trial that does not count (for ordering only)."""
        return self.measurement.throughput_tok_per_s.value if self.measurement else 0.0


def judge(raw: RawTrial) -> Tried:
    """Judge one raw trial. Pure: the same evidence always gives the same verdict."""
    if raw.spec.kind == "numerics":
        ended_well = raw.ended == "completed" and raw.numerics is not None
        outcome: Outcome = "ok" if ended_well else _outcome_of_ending(raw)
        return Tried(spec=raw.spec, raw=raw, outcome=outcome, measurement=None, why=raw.detail, cautions=[])
    faults = validity.judge(raw)
    if not faults and raw.spec.kind == "steps":
        return Tried(spec=raw.spec, raw=raw, outcome="ok", measurement=None, why="", cautions=[])
    if not faults:
        measurement = measure.measure(raw)
        told = cautions.cautions(raw, measurement)
        return Tried(spec=raw.spec, raw=raw, outcome="ok", measurement=measurement, why="", cautions=told)
    outcome = _outcome_of_ending(raw)
    if outcome == "invalid" and any(fault.code == "not_attached" for fault in faults):
        outcome = "not_attached"
    why = raw.detail if outcome in ("oom", "crash", "timeout") and raw.detail else "; ".join(f.text for f in faults[:3])
    return Tried(spec=raw.spec, raw=raw, outcome=outcome, measurement=None, why=why, cautions=[])


def _outcome_of_ending(raw: RawTrial) -> Outcome:
    match raw.ended:
        case "oom" | "crash" | "timeout" | "not_attached":
            return raw.ended
        case _:
            return "invalid"


def slug(spec: TrialSpec) -> str:
    """A short name of a trial, for file names and for the report."""
    if spec.kind == "numerics":
        return "numerics"
    parts = ["steps"] if spec.kind == "steps" else []
    parts += [f"{spec.engines}-engine" + ("s" if spec.engines > 1 else ""), "mps" if spec.mps else "no-mps"]
    if spec.thread_percentage is not None:
        parts.append(f"{spec.thread_percentage}pct")
    if spec.idle_engines:
        parts.append(f"of-{spec.engines + spec.idle_engines}")
    if spec.without is not None:
        parts.append(f"without-{spec.without}")
    if spec.label:
        parts.append(spec.label)
    if spec.repeat:
        parts.append(f"repeat-{spec.repeat}")
    return "-".join(parts)


def candidate(spec: TrialSpec) -> str:
    """The identity of a candidate: what `key` says, whatever the start, the load and the engines that rest beside."""
    workload = None if spec.workload is None else msgspec.structs.replace(spec.workload, concurrency=0)
    return key(msgspec.structs.replace(spec, repeat=0, workload=workload, idle_engines=0))


def is_retry(spec: TrialSpec, last: Tried) -> bool:
    """Whether a spec asks for the same as the last trial, which failed, once more."""
    return not last.ok and first_key(spec) == first_key(last.spec)


def first_key(spec: TrialSpec) -> str:
    """What all starts of the same trial have in common: the key of its first one."""
    return key(msgspec.structs.replace(spec, repeat=0))


def key(spec: TrialSpec) -> str:
    """The identity of a trial inside one run, as canonical JSON.

    Memory shares, core lists, checked batch sizes and the protocol follow from the run's manifest and are not part
    of it, so that a recorded run can still be replayed after a rule for one of them was improved. What was really
    used stands in the recorded spec, and that is what a report shows.
    """
    settings = None if spec.settings is None else bare(spec.settings)
    same = msgspec.structs.replace(
        spec, settings=settings, protocol=None, engine_cores=[], load_cores=[], batch_sizes=[], label=""
    )
    return msgspec.json.encode(same, order="sorted").decode()
