"""What the reader of a whole run must know, beyond what each trial says of itself. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from advisor.core.candidates import Field
from advisor.core.cautions import caution, teardown_cautions
from advisor.core.estimate import Start, quoted_rate
from advisor.core.records import Caution
from advisor.core.tried import Tried, slug

# Two starts of the same engines differ by less on a machine that stays as it is.
DRIFT_MAX = 0.05
_ACCIDENTS = ("crash", "timeout", "invalid", "not_attached")


def cautions(field: Field, tried: Sequence[Tried]) -> list[Caution]:
    """Every caution of a trial once, with the trials it was seen in; then those of the run."""
    return [*_of_trials(tried), *_not_measured(field), *_repeated(field), *_drift(field), *_settings(field)]


def _of_trials(tried: Sequence[Tried]) -> Iterator[Caution]:
    seen: dict[tuple[str, str], tuple[Caution, list[str]]] = {}
    # One teardown ends all windows of a start, and stands in the last of them.
    proven = {one.raw.started for one in tried if one.raw.teardown is not None and one.raw.started is not None}
    for one in tried:
        unproven = teardown_cautions(one.raw, proven) if one.measurement is not None else ()
        for told in (*one.cautions, *unproven):
            seen.setdefault((told.code, told.remedy), (told, []))[1].append(slug(one.spec))
    for told, where in seen.values():
        others = len(where) - 1
        more = f" (and {others} more trial{'s' if others > 1 else ''})" if others else ""
        yield msgspec.structs.replace(told, text=f"{where[0]}{more}: {told.text}")


def _not_measured(field: Field) -> Iterator[Caution]:
    for one in field.all:
        if not one.starts and one.outcome in _ACCIDENTS:
            yield caution(
                "not_measured",
                f"{slug(one.shown.spec)} could not be measured ({one.outcome.replace('_', ' ')}); the verdict was "
                "reached without it.",
            )


def _repeated(field: Field) -> Iterator[Caution]:
    for contender in field.all:
        for one in contender.attempts[:-1]:
            if one.outcome in _ACCIDENTS:
                yield caution("repeated", f"{slug(one.spec)} was run once more: {one.why}")


def _drift(field: Field) -> Iterator[Caution]:
    """The same engines, started again: what changed in between is the machine."""
    for one in field.all:
        rates = [quoted_rate(Start(start.measurement, start.chooses)) for start in one.starts if start.measurement]
        if len(rates) > 1 and abs(math.log(rates[-1] / rates[0])) > DRIFT_MAX:
            yield caution(
                "drift",
                f"{slug(one.shown.spec)}: its first start gave {rates[0]:,.0f} tokens/s, its last {rates[-1]:,.0f} "
                f"({rates[-1] / rates[0] - 1:+.0%}); the machine changed in between.",
            )


def _settings(field: Field) -> Iterator[Caution]:
    kept = field.tuned
    if kept is not None and kept.settings is not None and kept.settings.stream_interval > 1:
        yield caution(
            "coarse_stream",
            f"The tuned engine sends {kept.settings.stream_interval} tokens at a time, so that text arrives in pieces.",
        )
    if kept is not None and kept.settings is not None and kept.settings.rust_front_end:
        yield caution(
            "young_front_end",
            "The tuned engine uses vLLM's Rust front end, which knows not all of vLLM's options.",
        )
    if field.manifest.model.weights == "dummy":
        yield caution(
            "dummy_weights", "Weights are dummies of the right shape: speed is measured, the texts mean nothing."
        )
