"""Where the GPU's time goes in one step, and how near to its ceilings: kernels of a trace, labelled by position. Pure.

Names of kernels change with libraries and fusion; their order in a decoder does not. Each layer has one attention and
four matrix products: before it QKV, after it output, gate with up, down; after the last layer the output head. So the
attention kernels divide a step, and the products in between are told by their number. A stretch with another number of
products, or a step with another number of attentions than the model has layers, is called unlabelled: nothing is
guessed. Names only tell the three sorts apart: attention, matrix product, and what writes the KV cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

from advisor.core.records import Ceilings, ModelFacts, RawKernel, RawTrace, Record, Step
from advisor.core.roofline import work

Label = Literal[
    "attention", "mlp", "projections", "lm_head", "norm_activation", "sampling", "kv_writes", "other", "unlabelled"
]
LABELS: tuple[Label, ...] = (
    "attention", "mlp", "projections", "lm_head", "norm_activation", "sampling", "kv_writes", "other", "unlabelled",
)  # fmt: skip
# Steps are traced one by one. Between two the GPU rests for four times as long as Python ever lets it wait in a step.
PAUSE_S = 5e-3

_ATTENTION = re.compile(r"flash|fmha|attention|attn|paged_|unified_", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|matmul|_mm_|_mm$", re.IGNORECASE)
_PRODUCT_ENDS = re.compile(r"splitkreduce|split_k_reduce|reduce_splitk", re.IGNORECASE)
_KV_WRITE = re.compile(r"reshape_and_cache|kv_cache|cache_kernel", re.IGNORECASE)
_COPY = re.compile(r"^(Memcpy|Memset)", re.IGNORECASE)
# One block a multiprocessor that fetches its work itself: how many there are says nothing of how much they had to do.
_PERSISTENT = re.compile(r"persistent|FlashAttnFwdSm90|StreamK", re.IGNORECASE)

# What the products of a stretch are, by their number: before the first attention, between two, after the last.
_FIRST = ("qkv",)
_BETWEEN = ("o", "gate_up", "down", "qkv")
_LAST = ("o", "gate_up", "down", "lm_head")
_PRODUCT_LABEL: dict[str, Label] = {
    "qkv": "projections", "o": "projections", "gate_up": "mlp", "down": "mlp", "lm_head": "lm_head",
}  # fmt: skip


class Part(Record, frozen=True):
    """One sort of kernel in a step. `share` of the time in which any kernel ran; `achieved` is the time that the GPU's
    ceilings allow over the time that it took, None where nothing is to be computed; `sms_covered` is the share of the
    multiprocessors that had a block, over time, None where only persistent kernels ran.
    """

    label: Label
    seconds: float
    share: float
    achieved: float | None
    sms_covered: float | None


class Saturation(Record, frozen=True):
    """A traced step. `busy_s` is the time in which any kernel ran, `span_s` from the first kernel to the last."""

    parts: list[Part]
    busy_s: float
    span_s: float
    steps: int
    why_unlabelled: str

    def part(self, label: Label) -> Part | None:
        return next((one for one in self.parts if one.label == label), None)


def saturation(trace: RawTrace, step: Step, model: ModelFacts, sms: int, ceilings: Ceilings | None) -> Saturation | str:
    """The mean of the traced steps; a text says why there is none. Parts without time are left out."""
    steps = list(_steps(trace))
    if not steps:
        return trace.refused or "nothing was traced"
    seconds = dict.fromkeys(LABELS, 0.0)
    covered: dict[Label, list[tuple[float, float]]] = {label: [] for label in LABELS}
    whys, span_s = [], 0.0
    for kernels in steps:
        labels, why = _labels(trace.names, kernels, model.layers)
        whys += [why] if why else []
        span_s += max(one.end_s for one in kernels) - kernels[0].start_s
        for kernel, label, own_s in zip(kernels, labels, _own_seconds(kernels), strict=True):
            seconds[label] += own_s
            if kernel.blocks and kernel.blocks != sms and not _PERSISTENT.search(trace.names[kernel.name]):
                covered[label].append((own_s, min(1.0, kernel.blocks / sms)))
    busy_s = sum(seconds.values())
    bounds = _bounds(model, step, ceilings)
    parts = [
        Part(
            label=label,
            seconds=taken / len(steps),
            share=taken / busy_s,
            achieved=bounds[label] / (taken / len(steps)) if label in bounds else None,
            sms_covered=_mean(covered[label]),
        )
        for label, taken in seconds.items()
        if taken > 0
    ]
    return Saturation(
        parts=parts,
        busy_s=busy_s / len(steps),
        span_s=span_s / len(steps),
        steps=len(steps),
        why_unlabelled=whys[0] if whys else "",
    )


def _steps(trace: RawTrace) -> Iterator[list[RawKernel]]:
    """The kernels of each traced step, in the order in which they began."""
    step: list[RawKernel] = []
    end_s = 0.0
    for kernel in sorted(trace.kernels, key=lambda one: one.start_s):
        if step and kernel.start_s - end_s > PAUSE_S:
            yield step
            step = []
        step.append(kernel)
        end_s = max(end_s, kernel.end_s) if len(step) > 1 else kernel.end_s
    if step:
        yield step


def _own_seconds(kernels: Sequence[RawKernel]) -> Iterator[float]:
    """Of each kernel the time in which none that began earlier ran: together the time in which any ran."""
    until_s = kernels[0].start_s
    for kernel in kernels:
        yield max(0.0, kernel.end_s - max(until_s, kernel.start_s))
        until_s = max(until_s, kernel.end_s)


def _labels(names: Sequence[str], kernels: Sequence[RawKernel], layers: int) -> tuple[list[Label], str]:
    """A label for each kernel of a step, and why some have none (empty if all have)."""
    sorts = [_sort(names[kernel.name]) for kernel in kernels]
    # An attention may take several kernels: what prepares it, itself, and what combines its parts.
    blocks = [
        (sort, [index for index, _ in group]) for sort, group in groupby(enumerate(sorts), key=lambda one: one[1])
    ]
    attentions = [found for sort, found in blocks if sort == "attention"]
    if len(attentions) != layers:
        return ["unlabelled"] * len(kernels), f"{len(attentions)} attentions in a step of {layers} layers"
    labels: list[Label] = ["other"] * len(kernels)
    edges = [-1, *(found[0] for found in attentions), len(kernels)]
    ends = [0, *(found[-1] + 1 for found in attentions)]
    for found in attentions:
        for index in found:
            labels[index] = "attention"
    why = ""
    for number, (begin, end) in enumerate(zip(ends, edges[1:], strict=True)):
        expected = _FIRST if number == 0 else _LAST if number == layers else _BETWEEN
        told = _stretch(sorts[begin:end], expected)
        if told is None:
            count = len(_products(sorts[begin:end]))
            why = why or f"{count} matrix products where {', '.join(expected)} were expected"
            told = ["unlabelled"] * (end - begin)
        labels[begin:end] = told
    return labels, why


Sort = Literal["attention", "product", "product_end", "kv_write", "copy", "else"]


def _sort(name: str) -> Sort:
    if _COPY.search(name):
        return "copy"
    if _KV_WRITE.search(name):
        return "kv_write"
    if _ATTENTION.search(name):
        return "attention"
    if _PRODUCT_ENDS.search(name):
        return "product_end"
    return "product" if _PRODUCT.search(name) else "else"


def _products(sorts: Sequence[Sort]) -> list[int]:
    return [index for index, sort in enumerate(sorts) if sort == "product"]


def _stretch(sorts: Sequence[Sort], expected: Sequence[str]) -> list[Label] | None:
    """Labels of the kernels between two attentions; None where they do not hold the products that are expected."""
    at = _products(sorts)
    if len(at) != len(expected):
        return None
    labels: list[Label] = []
    passed = 0  # products so far
    for sort in sorts:
        if sort == "product":
            passed += 1
        last = expected[passed - 1] if passed else None
        if sort in ("product", "product_end") and last is not None:
            labels.append(_PRODUCT_LABEL[last])
        elif sort == "kv_write":
            labels.append("kv_writes")
        elif sort == "copy":
            labels.append("other")
        elif last == "lm_head":
            labels.append("sampling")
        elif last is None and expected == _FIRST:
            labels.append("other")  # the embedding, and the first norm with it
        else:
            labels.append("norm_activation")  # with the rotary embedding, which comes between QKV and attention
    return labels


def _bounds(model: ModelFacts, step: Step, ceilings: Ceilings | None) -> dict[Label, float]:
    """Seconds that each part takes at least; without ceilings, or where products are not modelled, none is known."""
    if ceilings is None or model.quantization is not None:
        return {}
    found: dict[Label, float] = {}
    for one in work(model, step):
        found[one.part] = found.get(one.part, 0.0) + one.bound_s(ceilings)
    return found


def _mean(weighted: Sequence[tuple[float, float]]) -> float | None:
    total = sum(weight for weight, _ in weighted)
    return sum(weight * value for weight, value in weighted) / total if total > 0 else None
