"""What a search found on its way, beside the trials that it asked for. Pure."""

from __future__ import annotations

from advisor.core.records import EngineSettings, Outcome, Record


class LeftOut(Record, frozen=True):
    """A candidate that was not run, with the reason; it appears in the report like the others."""

    engines: int
    mps: bool
    thread_percentage: int | None
    outcome: Outcome
    why: str
    worst_product_error: float | None = None
    settings: EngineSettings | None = None


class Outline(Record, frozen=True):
    """What a finished search found on its way: the full load, the settings of the best single engine, those that the
    settings of several are made from, how many engines showed that these are to differ, and what was not run.
    """

    concurrency: int
    tuned: EngineSettings
    several: EngineSettings
    shown_by: int
    left_out: list[LeftOut]
