"""Which trial to run next, and when to stop. Pure: decided from the question and from what has been measured.

`decide` is a generator that tells the whole story in order. It yields a `TrialSpec`, is sent the judged trial,
and returns what it left out and why. A live run, a resumed run and a replay all walk the same generator.
"""

from __future__ import annotations

from collections.abc import Generator

import msgspec

from advisor.core import cores, memory, numerics, settings
from advisor.core.records import EngineSettings, Manifest, Outcome, Record, TrialSpec
from advisor.core.tried import Tried
from advisor.core.workload import as_served

# Another engine has to add this much to be worth trying one more.
WORTH_ANOTHER = 1.03
# MPS plans with 48 clients at most; one engine is one client.
MPS_CLIENTS = 48


class LeftOut(Record, frozen=True):
    """A candidate that was not run, with the reason; it appears in the report like the others."""

    engines: int
    mps: bool
    thread_percentage: int | None
    outcome: Outcome
    why: str
    worst_product_error: float | None = None


Search = Generator[TrialSpec, Tried, list[LeftOut]]


def decide(manifest: Manifest) -> Search:
    """Walk the candidates in order: default, 2 without MPS, 2, 3, 4 … under MPS, then the winner's variants."""
    left_out: list[LeftOut] = []
    default = yield from _measured(load_spec(manifest, 1, mps=False))

    without_mps: set[int] = set()
    if refusal := _refusal(manifest, 2):
        left_out += [
            LeftOut(engines=2, mps=mps, thread_percentage=None, outcome=refusal[0], why=refusal[1])
            for mps in (False, True)
        ]
    else:
        yield from _measured(load_spec(manifest, 2, mps=False))
        without_mps.add(2)

        under_mps = yield from _grow(manifest, default.rate, left_out)
        winner = simplest_best(under_mps)
        if winner is not None:
            engines = winner.spec.engines
            if engines not in without_mps:
                yield from _measured(load_spec(manifest, engines, mps=False))
            yield from _thread_percentages(manifest, winner, left_out)

    # What MPS itself costs. Last, because no verdict waits for it.
    yield from _measured(load_spec(manifest, 1, mps=True))
    return left_out


def _measured(spec: TrialSpec) -> Generator[TrialSpec, Tried, Tried]:
    """One trial, and once more when it failed by what may have been an accident.

    An engine that was killed, a port that two engines chose, a disturbance that made the evidence worthless: the
    candidate is not to blame, and a verdict needs it. Too little memory is no accident.
    """
    result = yield spec
    if result.outcome in ("invalid", "crash", "timeout", "not_attached"):
        result = yield msgspec.structs.replace(spec, repeat=spec.repeat + 1)
    return result


def _grow(manifest: Manifest, one_engine: float, left_out: list[LeftOut]) -> Generator[TrialSpec, Tried, list[Tried]]:
    """2, 3, 4 … engines under MPS until another one adds too little, fails for lack of room, or cannot be placed.

    `one_engine` is the default engine's rate in tokens/s, which the second engine has to beat; 0.0 if unknown.
    """
    tried: list[Tried] = []
    best, failures, engines = one_engine, 0, 2
    while True:
        if refusal := _refusal(manifest, engines):
            left_out.append(
                LeftOut(engines=engines, mps=True, thread_percentage=None, outcome=refusal[0], why=refusal[1])
            )
            return tried
        result = yield from _measured(load_spec(manifest, engines, mps=True))
        tried.append(result)
        if result.outcome == "oom":
            why = f"{engines} engines already ran out of memory"
        elif not result.ok:
            # One failure may be an accident; the next count is still worth a look. Two in a row are a pattern.
            failures += 1
            why = f"{failures} trials in a row failed" if failures == 2 else ""
        else:
            failures = 0
            gained = result.rate / best if best else None
            best = max(best, result.rate)
            why = ""
            if gained is not None and gained < WORTH_ANOTHER:
                why = f"engine {engines} changed throughput by {(gained - 1) * 100:+.1f} %, less than +3 %"
        if why:
            left_out.append(LeftOut(engines=engines + 1, mps=True, thread_percentage=None, outcome="skipped", why=why))
            return tried
        engines += 1


def _thread_percentages(manifest: Manifest, winner: Tried, left_out: list[LeftOut]) -> Search:
    """Check the model's products at each percentage first; only what computes correctly becomes a candidate."""
    engines = winner.spec.engines
    wanted = percentages(manifest, engines)
    if not wanted:
        return left_out
    if why := _cannot_check(manifest):
        left_out += [_left(engines, p, "skipped", why) for p in wanted]
        return left_out
    checked = yield numerics_spec(manifest, wanted)
    for percentage in wanted:
        if not checked.ok or checked.raw.numerics is None:
            left_out.append(_left(engines, percentage, "skipped", f"numerics check failed: {checked.why}"))
            continue
        verdict = numerics.judge_products(checked.raw.numerics, percentage, sms_total=manifest.gpu.sms)
        if not verdict.ok:
            # Without an error figure nothing was shown to be wrong, but nothing was shown to be right either.
            outcome: Outcome = "skipped" if verdict.worst_error is None else "wrong_results"
            left_out.append(_left(engines, percentage, outcome, verdict.why or "", verdict.worst_error))
            continue
        yield from _measured(load_spec(manifest, engines, mps=True, percentage=percentage))
    return left_out


def _cannot_check(manifest: Manifest) -> str:
    """Why no percentage of this model can be shown to compute correctly; empty when it can."""
    if manifest.model.quantization is not None:
        return "the numerics check covers unquantised products only"
    if manifest.settings.load_format == "dummy":
        return "vLLM's own dummy weights depend on the number of SMs, so restricted engines cannot be compared"
    return ""


def _left(engines: int, percentage: int, outcome: Outcome, why: str, error: float | None = None) -> LeftOut:
    return LeftOut(
        engines=engines, mps=True, thread_percentage=percentage, outcome=outcome, why=why, worst_product_error=error
    )


def simplest_best(tried: list[Tried]) -> Tried | None:
    """The fewest engines within 3 % of the best of these, None when none is ok."""
    ok = [one for one in tried if one.ok]
    if not ok:
        return None
    best = max(one.rate for one in ok)
    return min((one for one in ok if one.rate * WORTH_ANOTHER >= best), key=lambda one: one.spec.engines)


def percentages(manifest: Manifest, engines: int) -> list[int]:
    """The thread percentages worth trying for this many engines; 100 is the same as none and left out."""
    wanted = manifest.question.thread_percentages
    if wanted == "none":
        return []
    if wanted == "auto":
        wanted = [100 // engines, 150 // engines, 200 // engines]
    return sorted({p for p in wanted if 0 < p < 100})


def _refusal(manifest: Manifest, engines: int) -> tuple[Outcome, str] | None:
    """Why this many engines cannot even be tried, by computation; None when they can."""
    if engines > manifest.question.max_engines:
        return "skipped", f"--max-engines is {manifest.question.max_engines}"
    if engines > MPS_CLIENTS:
        return "infeasible", f"MPS serves {MPS_CLIENTS} clients at most"
    if engines > manifest.question.workload.concurrency:
        return (
            "infeasible",
            f"{manifest.question.workload.concurrency} requests in flight cannot load {engines} engines",
        )
    if cores.plan(manifest.host.cores, engines) is None:
        return "infeasible", (
            f"{engines} engines need {2 * engines} physical cores beside the load generator's; "
            f"this machine has {len(manifest.host.cores)}"
        )
    if (planned := memory_plan(manifest, engines)).kv_bytes is None:
        return "infeasible", memory.explain(planned)
    return None


def memory_plan(manifest: Manifest, engines: int) -> memory.MemoryPlan:
    """How this many engines share the GPU's memory."""
    return memory.plan(
        manifest.gpu,
        manifest.model,
        max_num_batched_tokens=manifest.settings.max_num_batched_tokens,
        max_num_seqs=manifest.settings.max_num_seqs,
        workload=as_served(manifest.question.workload),
        engines=engines,
    )


def engine_settings(manifest: Manifest, engines: int) -> EngineSettings:
    """The default engine's settings with this many engines' share of the memory."""
    kv_bytes = memory_plan(manifest, engines).kv_bytes
    if kv_bytes is None:
        raise ValueError(f"{engines} engines do not fit; ask `_refusal` first")
    return settings.with_kv_bytes(manifest.settings, manifest.model, kv_bytes)


def load_spec(manifest: Manifest, engines: int, *, mps: bool, percentage: int | None = None) -> TrialSpec:
    """The load trial of one candidate."""
    placed = cores.plan(manifest.host.cores, engines)
    if placed is None:
        raise ValueError(f"{engines} engines cannot be placed; ask `_refusal` first")
    return TrialSpec(
        kind="load",
        engines=engines,
        mps=mps,
        thread_percentage=percentage,
        settings=engine_settings(manifest, engines),
        workload=manifest.question.workload,
        protocol=manifest.protocol,
        engine_cores=placed.engine_cores,
        load_cores=placed.load_cores,
    )


def numerics_spec(manifest: Manifest, wanted: list[int]) -> TrialSpec:
    """The check of the model's own matrix products at these percentages."""
    return TrialSpec(
        kind="numerics",
        mps=True,
        settings=manifest.settings,
        percentages=wanted,
        batch_sizes=_checked_sizes(manifest.settings),
    )


# Steps that mix prefill and decode run without a graph at any size up to the token budget. These are a sample.
_MIXED_SIZES = (520, 777, 1024, 1283, 1536, 2048, 2601, 3072, 4096, 5003, 6144, 7168, 7919)


def _checked_sizes(base: EngineSettings) -> list[int]:
    """Batch sizes at which products are checked: the captured ones, and a sample of those beyond them."""
    captured = settings.captured_batch_sizes(base.max_cudagraph_capture_size, base.max_num_batched_tokens)
    return captured + [n for n in _MIXED_SIZES if base.max_cudagraph_capture_size < n < base.max_num_batched_tokens]
