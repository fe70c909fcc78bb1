"""Numbers for people: how many digits, and which unit. Everything inside is SI; only `report` speaks of ms and %.

Also texts of others, which may hold anything, without what cannot be printed.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def rate(value: float) -> str:
    """Tokens (or prompts) per second: “10,239”."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(value: float) -> str:
    """“179 ms”, “6.1 ms”, “12.3 s”."""
    if value >= 99_999.5:
        return f"{value / 1000:,.0f} s"
    if value >= 9_999.5:
        return f"{value / 1000:.1f} s"
    return f"{value:,.0f} ms" if value >= 9.95 else f"{value:.2g} ms"


def percent(value: float) -> str:
    """“71 %”, “0.3 %”; what is above nothing never reads as nothing."""
    if 0 < value < 0.1:
        return "<0.1 %"
    return f"{value:.0f} %" if value >= 1 or value == 0 else f"{value:.1f} %"


def gib(value: float) -> str:
    """Bytes: “139.8 GiB”."""
    return f"{value / 2**30:,.1f} GiB"


def printable(text: str) -> str:
    """`text` without escape sequences and control characters, which a log may hold."""
    return "".join(letter for letter in _ESCAPE.sub("", text) if letter.isprintable() or letter in "\n\t")


def clean(text: str) -> str:
    """`text` as one line."""
    return " ".join(printable(re.sub(r"\s+", " ", text)).split())


def terabytes(value: float) -> str:
    """Bytes per second: “4.10 TB/s”."""
    return f"{value / 1e12:,.2f} TB/s"


def teraflops(value: float) -> str:
    """Operations per second: “790 TFLOP/s”."""
    return f"{value / 1e12:,.0f} TFLOP/s"


def minutes(value: float) -> str:
    """Seconds: “27.3 min”."""
    return f"{value / 60:,.1f} min"
