"""What the reader of a whole run must know, beyond what each trial says of itself. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from advisor.core.candidates import Field
from advisor.core.cautions import caution, teardown_cautions
from advisor.core.estimate import ASSUMED, ratio_of_windows
from advisor.core.measure import load_s_per_piece
from advisor.core.records import ACCIDENTS, Caution, EngineSettings
from advisor.core.tried import Tried, slug

# Two starts of the same engines differ by less on a machine that stays as it is.
DRIFT_MAX = 0.05
# Load generators that need so much more for the same work ran on slower cores.
SLOWER = 1.05
# Mean range of 2, 3, … normal values, in standard deviations (Tippett 1925).
_RANGES = (1.128, 1.693, 2.059, 2.326, 2.534, 2.704, 2.847)
# A 99 % interval is about so much wider than a 90 % one; several candidates are looked at, and none may cry wolf.
CERTAIN = 1.6


def cautions(field: Field, tried: Sequence[Tried], advised: EngineSettings | None) -> list[Caution]:
    """Every caution of a trial once, with the trials it was seen in; then those of the run and of what is advised."""
    return [
        *_of_trials(tried),
        *_not_measured(field, tried),
        *_repeated(field),
        *_mixed(tried),
        *_single_starts(field),
        *_drift(field),
        *_settings(field, advised),
    ]


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


def _not_measured(field: Field, tried: Sequence[Tried]) -> Iterator[Caution]:
    for one in field.all:
        if not one.starts and one.outcome in ACCIDENTS:
            yield caution(
                "not_measured",
                f"{slug(one.shown.spec)} could not be measured ({one.outcome.replace('_', ' ')}); the verdict was "
                "reached without it.",
            )
    for trial in tried:
        if trial.spec.kind == "steps" and not trial.ok:
            yield caution(
                "not_measured",
                f"{slug(trial.spec)} could not be measured ({trial.why or trial.outcome.replace('_', ' ')}); what the "
                "GPU alone gives stays unknown, and no verdict rests on it.",
            )


def _repeated(field: Field) -> Iterator[Caution]:
    for contender in field.all:
        for index, one in enumerate(contender.attempts):
            if one.ok or (not contender.starts and index == len(contender.attempts) - 1):
                continue
            again = index < len(contender.attempts) - 1
            yield caution(
                "repeated" if again else "start_failed",
                f"{slug(one.spec)} {'was run once more' if again else 'did not repeat what its first start did'}: "
                f"{one.why or one.outcome}",
            )


def _mixed(tried: Sequence[Tried]) -> Iterator[Caution]:
    """Whether rates of forked and of started engines differ was not measured, so nobody should have to find out."""
    forked = [all(engine.forked for engine in one.raw.engines) for one in tried if one.ok and one.raw.engines]
    if any(forked) and not all(forked):
        yield caution(
            "mixed_starts",
            f"In {sum(forked)} of {len(forked)} trials engines were forked, in the others started; rates may differ.",
        )


def _single_starts(field: Field) -> Iterator[Caution]:
    """Nobody may take intervals that rest on other machines' starts for measured ones."""
    if field.manifest.protocol.quick:
        shares = ", ".join(f"{100 * math.sqrt(one.variance.variance):.1f} %" for one in ASSUMED)
        bounds = " and ".join(f"{one.idle_pct:.0f} %" for one in ASSUMED[:-1])
        yield caution(
            "single_starts",
            f"Every candidate was started once, and no baseline closes the run. Intervals assume that starts differ as "
            f"they did in recorded runs: by {shares} where the GPU idles for at most {bounds} and for more.",
        )


def _drift(field: Field) -> Iterator[Caution]:
    """The same engines, started again: what differs beyond what their own windows vary is the machine."""
    for one in field.all:
        seen = [start for start in one.starts if start.measurement is not None]
        if len(seen) < 2:
            continue
        low, high = min(seen, key=lambda start: start.rate), max(seen, key=lambda start: start.rate)
        assert low.measurement is not None and high.measurement is not None
        ratio = ratio_of_windows(high.measurement, low.measurement)
        # The range of several is wider than the difference of two.
        wider = _RANGES[min(len(seen), len(_RANGES) + 1) - 2] / _RANGES[0]
        sure = CERTAIN * wider * math.log((ratio.high or math.inf) / ratio.value)
        if math.log(ratio.value) > max(DRIFT_MAX, sure):
            yield caution(
                "drift",
                f"{len(seen)} starts of {slug(one.starts[0].spec)} gave {low.rate:,.0f} to {high.rate:,.0f} tokens/s: "
                f"the machine changed in between{_slower(low, high)}.",
            )


def _slower(low: Tried, high: Tried) -> str:
    """Whether the host's cores were slower when the rate was lower, as the load generators show it."""
    spent, usual = load_s_per_piece(low.raw), load_s_per_piece(high.raw)
    if spent is None or not usual or spent < SLOWER * usual:
        return ""
    return (
        f" (for the same work its load generators, on cores of their own, needed {spent / usual - 1:.0%} more CPU time "
        "at the lowest)"
    )


def _settings(field: Field, advised: EngineSettings | None) -> Iterator[Caution]:
    if advised is not None and advised.stream_interval > 1:
        yield caution(
            "coarse_stream",
            f"What is advised sends {advised.stream_interval} tokens at a time, so that text arrives in pieces.",
        )
    if advised is not None and advised.rust_front_end:
        yield caution(
            "young_front_end",
            "What is advised uses vLLM's Rust front end, which knows not all of vLLM's options.",
        )
    if field.manifest.model.weights == "dummy":
        yield caution(
            "dummy_weights", "Weights are dummies of the right shape: speed is measured, the texts mean nothing."
        )
