"""How candidates, loads and outcomes are called, the same on the screen and on the page."""

from __future__ import annotations

from string import ascii_lowercase

from advisor.core.advised import named
from advisor.core.records import Candidate, Outcome, Report, Workload
from advisor.core.tuning import words
from advisor.core.workload import prompt_range

MISSING = "–"

OUTCOME_IN_WORDS: dict[Outcome, str] = {
    "ok": "ok",
    "infeasible": "infeasible",
    "oom": "out of memory",
    "crash": "crashed",
    "timeout": "timed out",
    "not_attached": "not attached to MPS",
    "wrong_results": "wrong results",
    "invalid": "invalid",
    "skipped": "skipped",
}
LIMIT_IN_WORDS = {
    "load_generator": "the load generator",
    "gpu": "the GPU",
    "engine_core": "the engine core's thread",
    "api_server": "the API server",
    "token_budget": "the token budget",
    "kv_cache": "the KV cache",
    "unattributed": "nothing that stands out",
}
KERNELS_IN_WORDS = {
    "attention": "attention",
    "mlp": "MLP",
    "projections": "projections",
    "lm_head": "output head",
    "norm_activation": "norm, activation",
    "sampling": "sampling",
    "kv_writes": "KV cache writes",
    "other": "other",
    "unlabelled": "could not be told",
}
SHORT_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def simplicity(one: Candidate) -> tuple[int, bool, int]:
    """The order of candidates: fewer engines first, without MPS first, larger thread percentages first."""
    return one.engines, one.mps, -max(one.thread_percentages or [101])


def changes(report: Report, one: Candidate) -> str:
    """What a candidate's settings change of the default engine's, in words; empty where nothing, or not known."""
    default = report.candidates[0].settings
    return "" if default is None or one.settings is None else ", ".join(words(one.settings, default))


def marks(report: Report) -> dict[str, str]:
    """What candidates' settings change of the default engine's, in words, each with a letter to refer to it by."""
    found = dict.fromkeys(changes(report, one) for one in report.candidates)
    return {change: ascii_lowercase[n % 26] for n, change in enumerate(filter(None, found))}


def marked_name(report: Report, one: Candidate) -> str:
    """The name, with the letter of what the settings change."""
    mark = marks(report).get(changes(report, one))
    return named(one) + (f" [{mark}]" if mark else "")


def question(report: Report) -> list[str]:
    """What was asked, in parts: model and GPU, vLLM, precision, lengths, requests in flight."""
    model, load = report.model, report.workload
    work = {
        "serve": f"{lengths(prompt_range(load))} in, {outputs(load)} out",
        "prefill": f"prefill of {lengths(prompt_range(load))}",
        "decode": f"decode at {load.isl}",
    }[load.kind]
    return [
        f"{model.name} on {report.gpu.name}",
        *([f"vLLM {report.software.vllm}"] if report.software.vllm else []),
        " ".join(filter(None, [SHORT_DTYPE.get(model.dtype, model.dtype), model.quantization])),
        work,
        f"{load.concurrency} in flight",
        *(["token ids"] if load.prompts == "token_ids" else []),
    ]


def lengths(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def outputs(load: Workload) -> str:
    if load.osl_range is not None:
        return lengths(load.osl_range)
    return f"{load.osl} ± {load.osl_spread}" if load.osl_spread else str(load.osl)
