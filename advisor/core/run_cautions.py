"""What the reader of a whole run must know, beyond what each trial says of itself. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from advisor.core import validity
from advisor.core.candidates import Field
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
        unproven = validity.teardown_cautions(one.raw, proven) if one.measurement is not None else ()
        for caution in (*one.cautions, *unproven):
            seen.setdefault((caution.code, caution.remedy), (caution, []))[1].append(slug(one.spec))
    for caution, where in seen.values():
        more = f" (and {len(where) - 1} more trials)" if len(where) > 1 else ""
        yield Caution(code=caution.code, text=f"{where[0]}{more}: {caution.text}", remedy=caution.remedy)


def _not_measured(field: Field) -> Iterator[Caution]:
    for one in field.all:
        if not one.starts and one.outcome in _ACCIDENTS:
            yield Caution(
                code="not_measured",
                text=f"{slug(one.shown.spec)} could not be measured ({one.outcome.replace('_', ' ')}); the verdict was "
                "reached without it.",
                remedy="Look at why, then measure again with another --out.",
            )


def _repeated(field: Field) -> Iterator[Caution]:
    for contender in field.all:
        for one in contender.attempts[:-1]:
            if one.outcome in _ACCIDENTS:
                yield Caution(
                    code="repeated",
                    text=f"{slug(one.spec)} was run once more: {one.why}",
                    remedy="Nothing, when it stays a rarity; else keep other work off this machine.",
                )


def _drift(field: Field) -> Iterator[Caution]:
    """The same engines, started again: what changed in between is the machine."""
    for one in field.all:
        rates = [quoted_rate(Start(start.measurement, start.chooses)) for start in one.starts if start.measurement]
        if len(rates) > 1 and abs(math.log(rates[-1] / rates[0])) > DRIFT_MAX:
            yield Caution(
                code="drift",
                text=f"{slug(one.shown.spec)}: its first start gave {rates[0]:,.0f} tokens/s, its last "
                f"{rates[-1]:,.0f} ({rates[-1] / rates[0] - 1:+.0%}); the machine changed in between.",
                remedy="Keep other work off this machine and its host, then measure again.",
            )


def _settings(field: Field) -> Iterator[Caution]:
    kept = field.tuned
    if kept is not None and kept.settings is not None and kept.settings.stream_interval > 1:
        yield Caution(
            code="coarse_stream",
            text=f"The tuned engine sends {kept.settings.stream_interval} tokens at a time, so that text arrives in "
            "pieces.",
            remedy="If single tokens have to arrive as they are made, set an objective for ITL (--slo itl_p95=…).",
        )
    if field.manifest.model.weights == "dummy":
        yield Caution(
            code="dummy_weights",
            text="Weights are dummies of the right shape: speed is measured, the texts mean nothing.",
            remedy="Download the model first to measure with its own weights and tokenizer.",
        )
