"""Progress on stderr: one living line on a terminal, one line per finished trial anywhere."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status

from advisor.core.tried import Tried, slug

# A pipe or a log gets a sign of life this often.
QUIET_S = 30.0


def say(console: Console, text: str) -> None:
    """A line on stderr. A terminal that was closed is no reason to stop half-way: there is cleaning up to be done."""
    with suppress(OSError):
        console.print(text, soft_wrap=True, markup=False)


class Progress:
    """Says what is going on; never writes to stdout."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._last_line_s = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            with suppress(OSError):
                self._status.stop()
            self._status = None

    def say(self, text: str) -> None:
        """What is going on right now."""
        if self._status is not None:
            with suppress(OSError):
                self._status.update(text)
        elif time.monotonic() - self._last_line_s >= QUIET_S:
            self._line(f"… {text}")

    def trial(self, tried: Tried) -> None:
        """A trial is finished."""
        name = slug(tried.spec)
        if tried.measurement is not None:
            rate = tried.measurement.throughput_tok_per_s
            margin = ""
            if rate.low is not None and rate.high is not None:
                margin = f" ±{(rate.high - rate.low) / 2 / rate.value * 100:.1f} %"
            self._line(f"{name}: {rate.value:,.0f} tokens/s{margin}")
        elif tried.ok:
            self._line(f"{name}: done")
        else:
            self._line(f"{name}: {tried.outcome.replace('_', ' ')} ({tried.why})")

    def _line(self, text: str) -> None:
        self._last_line_s = time.monotonic()
        say(self._console, text)
