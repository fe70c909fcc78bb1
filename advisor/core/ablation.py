"""A model taken apart: what attention alone and MLPs alone gain from several engines, on the GPU alone. Pure.

What several engines reach of one has two reasons: each has a smaller batch, and their kernels may overlap. So one
engine also decodes such a share of the batch. If nothing but the parts counts, their times add up to the model's, with
one engine and with several, and that lets expect a gain (see `records.AblatedStep`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from advisor.core import memory, scheduling, specs, tuning
from advisor.core.cautions import caution
from advisor.core.errors import NoHonestAnswer
from advisor.core.intervals import LogMean, Variance, add, figure_of, log_ratio
from advisor.core.overlap import StepRate, step_rate
from advisor.core.records import (
    SCHEMA_VERSION,
    AblatedStep,
    Ablation,
    AblationReport,
    EngineSettings,
    Figure,
    Manifest,
    Part,
    Step,
    TrialSpec,
    Variant,
)
from advisor.core.tried import Tried, first_key, key, slug
from advisor.core.wording import times

BATCHES = (1024, 512, 256)
# The whole model first: a failure there is about the machine, not about a part.
VARIANTS: tuple[Part | None, ...] = (None, "mlp", "attention", "both")
STEP_S = 2.0
NOTHING = "Nothing could be compared: see the warnings."

Kind = Literal["decode", "prefill"]
KINDS: tuple[Kind, ...] = ("decode", "prefill")


def largest_batches(manifest: Manifest, contexts: Sequence[int], engines: int) -> list[int]:
    """For each context the largest of 1024, 512 and 256 sequences that one engine holds, and so many engines their
    shares of, all with graphs up to the largest of these. Raises NoHonestAnswer with the sums where not even the
    smallest fits.
    """
    for most in BATCHES:
        asked, base = specs.asking(manifest, most), _settings(manifest, most)
        plans = {count: specs.memory_plan(asked, count, base) for count in (1, engines)}
        fitting = [
            max((batch for batch in BATCHES if batch <= most and _hold(plans, batch, manifest, context)), default=0)
            for context in contexts
        ]
        # Graphs for a batch that no context has would only take memory from the others.
        if all(fitting) and max(fitting) == most:
            return fitting
    short = max(context for context, batch in zip(contexts, fitting, strict=True) if not batch)
    raise NoHonestAnswer(
        f"not even {BATCHES[-1]} sequences of {short:,} tokens fit into {engines} engines: "
        + memory.explain(plans[engines])
    )


def _hold(plans: Mapping[int, memory.MemoryPlan], batch: int, manifest: Manifest, context: int) -> bool:
    """Whether each of so many engines holds its share of a batch, for all of these plans."""
    each = (memory.whole_blocks(context) + memory.BLOCK_TOKENS) * memory.kv_bytes_per_token(manifest.model)
    return all(
        planned.kv_bytes is not None and planned.kv_bytes >= -(-batch // engines) * each
        for engines, planned in plans.items()
    )


def largest(asked: Ablation) -> int:
    """The most sequences that any of its engines holds at once."""
    return max(asked.batches or asked.loads)


def _settings(manifest: Manifest, batch: int) -> EngineSettings:
    """Graphs up to the batch, for all of the model's variants and numbers of engines alike."""
    return tuning.for_batch(manifest.settings, batch)


def trials(manifest: Manifest) -> list[TrialSpec]:
    """One engine without MPS and several under it, of the whole model and of each part."""
    asked = manifest.ablation
    if asked is None:
        raise ValueError("only a run of `ablate` takes a model apart")
    base = _settings(manifest, largest(asked))
    found = []
    for without in VARIANTS if asked.parts else ():
        for engines, mps in ((1, False), (asked.engines, True)):
            one = specs.load_spec(manifest, engines, mps=mps, base=base)
            found.append(
                msgspec.structs.replace(
                    one,
                    kind="steps",
                    label="",
                    steps=list(_steps(asked, engines, base)),
                    step_s=STEP_S,
                    without=without,
                )
            )
    return found


def _steps(asked: Ablation, engines: int, base: EngineSettings) -> Iterator[Step]:
    """Of several engines each decodes its share of the batch; one engine decodes all of it, and then such a share."""
    for context, batch in zip(asked.contexts, asked.batches, strict=True):
        yield _decode(context, batch, engines)
        yield specs.prompt_step(context, base)
    if engines == 1:
        for context, batch in zip(asked.contexts, asked.batches, strict=True):
            yield _decode(context, batch, asked.engines)


def _decode(context: int, batch: int, engines: int) -> Step:
    """What one of so many engines decodes of the batch."""
    return Step(decode=batch // engines, decode_context=context)


class _Seen(NamedTuple):
    """A variant in one step: its time with one engine, rates on logarithms; or why these are not known."""

    step_ms: float | None = None
    one: LogMean | None = None  # tokens per second of one engine
    several: LogMean | None = None  # of several together
    share: LogMean | None = None  # of one engine with the share of one of them, if that is another step
    why: str = ""

    @property
    def gain(self) -> LogMean | None:
        return None if self.one is None or self.several is None else log_ratio(self.several, self.one)

    @property
    def told(self) -> Variant:
        overlap = None
        if self.share is not None and self.several is not None:
            overlap = figure_of(log_ratio(self.several, self.share), "×")
        return Variant(
            step_ms=None if self.step_ms is None else Figure(value=self.step_ms, unit="ms", source="measured"),
            gain=None if self.gain is None else figure_of(self.gain, "×"),
            overlap=overlap,
            why=self.why or None,
        )


def conclude(manifest: Manifest, tried: Sequence[Tried], *, created: str, replayed: bool) -> AblationReport:
    """The report, from the judged trials alone; of a trial that was run again the one that worked."""
    asked = manifest.ablation
    if asked is None:
        raise ValueError("only a run of `ablate` takes a model apart")
    known: dict[str, Tried] = {}
    for one in sorted(tried, key=lambda one: one.ok):
        known[first_key(one.spec)] = one
    found: dict[Part | None, list[Tried | None]] = {part: [] for part in VARIANTS}
    for spec in trials(manifest):
        found[spec.without].append(known.get(key(spec)))
    base = _settings(manifest, largest(asked))
    scheduled = scheduling.scheduled(manifest, tried)
    steps = []
    for context, batch in zip(asked.contexts, asked.batches, strict=True) if asked.parts else ():
        asks = {
            "decode": _Asked(*(_decode(context, batch, engines) for engines in (1, asked.engines))),
            "prefill": _Asked(*[specs.prompt_step(context, base)] * 2),
        }
        for kind in KINDS:
            seen = {part: _seen(asks[kind], one, several) for part, (one, several) in found.items()}
            steps.append(_step(kind, context, asks[kind].one, seen))
    failed = [
        caution("not_measured", f"{slug(one.spec)} could not be measured ({one.why or one.outcome}).")
        for one in known.values()
        if not one.ok
    ]
    return AblationReport(
        schema_version=SCHEMA_VERSION,
        created=created,
        replayed=replayed,
        model=manifest.model,
        gpu=manifest.gpu,
        host=manifest.host,
        software=manifest.software,
        settings=base,
        ablation=asked,
        steps=steps,
        scheduling=scheduled,
        warnings=failed,
        sentence=_sentence(asked, steps) if asked.parts else scheduling.sentence(scheduled) or NOTHING,
    )


class _Asked(NamedTuple):
    """A step as one engine does it, and as each of several does."""

    one: Step
    several: Step


def _seen(asked: _Asked, one: Tried | None, several: Tried | None) -> _Seen:
    alone = _rate(one, asked.one, "one engine")
    if isinstance(alone, str):
        return _Seen(why=alone)
    share = _rate(one, asked.several, "one engine") if asked.several != asked.one else ""
    together = _rate(several, asked.several, "several engines")
    if isinstance(together, str):
        return _Seen(alone.step_ms, alone.mean, why=together)
    return _Seen(alone.step_ms, alone.mean, together.mean, None if isinstance(share, str) else share.mean)


def _rate(trial: Tried | None, step: Step, who: str) -> StepRate | str:
    if trial is None:
        return f"{who}: not measured yet"
    if not trial.ok:
        return f"{who}: {trial.why or trial.outcome}"
    return step_rate(trial.raw, trial.spec.steps.index(step))


def _step(kind: Kind, context: int, step: Step, seen: dict[Part | None, _Seen]) -> AblatedStep:
    whole, attention, mlp, rest = seen[None], seen["mlp"], seen["attention"], seen["both"]
    found = AblatedStep(
        kind=kind,
        context=context,
        sequences=step.decode + step.prefill,
        whole=whole.told,
        attention_only=attention.told,
        mlp_only=mlp.told,
        rest_only=rest.told,
    )
    if attention.one is None or mlp.one is None:
        return found
    # Seconds a token: the rates' inverses.
    share = math.exp(mlp.one.log_mean) / (math.exp(mlp.one.log_mean) + math.exp(attention.one.log_mean))
    found = msgspec.structs.replace(found, attention_share=Figure(value=share * 100, unit="%", source="measured"))
    if attention.gain is not None and mlp.gain is not None:
        mean = _mean([(share, attention.gain), (1 - share, mlp.gain)])
        found = msgspec.structs.replace(found, weighted_mean=figure_of(mean, "×", "predicted"))
    if rest.one is None:
        return found
    alone = _added(attention.one, mlp.one, rest.one)
    if whole.one is not None and alone is not None:
        found = msgspec.structs.replace(found, closure=figure_of(log_ratio(whole.one, alone), "×"))
    if attention.several is None or mlp.several is None or rest.several is None or alone is None:
        return found
    together = _added(attention.several, mlp.several, rest.several)
    if together is None:
        return found
    expected = log_ratio(together, alone)
    against = None if whole.gain is None else figure_of(log_ratio(expected, whole.gain), "×")
    # Made from measured figures by a rule that may not hold: that is what it is compared for.
    return msgspec.structs.replace(found, expected=figure_of(expected, "×", "predicted"), expected_over_whole=against)


def _added(attention: LogMean, mlp: LogMean, rest: LogMean) -> LogMean | None:
    """The rate of a model whose time is that of attention only and of MLPs only, less what both have: on logarithms,
    each error by its share. None where what both have is more than there is.
    """
    parts = [(math.exp(-mean.log_mean), mean, sign) for mean, sign in ((attention, 1), (mlp, 1), (rest, -1))]
    total = math.fsum(sign * seconds for seconds, _, sign in parts)
    if total <= 0:
        return None
    variance, dof = add([Variance((mean.log_se * seconds / total) ** 2, mean.dof) for seconds, mean, _ in parts])
    return LogMean(-math.log(total), math.sqrt(variance), dof)


def _mean(weighted: Sequence[tuple[float, LogMean]]) -> LogMean:
    """The weighted mean of rates that are given on logarithms, on logarithms again, with its error."""
    parts = [(weight * math.exp(mean.log_mean), mean) for weight, mean in weighted]
    total = math.fsum(part for part, _ in parts)
    variance, dof = add([Variance((mean.log_se * part / total) ** 2, mean.dof) for part, mean in parts])
    return LogMean(math.log(total), math.sqrt(variance), dof)


def _sentence(asked: Ablation, steps: Sequence[AblatedStep]) -> str:
    """Which part gains, at the first context, in decode: what the others look like stands in the table."""
    for one in steps:
        whole, attention, mlp = (part.gain for part in (one.whole, one.attention_only, one.mlp_only))
        if whole is not None and attention is not None and mlp is not None:
            told = [times(gain) for gain in (whole, attention, mlp)]
            return (
                f"By the GPU's work alone {asked.engines} engines under MPS reach {told[0]} of one engine in "
                f"{one.kind} at context {one.context:,}; with attention only {told[1]}, with MLPs only {told[2]}."
            )
    return NOTHING
