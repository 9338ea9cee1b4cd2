"""TTM and WTTM against their formulas: the power transform of probabilities at temperature 1."""

import numpy as np
import pytest
from row_losses import (
    KINDS,
    At,
    Row,
    RowLoss,
    averaged,
    divergence,
    draw,
    log_softmax,
    part_of,
    softmax,
)

from stages.objectives.losses.ttm import ttm, wttm


def ttm_formula(z_s: Row, at: At, y: int, held: Row, temperature: float = 10.0) -> float:
    """q = p^g / U of the rows at T, where their own p is softmax(z) ^ (1 / T)."""
    return divergence(log_softmax(at(temperature), temperature), log_softmax(z_s))


class TestTtm(RowLoss):
    loss, formula = staticmethod(ttm), staticmethod(ttm_formula)
    parameters = ({"temperature": 4.0}, {}, {"temperature": 1.0})
    reads = (4.0,)


def u(at: At, temperature: float) -> float:
    return float(sum(p ** (1 / temperature) for p in softmax(at(1.0))))


def wttm_formula(z_s: Row, at: At, y: int, held: Row, temperature: float = 5.0) -> float:
    return u(at, temperature) * ttm_formula(z_s, at, y, held, temperature)


class TestWttm(RowLoss):
    loss, formula = staticmethod(wttm), staticmethod(wttm_formula)
    parameters = ({"temperature": 4.0}, {}, {"temperature": 1.0})
    reads = (1.0, 4.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 4])
def test_u_of_partial_rows_is_exact(kind: str, k: int) -> None:
    student, teacher, labels = draw(kind)
    part = part_of(teacher, labels, k)
    found = wttm(student, part, labels, reduction="none") / ttm(
        student, part, labels, 5.0, reduction="none"
    )
    powers = teacher.double().softmax(1) ** (1 / 5)
    expected = powers.sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_u_of_several_teachers_is_of_their_mean_at_one() -> None:
    """And not 1, which it is for rows that are log probabilities at either temperature."""
    student, one, labels = draw(scale=0.5)
    mean = averaged([one, draw(seed=1, scale=0.5)[1]])
    ratio = wttm(student, mean, labels, reduction="none") / ttm(
        student, mean, labels, 5.0, reduction="none"
    )
    assert (ratio > 3).all()
    assert (ratio <= 10 ** (1 - 1 / 5) + 1e-4).all()  # what it is for a uniform row
