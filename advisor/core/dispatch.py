"""Which engine gets the next request."""

from __future__ import annotations

from collections.abc import Sequence


def least_loaded(in_flight: Sequence[int], turn: int) -> int:
    """The engine with the fewest requests in flight; among equals the first from engine `turn` on, in a circle.

    Whoever asks moves `turn` on to the engine after the answer, so that ties are dealt out in turn.
    """
    engines = len(in_flight)
    return min(((turn + step) % engines for step in range(engines)), key=in_flight.__getitem__)
