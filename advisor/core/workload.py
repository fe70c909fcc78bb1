"""What one request looks like under each workload."""

from __future__ import annotations

import msgspec

from advisor.core.records import Workload

# A decode wave is one request per slot. Its prompt is shorter than `isl` by half of what it generates, so that the
# mean context over the wave is `isl`. Longer waves give longer windows, shorter ones a context nearer to `isl`.
DECODE_WAVE_SHARE = 1.5
DECODE_WAVE_TOKENS = (640, 2048)


def output_tokens(workload: Workload) -> int:
    """Tokens that one full request generates, on average where lengths are mixed."""
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
    """How far output lengths may differ from `osl`, in tokens, for a model that takes `max_context`.

    `isl` is the longest prompt. Lengths that have a range of their own need no spread.
    """
    return max(0, min(int(SPREAD_SHARE * osl), max_context - isl - osl)) if kind == "serve" else 0


def prompt_tokens(workload: Workload) -> int:
    """Tokens of a prompt that is sent, on average where lengths are mixed.

    Only `decode` differs from `isl`: its context grows around it.
    """
    if workload.kind != "decode":
        return workload.isl
    return max(1, workload.isl - output_tokens(workload) // 2)


def prompt_range(workload: Workload) -> tuple[int, int]:
    """Tokens of the shortest and of the longest prompt that may be sent."""
    if workload.kind != "decode" and workload.isl_range is not None:
        return workload.isl_range
    length = prompt_tokens(workload)
    return length, length


def output_range(workload: Workload) -> tuple[int, int]:
    """Tokens that a full request generates, at least and at most. First requests may be cut shorter."""
    if workload.kind == "serve" and workload.osl_range is not None:
        return workload.osl_range
    mean, apart = output_tokens(workload), workload.osl_spread if workload.kind == "serve" else 0
    return mean - apart, mean + apart


def mean_and_range(text: str) -> tuple[int, tuple[int, int] | None]:
    """Read a length in tokens, "1024", or lengths that are drawn evenly, "256:2048": the rounded mean and the range.

    A range of one length is that length. Raises ValueError, with a text for the user, for anything else.
    """
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{text!r} is no length: give a number of tokens (1024), or the least and the most (256:2048)")
    low, high = int(parts[0]), int(parts[-1])
    if low < 1:
        raise ValueError(f"{text!r}: a length is at least 1 token")
    if low > high:
        raise ValueError(f"{text!r}: the first length is the least; did you mean {high}:{low}?")
    return (low + high + 1) // 2, None if low == high else (low, high)


def turnover_tokens(workload: Workload) -> int:
    """Output tokens of one turnover: every request in flight replaced once (decode: one output length each)."""
    return workload.concurrency * (1 if workload.kind == "prefill" else workload.osl)


def shares(concurrency: int, engines: int) -> list[int]:
    """Requests dealt to engines, or to load generators: equal, the remainder one each from the first on."""
    base, rest = divmod(concurrency, engines)
    return [base + (1 if index < rest else 0) for index in range(engines)]


def as_served(workload: Workload) -> Workload:
    """The workload with the lengths that its longest request has, for sums of memory and context."""
    return msgspec.structs.replace(
        workload,
        isl=prompt_range(workload)[1],
        osl=output_range(workload)[1],
        osl_spread=0,
        isl_range=None,
        osl_range=None,
    )
