"""A model taken apart: what attention alone and MLPs alone gain from several engines, on the GPU alone. Pure.

Where the kernels of several engines overlap, and where not, shows when the model has only one sort of them. The gain
that is then expected of the whole model is the mean of the parts' gains, weighted by their share of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec

from advisor.core import memory, scheduling, specs, tuning
from advisor.core.cautions import caution
from advisor.core.errors import NoHonestAnswer
from advisor.core.intervals import LogMean, Variance, add, log_ratio, value_of
from advisor.core.overlap import step_rate
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
    Value,
    Variant,
)
from advisor.core.tried import Tried, key, slug
from advisor.core.wording import times

BATCHES = (1024, 512, 256)
# The whole model first: a failure there is about the machine, not about a part.
VARIANTS: tuple[Part | None, ...] = (None, "mlp", "attention")
STEP_S = 2.0

Kind = Literal["decode", "prefill"]


def largest_batch(manifest: Manifest, contexts: Sequence[int], engines: int) -> int:
    """The largest of 1024, 512 and 256 sequences at the longest of these contexts that one engine holds, and so many
    engines their shares of. Raises NoHonestAnswer with the sums where not even the smallest fits.
    """
    for batch in BATCHES:
        asked, base = specs.asking(manifest, batch), _settings(manifest, batch)
        plans = {count: specs.memory_plan(asked, count, base) for count in (1, engines)}
        if all(_holds(planned, -(-batch // count), manifest, contexts) for count, planned in plans.items()):
            return batch
    raise NoHonestAnswer(
        f"not even {BATCHES[-1]} sequences of {max(contexts):,} tokens fit into {engines} engines: "
        + memory.explain(plans[engines])
    )


def _holds(planned: memory.MemoryPlan, sequences: int, manifest: Manifest, contexts: Sequence[int]) -> bool:
    each = (memory.whole_blocks(max(contexts)) + memory.BLOCK_TOKENS) * memory.kv_bytes_per_token(manifest.model)
    return planned.kv_bytes is not None and planned.kv_bytes >= sequences * each


def _settings(manifest: Manifest, batch: int) -> EngineSettings:
    """Graphs up to the batch, for all of the model's variants and numbers of engines alike."""
    return tuning.for_batch(manifest.settings, batch)


def trials(manifest: Manifest) -> list[TrialSpec]:
    """One engine without MPS and several under it, of the whole model and of each part."""
    asked = manifest.ablation
    if asked is None:
        raise ValueError("only a run of `ablate` takes a model apart")
    base = _settings(manifest, asked.batch)
    found = []
    for without in VARIANTS:
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
    budget = base.max_num_batched_tokens
    for context in asked.contexts:
        yield Step(decode=asked.batch // engines, decode_context=context)
        yield Step(prefill=max(1, budget // context), prefill_tokens=min(context, budget))


class _Seen(NamedTuple):
    """A variant in one step: its time with one engine, and its gain on logarithms; or why these are not known."""

    step_ms: float | None
    gain: LogMean | None
    why: str

    @property
    def told(self) -> Variant:
        time = None if self.step_ms is None else Figure(value=self.step_ms, unit="ms", source="measured")
        return Variant(step_ms=time, gain=None if self.gain is None else _figure(self.gain), why=self.why or None)


def conclude(manifest: Manifest, tried: Sequence[Tried], *, created: str, replayed: bool) -> AblationReport:
    """The report, from the judged trials alone."""
    asked = manifest.ablation
    if asked is None:
        raise ValueError("only a run of `ablate` takes a model apart")
    known = {key(one.spec): one for one in tried}
    found: dict[Part | None, list[Tried | None]] = {part: [] for part in VARIANTS}
    for spec in trials(manifest):
        found[spec.without].append(known.get(key(spec)))
    kinds: tuple[Kind, ...] = ("decode", "prefill")
    steps = [
        _step(
            kind,
            context,
            {part: _seen(one, several, 2 * place + kinds.index(kind)) for part, (one, several) in found.items()},
        )
        for place, context in enumerate(asked.contexts)
        for kind in kinds
    ]
    failed = [
        caution("not_measured", f"{slug(one.spec)} could not be measured ({one.why or one.outcome}).")
        for one in tried
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
        settings=_settings(manifest, asked.batch),
        ablation=asked,
        steps=steps,
        scheduling=scheduling.scheduled(manifest, tried),
        warnings=failed,
        sentence=_sentence(asked, steps),
    )


def _seen(one: Tried | None, several: Tried | None, step: int) -> _Seen:
    if one is None or not one.ok:
        return _Seen(None, None, "one engine could not be measured")
    alone = step_rate(one.raw, step)
    if isinstance(alone, str):
        return _Seen(None, None, alone)
    if several is None or not several.ok:
        return _Seen(alone.step_ms, None, "several engines could not be measured")
    together = step_rate(several.raw, step)
    if isinstance(together, str):
        return _Seen(alone.step_ms, None, together)
    return _Seen(alone.step_ms, log_ratio(together.mean, alone.mean), "")


def _step(kind: Kind, context: int, seen: dict[Part | None, _Seen]) -> AblatedStep:
    whole, attention, mlp = seen[None], seen["mlp"], seen["attention"]
    found = AblatedStep(
        kind=kind, context=context, whole=whole.told, attention_only=attention.told, mlp_only=mlp.told
    )  # fmt: skip
    if attention.step_ms is None or mlp.step_ms is None:
        return found
    share = attention.step_ms / (attention.step_ms + mlp.step_ms)
    found = msgspec.structs.replace(found, attention_share=Figure(value=share * 100, unit="%", source="measured"))
    if attention.gain is None or mlp.gain is None:
        return found
    expected = _mean([(share, attention.gain), (1 - share, mlp.gain)])
    against = None if whole.gain is None else _figure(log_ratio(expected, whole.gain))
    # Made from measured figures by a rule that may not hold: that is what it is compared for.
    return msgspec.structs.replace(found, expected=_figure(expected, "predicted"), expected_over_whole=against)


def _mean(weighted: Sequence[tuple[float, LogMean]]) -> LogMean:
    """The weighted mean of rates that are given on logarithms, on logarithms again, with its error."""
    parts = [(weight * math.exp(mean.log_mean), mean) for weight, mean in weighted]
    total = math.fsum(part for part, _ in parts)
    variance, dof = add([Variance((mean.log_se * part / total) ** 2, mean.dof) for part, mean in parts])
    return LogMean(math.log(total), math.sqrt(variance), dof)


def _figure(mean: LogMean, source: Literal["measured", "predicted"] = "measured") -> Figure:
    value = value_of(*mean)
    return Figure(value=value.value, unit="×", source=source, low=value.low, high=value.high)


def _sentence(asked: Ablation, steps: Sequence[AblatedStep]) -> str:
    """Which part gains, at the first context, in decode: what the others look like stands in the table."""
    for one in steps:
        whole, attention, mlp = (part.gain for part in (one.whole, one.attention_only, one.mlp_only))
        if whole is not None and attention is not None and mlp is not None:
            told = [times(Value(value=gain.value, low=gain.low, high=gain.high)) for gain in (whole, attention, mlp)]
            return (
                f"By the GPU's work alone {asked.engines} engines under MPS reach {told[0]} of one engine in "
                f"{one.kind} at context {one.context:,}; with attention only {told[1]}, with MLPs only {told[2]}."
            )
    return "Nothing could be compared: see the warnings."
