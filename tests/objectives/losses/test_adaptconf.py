"""AdaptConf against its formula, its code written out, and where both sides agree."""

import numpy as np
import pytest
import torch
from row_losses import KINDS, At, Row, RowLoss, divergence, draw, log_softmax, part_of, softmax

from stages.objectives.losses import kd
from stages.objectives.losses.adaptconf import adaptconf


def share(z_s: Row, z_t: Row, c: float) -> float:
    """How much of a row is the student's own answer."""
    own, theirs = (softmax(z_s)[z.argmax()] ** (1 / c) for z in (z_s, z_t))
    return float(theirs / (own + theirs))


def adaptconf_formula(
    z_s: Row, at: At, y: int, held: Row, temperature: float = 1.0, sure_temperature: float = 0.5
) -> float:
    t, b = temperature, share(held, at(temperature), sure_temperature)
    taught = t**2 * divergence(log_softmax(at(t), t), log_softmax(z_s, t))
    return (1 - b) * taught - b * float(log_softmax(z_s)[held.argmax()])


class TestAdaptConf(RowLoss):
    loss, formula = staticmethod(adaptconf), staticmethod(adaptconf_formula)
    parameters = ({"temperature": 2.0}, {}, {"temperature": 4.0, "sure_temperature": 3.0})
    reads = (2.0,)


@pytest.mark.parametrize(("t", "c"), [(1.0, 0.5), (4.0, 0.5), (2.0, 2.0)])
def test_it_is_the_released_one(t: float, c: float) -> None:
    """`AdaptConf.forward` of ggjy/vision_weak_to_strong, in NumPy, loss and gradient: the weight is
    a softmax of cross-entropies over the threshold, and CE has its gradient p - onehot.
    """
    student, teacher, labels = draw(rows=16)
    leaf = student.clone().requires_grad_()
    z_s, z_t = student.double().numpy(), teacher.double().numpy()
    rows, classes = np.arange(len(z_s)), np.eye(z_s.shape[1])
    own, theirs = z_s.argmax(1), z_t.argmax(1)
    assert 0 < (own == theirs).sum() < len(rows)

    def probabilities(z: Row) -> Row:
        powers = np.exp(z)
        shares: Row = powers / powers.sum(1, keepdims=True)
        return shares

    p = probabilities(z_s)
    ce_self, ce_teacher = -np.log(p[rows, own]), -np.log(p[rows, theirs])
    alpha = np.exp(ce_self / c) / (np.exp(ce_self / c) + np.exp(ce_teacher / c))
    q_s, q_t = probabilities(z_s / t), probabilities(z_t / t)
    kd = t**2 * (q_t * np.log(q_t / q_s)).sum(1)
    expected = ((1 - alpha) * kd).mean() + (alpha * ce_self).mean()
    slope = (1 - alpha)[:, None] * t * (q_s - q_t) + alpha[:, None] * (p - classes[own])

    value = adaptconf(leaf, teacher, labels, t, c)
    (gradient,) = torch.autograd.grad(value, leaf)
    np.testing.assert_allclose(value.item(), expected, rtol=1e-5)
    np.testing.assert_allclose(gradient.numpy(), slope / len(rows), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 4])
def test_the_weight_of_partial_rows_is_exact(kind: str, k: int) -> None:
    student, teacher, labels = draw(kind)
    part = part_of(teacher, labels, k)
    pairs = zip(student.double().numpy(), teacher.double().numpy(), strict=True)
    b = torch.tensor([share(*pair, 0.5) for pair in pairs]).float()
    taught = kd(student, part, labels, 2.0, reduction="none")
    expected = (1 - b) * taught - b * student.log_softmax(1).amax(1)
    found = adaptconf(student, part, labels, 2.0, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
