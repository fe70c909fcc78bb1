"""What one request looks like under each workload."""

from __future__ import annotations

import msgspec

from advisor.core.records import Workload

# A decode wave is one request per slot. Its prompt is shorter than `isl` by half of what it generates, so that the
# mean context over the wave is `isl`. Longer waves give longer windows, shorter ones a context nearer to `isl`.
DECODE_WAVE_SHARE = 1.5
DECODE_WAVE_TOKENS = (640, 2048)


def output_tokens(workload: Workload) -> int:
    """Tokens that one full request generates."""
    match workload.kind:
        case "prefill":
            return 1
        case "decode":
            least, most = DECODE_WAVE_TOKENS
            return min(max(int(DECODE_WAVE_SHARE * workload.isl), least), most)
        case "serve":
            return workload.osl


# Requests of exactly one length that start in the same step also end in the same step, and a step that admits many
# takes longer, so that still more join the next: one engine falls into a convoy that swings between prefill and
# decode, whatever the start was. Lengths that differ by up to a fifth keep it apart, as real lengths do.
SPREAD_SHARE = 0.2


def spread(kind: str, isl: int, osl: int, max_context: int) -> int:
    """How far output lengths may differ from `osl`, in tokens, for a model that takes `max_context`."""
    return max(0, min(int(SPREAD_SHARE * osl), max_context - isl - osl)) if kind == "serve" else 0


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
    """The workload with the lengths that its longest request has, for sums of memory and context."""
    longest = output_tokens(workload) + workload.osl_spread
    return msgspec.structs.replace(workload, isl=prompt_tokens(workload), osl=longest, osl_spread=0)
