"""One engine's load as one record, whichever number of load generator processes made it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from advisor.core import histogram
from advisor.core.records import RawLoad

ERRORS_KEPT = 5

N = TypeVar("N", int, float)


def merge(parts: Sequence[RawLoad]) -> RawLoad:
    """Add up what several generators saw of the same engine. Their bins have to lie on one grid.

    Raises ValueError for no parts, and for parts of different engines or of different bin widths.
    """
    if not parts:
        raise ValueError("no load generator saw this engine")
    first = parts[0]
    if any((part.engine, part.bin_s) != (first.engine, first.bin_s) for part in parts):
        raise ValueError("only loads of one engine with bins of one width can be added up")
    start_s = min(part.bins_start_s for part in parts)
    offsets = [round((part.bins_start_s - start_s) / first.bin_s) for part in parts]
    length = max(offset + len(part.tokens) for offset, part in zip(offsets, parts, strict=True))

    fewest = [part.prompt_tokens_min for part in parts if part.prompt_tokens_min is not None]
    most = [part.prompt_tokens_max for part in parts if part.prompt_tokens_max is not None]
    return RawLoad(
        engine=first.engine,
        bins_start_s=start_s,
        bin_s=first.bin_s,
        tokens=_added([part.tokens for part in parts], offsets, [0.0] * length),
        first_tokens=_added([part.first_tokens for part in parts], offsets, [0] * length),
        completions=_added([part.completions for part in parts], offsets, [0] * length),
        sent=sum(part.sent for part in parts),
        completed=sum(part.completed for part in parts),
        failed=sum(part.failed for part in parts),
        errors=[error for part in parts for error in part.errors][:ERRORS_KEPT],
        chunks=sum(part.chunks for part in parts),
        output_tokens=sum(part.output_tokens for part in parts),
        prompt_tokens_min=min(fewest, default=None),
        prompt_tokens_max=max(most, default=None),
        ttft=histogram.merge([part.ttft for part in parts]),
        itl=histogram.merge([part.itl for part in parts]),
        e2e=histogram.merge([part.e2e for part in parts]),
    )


def by_engine(parts: Sequence[RawLoad], engines: int) -> list[RawLoad]:
    """One load for each engine from what every generator saw of it. Raises ValueError as `merge` does."""
    return [merge([part for part in parts if part.engine == engine]) for engine in range(engines)]


def _added(rows: Sequence[Sequence[N]], offsets: Sequence[int], total: list[N]) -> list[N]:
    for offset, row in zip(offsets, rows, strict=True):
        for index, count in enumerate(row):
            total[offset + index] += count
    return total
