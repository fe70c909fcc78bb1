import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.core.cores import most_engines, plan
from advisor.core.errors import Unfit

CORES = st.sets(st.integers(0, 511), min_size=3, max_size=200).map(sorted)


def test_sixteen_cores_give_four_engines_three_each_and_four_to_the_load():
    placed = plan(list(range(16)), 4)
    assert placed.engine_cores == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert placed.load_cores == [12, 13, 14, 15]


def test_what_does_not_divide_is_left_unused():
    placed = plan(list(range(10)), 3)
    assert placed.engine_cores == [[0, 1], [2, 3], [4, 5]]
    assert placed.load_cores == [8, 9]


def test_one_engine_too_many_has_no_plan():
    assert most_engines(list(range(16))) == 6
    assert plan(list(range(16)), 6) is not None
    assert plan(list(range(16)), 7) is None


@pytest.mark.parametrize("count", [0, 1, 2])
def test_under_three_cores_are_unfit(count):
    with pytest.raises(Unfit, match="at least 3"):
        plan(list(range(count)), 1)
    with pytest.raises(Unfit):
        most_engines(list(range(count)))


def test_three_cores_serve_one_engine():
    placed = plan([4, 6, 9], 1)
    assert (placed.engine_cores, placed.load_cores) == ([[4, 6]], [9])


@given(CORES, st.integers(1, 100))
def test_shares_are_equal_disjoint_and_never_the_load_generators(cores, engines):
    placed = plan(cores, engines)
    if placed is None:
        assert engines > most_engines(cores)
        return
    assert engines <= most_engines(cores)
    used = [core for share in placed.engine_cores for core in share] + placed.load_cores
    assert len(used) == len(set(used))
    assert set(used) <= set(cores)
    assert len(placed.engine_cores) == engines
    assert len({len(share) for share in placed.engine_cores}) == 1
    assert len(placed.engine_cores[0]) >= 2
    assert 1 <= len(placed.load_cores) <= 4


@given(CORES)
def test_the_load_generator_has_the_same_cores_for_every_number_of_engines(cores):
    loads = {tuple(plan(cores, engines).load_cores) for engines in range(1, most_engines(cores) + 1)}
    assert len(loads) == 1
