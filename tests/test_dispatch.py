"""Which engine gets the next request, and the counts by which several processes decide that together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.dispatch import least_loaded
from advisor.shell.board import Board, create

ROOT = Path(__file__).parent.parent


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 7))
def test_no_engine_has_fewer_requests_than_the_chosen_one(in_flight, turn):
    chosen = least_loaded(in_flight, turn % len(in_flight))
    assert in_flight[chosen] == min(in_flight)


@given(st.integers(1, 8), st.integers(1, 5))
def test_engines_that_are_equal_are_chosen_in_turn(engines, rounds):
    turn, chosen = 0, []
    for _ in range(rounds * engines):
        chosen.append(least_loaded([3] * engines, turn))
        turn = (chosen[-1] + 1) % engines
    assert chosen == list(range(engines)) * rounds


def boards(path: Path, workers: int, engines: int) -> list[Board]:
    create(path, workers, engines)
    return [Board(path, worker, workers, engines) for worker in range(workers)]


@given(st.lists(st.integers(0, 2), max_size=60))
def test_workers_in_any_order_keep_the_engines_level(tmp_path_factory, order):
    held = boards(tmp_path_factory.mktemp("board") / "in-flight", 3, 4)
    for worker in order:
        board = held[worker]
        board.take(board.choose())
        assert max(board.in_flight()) - min(board.in_flight()) <= 1
    assert all(sum(board.in_flight()) == len(order) for board in held)


def test_a_place_that_is_given_back_is_the_next_that_anyone_takes(tmp_path):
    first, second = boards(tmp_path / "in-flight", 2, 3)
    for _ in range(6):
        first.take(first.choose())
    first.give_back(1)
    assert second.in_flight() == [2, 1, 2]
    assert second.choose() == 1


def test_generators_that_start_together_begin_with_different_engines(tmp_path):
    assert [board.choose() for board in boards(tmp_path / "in-flight", 3, 3)] == [0, 1, 2]


def test_what_one_process_counts_another_one_reads(tmp_path):
    (mine, _) = boards(tmp_path / "in-flight", 2, 2)
    code = """
import sys
from pathlib import Path
from advisor.shell.board import Board
board = Board(Path(sys.argv[1]), 1, 2, 2)
for _ in range(1000):
    board.take(1)
board.give_back(1)
"""
    for _ in range(3):
        mine.take(0)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "in-flight")], cwd=ROOT, check=True, timeout=20)
    assert mine.in_flight() == [3, 999]


def test_a_board_of_another_size_is_refused(tmp_path):
    create(tmp_path / "in-flight", 2, 2)
    with pytest.raises(ValueError, match="4 cells, not 2 × 3"):
        Board(tmp_path / "in-flight", 0, 2, 3)
