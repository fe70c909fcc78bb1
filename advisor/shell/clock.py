"""What time it is, for records, and how long a trial took."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Literal

from advisor.core.records import Stage


def now(precision: Literal["seconds", "microseconds"] = "seconds") -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=precision)


class Clock:
    """Seconds since `origin_s`, a value of `time.monotonic()` (None: now), and the stages that a trial went through."""

    def __init__(self, origin_s: float | None = None) -> None:
        self.origin_s = time.monotonic() if origin_s is None else origin_s
        self.stages: list[Stage] = []
        self._open: tuple[str, float] | None = None

    def now(self) -> float:
        return time.monotonic() - self.origin_s

    def stage(self, name: str) -> None:
        self.close()
        self._open = (name, self.now())

    def close(self) -> None:
        if self._open is not None:
            self.stages.append(Stage(name=self._open[0], start_s=self._open[1], end_s=self.now()))
            self._open = None
