"""The search for the coarsest step, against trying every one."""

import math

import pytest

from stages.cache.encoding.fidelity import coarsest

FINEST = 300


@pytest.mark.parametrize("slope", [0.2, 1.0, 3.0], ids="slope-{}".format)
@pytest.mark.parametrize("crossing", [-5, 0, 1, 95, 96, 97, 250, 300, 301, 1000])
def test_the_first_that_holds_is_found(crossing: int, slope: float) -> None:
    """Excesses that fall as expected, far more slowly, and faster; with a plateau above."""
    asked: list[int] = []

    def excess(exponent: int) -> float:
        asked.append(exponent)
        return min(2.0 ** (slope * (crossing - exponent) / 16), 50.0)

    found = coarsest(excess, FINEST, 16)

    holding = [e for e in range(FINEST + 1) if excess(e) <= 1]
    assert found == (holding[0] if holding else None)
    assert all(0 <= exponent <= FINEST for exponent in asked)


@pytest.mark.parametrize("above", [math.nan, math.inf, 2.0])
def test_a_step_in_a_sudden_fall_is_found(above: float) -> None:
    asked: list[int] = []

    def excess(exponent: int) -> float:
        asked.append(exponent)
        return above if exponent < 201 else 0.0

    assert coarsest(excess, FINEST, 16) == 201
    assert len(asked) < 20
