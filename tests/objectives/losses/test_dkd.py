"""DKD and NKD against their formulas; KD as the sum of DKD's parts."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from row_losses import (
    KINDS,
    At,
    Row,
    RowLoss,
    divergence,
    draw,
    log_softmax,
    log_sum,
    part_of,
    softmax,
    without,
)

from stages.objectives.losses.dkd import dkd, nkd


def two_way(z: Row, y: int, t: float) -> Row:
    """log [p(y), 1 - p(y)]."""
    log_p = log_softmax(z, t)
    return np.array([log_p[y], log_sum(without(log_p, [y]))])


def dkd_formula(
    z_s: Row, at: At, y: int, held: Row, temperature: float = 4.0, alpha: float = 1.0,
    beta: float = 8.0,
) -> float:  # fmt: skip
    t = temperature
    z_t = at(t)
    tckd = divergence(two_way(z_t, y, t), two_way(z_s, y, t))
    nckd = divergence(*(log_softmax(without(z, [y]), t) for z in (z_t, z_s)))
    return t**2 * (alpha * tckd + beta * nckd)


class TestDkd(RowLoss):
    loss, formula = staticmethod(dkd), staticmethod(dkd_formula)
    parameters = ({"temperature": 2.0, "alpha": 0.5}, {}, {"temperature": 1.0, "beta": 0.5})
    reads = (2.0,)


def nkd_formula(
    z_s: Row, at: At, y: int, held: Row, temperature: float = 1.0, gamma: float = 1.5
) -> float:
    t = temperature
    target = -math.exp(log_softmax(at(1.0))[y]) * log_softmax(z_s)[y]
    others_t, log_s = softmax(without(at(t), [y]), t), log_softmax(without(z_s, [y]), t)
    return float(target - gamma * t**2 * (others_t * log_s).sum())


class TestNkd(RowLoss):
    loss, formula = staticmethod(nkd), staticmethod(nkd_formula)
    parameters = ({"temperature": 3.0, "gamma": 3.5}, {})
    reads = (1.0, 3.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 4])
def test_what_is_exact_of_partial_rows(kind: str, k: int) -> None:
    """TCKD, and the first term of NKD."""
    student, teacher, labels = draw(kind)
    for loss in (partial(dkd, beta=0.0), partial(nkd, temperature=4.0, gamma=0.0)):
        values = [
            loss(student, rows, labels, reduction="none")
            for rows in (part_of(teacher, labels, k), teacher)
        ]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
