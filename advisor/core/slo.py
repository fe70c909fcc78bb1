"""Latency objectives: "p95 of TTFT at most 200 ms" and the like. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from advisor.core.records import Candidate, CurvePoint, Measurement, Percentiles

Seen = Candidate | CurvePoint | Measurement  # whatever has latencies

_OBJECTIVE = re.compile(r"(ttft|itl|e2e)_(p50|p95|p99)\s*=\s*([\d.]+)\s*(ms|s)?", re.IGNORECASE)


def parse(text: str) -> dict[str, float]:
    """“ttft_p95=200ms,itl_p95=30ms” as {"ttft_p95": 200.0, "itl_p95": 30.0}, in milliseconds (also “0.2s”).

    Raises ValueError that says what is expected.
    """
    limits: dict[str, float] = {}
    for word in text.split(","):
        match = _OBJECTIVE.fullmatch(word.strip())
        try:
            limit = float(match[3]) * (1000 if (match[4] or "ms").lower() == "s" else 1) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or not 0 < limit < math.inf:
            raise ValueError(
                f"“{word.strip()}” is no latency objective; ttft, itl or e2e with p50, p95 or p99 is expected, "
                "like ttft_p95=200ms"
            )
        name = f"{match[1]}_{match[2]}".lower()
        if name in limits:
            raise ValueError(f"{name} is given twice")
        limits[name] = limit
    return limits


def worst(point: Seen, slo: Mapping[str, float]) -> tuple[float, str]:
    """The objective that a point is worst at: its latency as a share of the limit, and the objective's name.

    At most 1.0: the point meets all of them. A latency that was not seen meets nothing (infinite).
    """
    return max((_latency_ms(point, name) / limit, name) for name, limit in slo.items())


def meets(point: Seen, slo: Mapping[str, float]) -> bool:
    """Whether a point keeps to every objective; to none there are, every point does."""
    return not slo or worst(point, slo)[0] <= 1.0


def shown(slo: Mapping[str, float]) -> str:
    """“TTFT p95 ≤ 200 ms, ITL p95 ≤ 30 ms”."""
    return ", ".join(f"{_words(name)} ≤ {limit:g} ms" for name, limit in slo.items())


def told(point: Seen, name: str) -> str:
    """“TTFT p95 is 312 ms”."""
    return f"{_words(name)} is {_ms(_latency_ms(point, name))}"


def _ms(milliseconds: float) -> str:
    if math.isinf(milliseconds):
        return "unknown"
    # Enough digits to differ from a limit that it misses.
    return f"{milliseconds:,.0f} ms" if milliseconds >= 1000 else f"{milliseconds:.1f} ms"


def unseen(slo: Mapping[str, float], kind: str) -> str:
    """The objective that requests of a workload cannot show, if any: one token has no gap, a cut-off wave no end."""
    never = {"prefill": ("itl",), "decode": ("ttft", "e2e")}.get(kind, ())
    return next((name for name in slo if name.startswith(never)), "") if never else ""


def _words(name: str) -> str:
    what, percentile = name.split("_")
    return f"{what.upper()} {percentile}"


def _latency_ms(point: Seen, name: str) -> float:
    what, percentile = name.split("_")
    seen: Percentiles | None = getattr(point, f"{what}_ms")
    return math.inf if seen is None else float(getattr(seen, percentile))
