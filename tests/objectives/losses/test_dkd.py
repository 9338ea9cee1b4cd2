"""DKD and NKD against their formulas; KD as the sum of DKD's parts."""

import math

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
from torch.nn.functional import one_hot

from stages.objectives.losses import kd
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
@pytest.mark.parametrize("t", [1.0, 4.0])
def test_kd_is_tckd_and_the_rest_of_nckd(kind: str, t: float) -> None:
    """KL(p_t || p_s) = TCKD + (1 - p_t(y)) NCKD: Zhao et al. 2022, eq. 7."""
    student, teacher, labels = draw(kind)
    tckd = dkd(student, teacher, labels, t, alpha=1.0, beta=0.0, reduction="none")
    nckd = dkd(student, teacher, labels, t, alpha=0.0, beta=1.0, reduction="none")
    not_label = 1 - (teacher / t).softmax(1).gather(1, labels[:, None]).squeeze(1)
    whole = kd(student, teacher, labels, t, reduction="none")
    torch.testing.assert_close(tckd + not_label * nckd, whole, rtol=1e-4, atol=1e-5)


def test_two_classes_have_no_nckd() -> None:
    student, teacher, labels = draw(classes=2)
    rows = dkd(student, teacher, labels, alpha=0.0, reduction="none")
    assert torch.equal(rows, torch.zeros(12))


def test_the_gradient_of_nkd_has_the_direction_of_its_divergence() -> None:
    """A cross-entropy: p_t(y) (p_s - onehot(y)) + gamma (q_s - q_t) at T = 1."""
    student, teacher, labels = draw(rows=1)
    leaf = student.clone().requires_grad_()
    nkd(leaf, teacher, labels, gamma=2.0).backward()
    p_s, p_t = student.softmax(1), teacher.softmax(1)
    label = one_hot(labels, 10).bool()
    q_s, q_t = (p.masked_fill(label, 0) for p in (p_s, p_t))
    q_s, q_t = (q / q.sum(1, keepdim=True) for q in (q_s, q_t))
    expected = p_t[label] * (p_s - label.float()) + 2.0 * (q_s - q_t)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 4])
def test_what_is_exact_of_partial_rows(kind: str, k: int) -> None:
    """TCKD, and the first term of NKD."""
    student, teacher, labels = draw(kind)
    both = (part_of(teacher, labels, k), teacher)
    tckd = [dkd(student, rows, labels, beta=0.0, reduction="none") for rows in both]
    first = [nkd(student, rows, labels, 4.0, gamma=0.0, reduction="none") for rows in both]
    torch.testing.assert_close(*tckd, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-5)
