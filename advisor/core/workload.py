"""What one request looks like under each workload."""

from __future__ import annotations

import msgspec

from advisor.core.records import Workload

# A decode wave is one request per slot. It is this many output lengths long, so that it holds the warm-up,
# the window and a margin, and its prompt is shorter by half of that: the mean context over the wave is `isl`.
DECODE_WAVE_OUTPUTS = 5
DECODE_WAVE_MIN_TOKENS = 640


def output_tokens(workload: Workload) -> int:
    """Tokens that one full request generates."""
    match workload.kind:
        case "prefill":
            return 1
        case "decode":
            return max(DECODE_WAVE_OUTPUTS * workload.osl, DECODE_WAVE_MIN_TOKENS)
        case "serve":
            return workload.osl


def prompt_tokens(workload: Workload) -> int:
    """Tokens of every prompt that is sent. Only `decode` differs from `isl`: its context grows around it."""
    if workload.kind != "decode":
        return workload.isl
    return max(1, workload.isl - output_tokens(workload) // 2)


def turnover_tokens(workload: Workload) -> int:
    """Output tokens of one turnover: every request in flight replaced once (decode: one output length each)."""
    return workload.concurrency * (1 if workload.kind == "prefill" else workload.osl)


def shares(concurrency: int, engines: int) -> list[int]:
    """Requests in flight per engine: equal, the remainder one each from the first engine on."""
    base, rest = divmod(concurrency, engines)
    return [base + (1 if index < rest else 0) for index in range(engines)]


def as_served(workload: Workload) -> Workload:
    """The workload with the lengths that its requests really have, for sums of memory and context."""
    return msgspec.structs.replace(workload, isl=prompt_tokens(workload), osl=output_tokens(workload))
