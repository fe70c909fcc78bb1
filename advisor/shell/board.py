"""Requests in flight, by load generator and engine: a small file that all load generators of a trial map.

Cell (worker, engine) is written by that worker alone and read by all, so no lock is needed: there is no update that
two could make at once, and an aligned machine word is read as it was before a write or after it, never between. Two
workers that look at the same moment may still choose the same engine. That makes an engine a request too many for as
long as it takes one to end, for the next choice sees it; a lock around look and choice would cost more than it saves.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

from advisor.core.dispatch import least_loaded

_CELL_BYTES: Final = 8


def create(path: Path, workers: int, engines: int) -> None:
    """Write a board on which nothing is in flight. Raises OSError."""
    path.write_bytes(bytes(workers * engines * _CELL_BYTES))


class Board:
    """One worker's hold of the board at `path`. Raises OSError, and ValueError for a file of another size."""

    def __init__(self, path: Path, worker: int, workers: int, engines: int) -> None:
        with path.open("r+b") as file:
            self._cells = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        if len(self._cells) != workers * engines:
            raise ValueError(f"{path} has {len(self._cells)} cells, not {workers} × {engines}")
        self._engines = engines
        self._own = worker * engines
        # Generators that start together, when all counts are zero, begin with different engines.
        self._turn = worker % engines

    def in_flight(self) -> list[int]:
        """Requests in flight at each engine, over all workers."""
        return [sum(self._cells[engine :: self._engines]) for engine in range(self._engines)]

    def choose(self) -> int:
        """The engine for a new request: the one with the fewest in flight, ties in turn. Counts nothing."""
        engine = least_loaded(self.in_flight(), self._turn)
        self._turn = (engine + 1) % self._engines
        return engine

    def take(self, engine: int) -> None:
        """Count one more request of this worker at `engine`."""
        self._cells[self._own + engine] += 1

    def give_back(self, engine: int) -> None:
        """Count one less, however the request ended."""
        self._cells[self._own + engine] -= 1
