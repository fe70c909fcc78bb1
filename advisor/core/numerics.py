"""May a thread percentage be trusted? The products to check, and the judgement of what came back.

Under `CUDA_MPS_ACTIVE_THREAD_PERCENTAGE` some SM counts make matrix products return wrong values without any
error. So a percentage becomes a candidate only after two checks: the model's own matrix products against
float64 (`judge_products`), and fixed prompts through restricted and unrestricted engines (`judge_logprobs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from advisor.core.records import EngineSettings, ModelFacts, NumericsResult, RawNumerics, Record

# A bf16 result is rounded by at most 2**-8 = 0.004 of its value, 0.0017 over a tile; wrong products were seen
# to be off by 0.37 and more.
PRODUCT_LIMIT = 1e-2
# JSON has no infinity and no NaN: an error that is not finite is recorded as this.
NOT_FINITE = 1e30
# The unembedding's rows are padded to a multiple of this by vLLM (`vocab_parallel_embedding`).
VOCAB_PADDING = 64

LOGPROB_NOISE_FACTOR = 3.0
LOGPROB_FLOOR = 0.08
LOGPROB_CEILING = 0.5


class Product(Record, frozen=True):
    """One matrix product of the model, x·Wᵀ (+ bias): x is rows × inner, W is columns × inner."""

    name: str
    inner: int
    columns: int
    bias: bool
    rows: list[int]  # every batch size at which it is checked, ascending


class Verdict(Record, frozen=True):
    """`worst_error` is None where nothing could be compared; `why` is None exactly when `ok`."""

    ok: bool
    worst_error: float | None
    why: str | None


def products(model: ModelFacts, settings: EngineSettings, batch_sizes: Iterable[int]) -> list[Product]:
    """The model's products at `batch_sizes` (the captured ones), max_num_seqs and the token budget.

    The unembedding sees sampled positions only, so it is checked up to max_num_seqs rows. vLLM runs query,
    key and value as one product, and gate and up as one. A quantised model runs other kernels than a plain
    product, so there is nothing here that would be its own: the list is empty, and an empty check is judged
    as failed.
    """
    if model.quantization is not None or settings.quantization is not None:
        return []
    sizes = {size for size in batch_sizes if size > 0} | {settings.max_num_seqs}
    every = sorted(sizes | {settings.max_num_batched_tokens})
    sampled = sorted(size for size in sizes if size <= settings.max_num_seqs)
    hidden, inner = model.hidden_size, model.intermediate_size
    query = model.heads * model.head_dim
    vocab = math.ceil(model.vocab_size / VOCAB_PADDING) * VOCAB_PADDING

    def product(name: str, inner: int, columns: int, rows: list[int], bias: bool = False) -> Product:
        return Product(name=name, inner=inner, columns=columns, bias=bias, rows=rows)

    return [
        product("qkv", hidden, query + 2 * model.kv_heads * model.head_dim, every, model.qkv_bias),
        product("o", query, hidden, every),
        product("gate_up", hidden, 2 * inner, every),
        product("down", inner, hidden, every),
        product("lm_head", hidden, vocab, sampled),
    ]


def sms_at(raw: RawNumerics, percentage: int) -> int | None:
    """The SMs that a client saw under `percentage`, None where that was not measured."""
    return next((result.sms for result in raw.results if result.percentage == percentage), None)


def judge_products(
    raw: RawNumerics, percentage: int, limit: float = PRODUCT_LIMIT, sms_total: int | None = None
) -> Verdict:
    """Are all products right at `percentage`?

    Not when one is off by more than `limit` in its worst tile, not finite, or differs between launches; when
    the check failed or never ran; when another percentage was checked at more products or batch sizes; or
    when the client saw all of the GPU's `sms_total` SMs below 100 %, which means that it ran without MPS.
    The first reason found is given, wrong values before an incomplete check: those are the finding.
    """
    own = [result for result in raw.results if result.percentage == percentage]
    worst = max(own, key=_severity, default=None)
    worst_error = None if worst is None else min(_severity(worst), NOT_FINITE)
    why = _fault(raw, percentage, own, worst, limit, sms_total)
    return Verdict(ok=why is None, worst_error=worst_error, why=why)


def _severity(result: NumericsResult) -> float:
    # An error below zero is none that was found: nothing is known of the product then.
    return result.worst_error if math.isfinite(result.worst_error) and result.worst_error >= 0 else math.inf


def _fault(
    raw: RawNumerics,
    percentage: int,
    own: list[NumericsResult],
    worst: NumericsResult | None,
    limit: float,
    sms_total: int | None,
) -> str | None:
    if worst is not None and _severity(worst) > limit:
        where = _where(worst)
        return (
            f"{where} never written or not finite in parts"
            if _severity(worst) >= NOT_FINITE
            else f"{where} off by {worst.worst_error:.2g}"
        )
    if unstable := next((result for result in own if result.unstable), None):
        return f"{_where(unstable)} differs between repeated launches"
    if str(percentage) in raw.failed:
        return f"numerics check failed: {raw.failed[str(percentage)]}"
    if worst is None:
        return "numerics not checked at this percentage"
    covered = {(result.product, result.rows) for result in own}
    if missing := sorted({(result.product, result.rows) for result in raw.results} - covered):
        product, rows = missing[0]
        return f"numerics check incomplete: {product} with {rows} rows is missing ({len(missing)} in all)"
    if sms_total is not None and percentage < 100 and worst.sms >= sms_total:
        return f"the client saw all {worst.sms} SMs: the percentage was not in force"
    return None


def _where(result: NumericsResult) -> str:
    return f"matrix product {result.product} at batch {result.rows}"


# ---------------------------------------------------------------- log-probabilities

Prompts = Sequence[Sequence[float]]  # of one engine: per prompt, one log-probability per token


def judge_logprobs(restricted: Sequence[Prompts], unrestricted: Sequence[Prompts]) -> Verdict:
    """Do restricted engines give the same log-probabilities as unrestricted ones? One entry per engine.

    The error of engine a against engine b is, for a prompt, norm(a - b) / norm(b - mean(b)), and the worst
    prompt counts. It is relative to the signal's own spread, because the spread differs by orders of
    magnitude: real weights give values that vary over several nats, dummy weights values that are nearly
    constant (-11.9312 ± 3e-5, where one float32 step is already 9.5e-7, so that rounding alone makes up to
    5 %). Two unrelated signals of equal spread come out near 1.4.

    The limit is LOGPROB_NOISE_FACTOR times the worst error between any two unrestricted engines, and at
    least LOGPROB_FLOOR, which leaves room for that rounding and for the other kernels that a smaller number
    of SMs selects. Engines without restriction that agree bit for bit would otherwise allow nothing, and
    with fewer than two of them there is only the floor. A limit above LOGPROB_CEILING could not tell a wrong
    engine from a right one: then nothing is approved.
    """
    if not restricted:
        return _refused("no restricted engine gave log-probabilities")
    if not unrestricted:
        return _refused("no unrestricted engine gave log-probabilities to compare with")
    shape = [len(prompt) for prompt in unrestricted[0]]
    for kind, engines in (("restricted", restricted), ("unrestricted", unrestricted)):
        for index, engine in enumerate(engines):
            if defect := _defect(engine, shape):
                return _refused(f"{kind} engine {index}: {defect}")
    noise = max(
        (_engine_error(a, b) for i, a in enumerate(unrestricted) for j, b in enumerate(unrestricted) if i != j),
        default=0.0,
    )
    limit = max(LOGPROB_NOISE_FACTOR * noise, LOGPROB_FLOOR)
    worst = min(max(_engine_error(a, b) for a in restricted for b in unrestricted), NOT_FINITE)
    if limit > LOGPROB_CEILING:
        why = (
            f"log-probabilities of unrestricted engines differ among themselves by {noise:.2g}: no comparison possible"
        )
    elif worst > limit:
        why = f"log-probabilities off by {worst:.2g} of their spread, {limit:.2g} allowed"
    else:
        return Verdict(ok=True, worst_error=worst, why=None)
    return Verdict(ok=False, worst_error=worst, why=why)


def _refused(why: str) -> Verdict:
    return Verdict(ok=False, worst_error=None, why=why)


def _defect(engine: Prompts, shape: list[int]) -> str | None:
    """What makes an engine's answer incomparable with prompts of `shape` tokens."""
    if not engine or not all(engine):
        return "log-probabilities are missing"
    if [len(prompt) for prompt in engine] != shape:
        return "log-probabilities of another number of prompts or tokens than the first unrestricted engine's"
    if not all(math.isfinite(value) for prompt in engine for value in prompt):
        return "a log-probability is not finite"
    return None


def _engine_error(a: Prompts, b: Prompts) -> float:
    return max(_prompt_error(one, other) for one, other in zip(a, b, strict=True))


def _prompt_error(a: Sequence[float], b: Sequence[float]) -> float:
    mean = math.fsum(b) / len(b)
    difference, spread = math.dist(a, b), math.dist(b, [mean] * len(b))
    if difference == 0:
        return 0.0
    return difference / spread if spread > 0 else math.inf
