"""What time it is, for records."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """The time in UTC, as ISO 8601 with whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
