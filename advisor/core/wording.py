"""The verdict and its reasons in words, made only of figures that stand in the candidates. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.core import slo, tuning
from advisor.core.candidates import Field
from advisor.core.records import ACCIDENTS, Candidate, EngineSettings, Figure, Overlap, Profile, StepProfile, Value
from advisor.core.tuning import GPU_BUSY_IDLE_PCT


def name(field: Field, one: Candidate) -> str:
    """A candidate in words, with what sets its settings apart from those that every candidate has."""
    told, kept, default = one.settings, field.outline.tuned, field.manifest.settings
    if one.engines == 1:
        text = "1 engine"
        if told is not None and tuning.bare(told) != tuning.bare(default):
            text = "1 tuned engine" if tuning.bare(told) == tuning.bare(kept) else f"1 engine{_with(told, default)}"
    else:
        usual = _share(field, field.outline.several, one.engines)
        text = f"{one.engines} engines{_with(told, usual) if told is not None else ''}"
    if one.mps:
        text += " under MPS"
        if one.thread_percentages:
            text += f" at {one.thread_percentages[0]} % of the threads each"
    elif one.engines > 1:
        text += " without MPS"
    return text


def _with(told: EngineSettings, base: EngineSettings) -> str:
    words = tuning.words(told, base)
    return f" with {', '.join(words)}" if words else ""


def times(gain: Value | Figure | None, against: float | None = None) -> str:
    """“1.19× (1.16 to 1.22)”; with more digits where two would hide on which side of `against` it lies."""
    if gain is None:
        return "–"
    edges = [edge for edge in (gain.value, gain.low, gain.high) if edge is not None]
    near = against is not None and any(f"{edge:.2f}" == f"{against:.2f}" for edge in edges)
    digits = 3 if near else 2
    if gain.low is None or gain.high is None:
        return f"{gain.value:.{digits}f}×"
    return f"{gain.value:.{digits}f}× ({gain.low:.{digits}f} to {gain.high:.{digits}f})"


def rate(one: Candidate) -> float:
    """Output tokens per second, 0.0 where there are none."""
    return one.throughput_tok_per_s.value if one.throughput_tok_per_s else 0.0


def unit(field: Field) -> str:
    """What throughput counts: with one token out, a token is a prompt."""
    return "prompts/s" if field.manifest.question.workload.kind == "prefill" else "tokens/s"


def best_under_mps(ok: Sequence[Candidate]) -> Candidate | None:
    """The fastest of several engines under MPS; one engine under MPS shows what MPS costs, and is no rival."""
    return max((one for one in ok if one.mps and one.engines > 1), key=rate, default=None)


def sentence(field: Field, choice: Candidate, ok: Sequence[Candidate], threshold: float) -> str:
    """What to run, and what that brings over the other ways to run."""
    objectives = field.manifest.question.slo
    kept = f"To keep to {slo.shown(objectives)}: " if objectives else ""
    load = f" with {choice.concurrency} in flight" if objectives else ""
    tuned = field.tuned is not None and field.tuned is not field.default
    over = [_over(choice.gain_vs_default, "the default engine" if tuned else "one engine")]
    if tuned and choice.engines > 1:
        over.append(_over(choice.gain_vs_tuned, "the tuned one"))
    if choice.mps:
        if field.best_without is not None:
            over.append(f"{times(choice.gain_vs_best_without_mps, threshold)} without MPS")
        share = (
            f"{choice.thread_percentages[0]} % of the threads each"
            if choice.thread_percentages
            else "no thread percentage"
        )
        several = f"{choice.engines} engines{_changed(field, choice)} under MPS"
        return f"{kept}Run {several}, {share}{load}: {_list(over)}.{_missed(field, choice)}"
    rival = best_under_mps(ok)
    against = ""
    if rival is not None:
        gained = rival.gain_vs_best_without_mps
        short = gained is not None and gained.value >= threshold
        against = f" MPS brings {times(gained, threshold)} at best" + (
            f", which is not shown to reach {threshold:.2f}×." if short else f"; {threshold:.2f}× is asked."
        )
    if choice.engines > 1:
        brings = f"{_list(over)}.{_missed(field, choice)}"
        return f"{kept}Run {choice.engines} engines{_changed(field, choice)} without MPS{load}: {brings}{against}"
    what = name(field, choice)
    brings = "" if what == "1 engine" else f": {_list(over)}"
    untried = "" if rival is not None else " Several engines under MPS were not measured."
    return f"{kept}Run {what}{load}, leave MPS alone{brings}.{against}{untried}"


def _over(gain: Value | None, what: str) -> str:
    return "" if gain is None else f"{times(gain)} {what}"


def _list(parts: Sequence[str]) -> str:
    return ", ".join(part for part in parts if part) or "nothing else keeps to it"


def _missed(field: Field, choice: Candidate) -> str:
    if choice.gain_vs_default is None:
        return " The default engine keeps to it at no load that was measured."
    return ""


def rival_missing(field: Field, choice: Candidate, candidates: Sequence[Candidate]) -> str:
    """A note for the sentence when as many engines without MPS could not be measured."""
    for one in candidates:
        same = one.engines == choice.engines and not one.mps and one.outcome in ACCIDENTS
        if same and choice.mps:
            return f" {name(field, one)} could not be measured ({one.outcome.replace('_', ' ')})."
    return ""


def tied(field: Field, one: Candidate, gained: Value) -> str:
    """Why something that may be faster is not advised."""
    return f"{name(field, one)}: {times(gained)} of that, not told apart by single starts; the simpler is advised."


def because(
    field: Field,
    choice: Candidate,
    ok: Sequence[Candidate],
    threshold: float,
    single: Candidate | None,
    best_without: Candidate | None,
) -> list[str]:
    """The reasons for the choice. `single` is the best single engine, `best_without` what MPS is compared with."""
    reasons = []
    rival = best_under_mps(ok)
    if choice.mps and best_without is not None:
        reasons.append(
            f"{name(field, choice)}: {rate(choice):,.0f} {unit(field)}; the best without MPS is "
            f"{name(field, best_without)} with {rate(best_without):,.0f}."
        )
        if best_without.engines > 1 and best_without.gain_vs_default is not None:
            needs = f"only {best_without.engines} engines{_changed(field, best_without)}"
            reasons.append(f"Of the gain over one engine, {times(best_without.gain_vs_default)} needs no MPS, {needs}.")
    elif rival is not None and best_without is not None:
        gain = rival.gain_vs_best_without_mps
        reached = gain is not None and gain.value >= threshold
        reasons.append(
            f"{name(field, rival)} gives {times(gain, threshold)} the best without MPS, {name(field, best_without)}"
            + (", and its lower bound stays" if reached else "; that is")
            + f" under {threshold:.2f}×."
        )
    if field.tuned is not None and field.default is not None and field.tuned.settings and field.default.settings:
        changes = tuning.words(field.tuned.settings, field.default.settings)
        kept = f"Tuned: {', '.join(changes)}{_for_one_only(field, choice, changes)}."
        reasons.append(kept if changes else "No setting brought 3 % beyond noise.")
    if single is not None:
        reasons += _why(single)
    base = field.tuned or field.default
    alone = next((one for one in field.all if one.ok and one.mps and one.engines == 1), None)
    if alone is not None and base is not None and (gained := field.gain(alone, base)) is not None:
        reasons.append(f"MPS itself, with one engine: {times(gained)} the same engine without it.")
    return reasons


def _why(single: Candidate) -> list[str]:
    """What the GPU waits for with one engine, which is what others can fill."""
    idle, stall = single.gpu_idle_pct, single.cpu_stall_pct
    if idle is None:
        return []
    if idle < GPU_BUSY_IDLE_PCT:
        told = f"One engine leaves the GPU idle for {idle:.0f} % only"
        return [f"{told}: others can fill that, and gain or lose by sharing it."]
    if stall is None or stall < 1:
        return [f"One engine leaves the GPU idle for {idle:.0f} %, which others may fill, with or without MPS."]
    return [
        f"One engine leaves the GPU idle for {idle:.0f} %, at least {stall:.0f} % while its own CPU threads work: "
        "others fill that, with or without MPS."
    ]


def of_the_gpu(profile: Profile) -> list[str]:
    """What the GPU's work alone says of a gain: whether kernels overlap, and what is the host's."""
    reasons = [_overlapping(one) for one in profile.overlaps]
    reasons += [_step(what, one) for what, one in (("decode", profile.decode), ("prefill", profile.prefill)) if one]
    return [reason for reason in reasons if reason]


def _overlapping(one: Overlap) -> str:
    what = f"{one.engines} engines {'under' if one.mps else 'without'} MPS"
    if one.thread_percentage is not None:
        what += f" at {one.thread_percentage} % of the threads each"
    shared, host = times(one.overlap), one.host and times(one.host)
    low, high = one.overlap.low or 0.0, one.overlap.high or 0.0
    begin = f"By the GPU's work alone {what} reach {shared} of what one engine does"
    if low > 1.0:
        told = f"{begin}: their kernels overlap."
    elif high >= 1.0:
        told = f"{begin}: no gain that could be told."
    else:
        told = f"{begin}: smaller batches cost more than overlap brings."
    if host is None:
        return told
    # Steps of one sort run on all engines at once: prefill beside decode is not in it.
    if one.busy is None or one.rest is None:
        return f"{told} The rest of the gain, the host's with phases that overlap, is {host}."
    return (
        f"{told} The rest of the gain is {host}: the GPU is busy {times(one.busy)} as long; {times(one.rest)} is "
        "neither, for steps under load are not those alone."
    )


def _step(what: str, one: StepProfile) -> str:
    """Where a step's time goes: attention and MLP, and how near their ceilings they are."""
    told = []
    for label, said in (("attention", "attention"), ("mlp", "the MLP")):
        part = one.kernels.get(label)
        if part is not None:
            near = "" if part.of_roofline is None else f", at {part.of_roofline.value:.0f} % of its roofline"
            told.append(f"{said} {part.share.value:.0f} %{near}")
    if not told:
        return ""
    return f"One engine's {what} step takes the GPU {one.step_ms.value:.2f} ms: {'; '.join(told)}."


def _changed(field: Field, one: Candidate) -> str:
    """What sets several engines apart from as many default ones; empty where nothing does."""
    usual = _share(field, field.manifest.settings, one.engines)
    return "" if one.settings is None else _with(one.settings, usual)


def _share(field: Field, base: EngineSettings, engines: int) -> EngineSettings:
    return tuning.for_share(base, field.manifest.settings, field.outline.concurrency, engines)


def _for_one_only(field: Field, choice: Candidate, changes: Sequence[str]) -> str:
    """A note where what is advised does not have these changes of the default engine."""
    outline, default = field.outline, field.manifest.settings
    if choice.settings is None or set(changes) <= set(tuning.words(choice.settings, default)):
        return ""
    if choice.engines == 1:
        gained = field.gain(field.tuned, field.default) if field.tuned else None
        why = "it misses the objectives" if gained is None else f"{times(gained)} in later starts"
        return f"; {why}, and so it is not advised"
    tuned, several = (_share(field, base, 2) for base in (outline.tuned, outline.several))
    who = "two" if outline.shown_by == 2 else str(outline.shown_by)
    measured = "" if tuned == several else f"; {who} were not 3 % faster for it beyond noise"
    return f" for one engine{measured}"
