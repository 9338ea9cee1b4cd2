"""DIST against its formula, on whole batches; and what weights of rows mean to it."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_losses import KINDS, Row, assert_slopes, averaged, draw, softmax
from torch import Tensor

from stages.objectives.losses.dist import dist


def pearson(a: Sequence[float] | Row, b: Sequence[float] | Row) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    pairs = list(zip(a, b, strict=True))
    together = sum((x - mean_a) * (y - mean_b) for x, y in pairs)
    alone = sum((x - mean_a) ** 2 for x, _ in pairs) * sum((y - mean_b) ** 2 for _, y in pairs)
    return float(together / (alone**0.5 + 1e-8))


def formula(
    student: Tensor, teacher: Tensor, t: float = 4.0, beta: float = 1.0, gamma: float = 1.0
) -> float:
    u, v = (np.array([softmax(row, t) for row in z.double().numpy()]) for z in (student, teacher))
    inter = 1 - np.mean([pearson(a, b) for a, b in zip(u, v, strict=True)])
    intra = 1 - np.mean([pearson(a, b) for a, b in zip(u.T, v.T, strict=True)])
    return float(t**2 * (beta * inter + gamma * intra))


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameters", [(4.0, 1.0, 1.0), (1.0, 2.0, 0.0), (2.0, 0.0, 0.5)], ids=str)
def test_it_is_the_formula(kind: str, classes: int, parameters: tuple[float, float, float]) -> None:
    student, teacher, labels = draw(kind, classes)
    found = dist(student, teacher, labels, *parameters)
    assert found.item() == pytest.approx(formula(student, teacher, *parameters), rel=1e-3, abs=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    student, teacher, labels = draw(classes=4, rows=5)
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dist(leaf, teacher, labels), leaf)
    assert_slopes(lambda z: formula(z, teacher), student, gradient, ((0, 0), (1, 3), (4, 2)))


def test_extreme_logits_and_batches_without_variation() -> None:
    student, teacher, labels = draw()
    for z_s, z_t in (
        (student.sign() * 80, teacher.sign() * 80),
        (student[:1] * 80, teacher[:1]),  # columns of one row
        (torch.zeros(12, 10), teacher),
        (student, torch.zeros(12, 10)),
    ):
        leaf = z_s.clone().requires_grad_()
        value = dist(leaf, z_t, labels[: len(z_s)])
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_several_teachers_are_read_at_the_temperature() -> None:
    student, one, labels = draw()
    mean = averaged([one, draw(seed=1)[1]], shift=5.0)
    expected = formula(student, mean.at(4.0))
    assert dist(student, mean, labels).item() == pytest.approx(expected, rel=1e-3)


# ---- weights of rows ------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=12, max_size=12))
@settings(max_examples=25, deadline=None)
def test_rows_of_weight_0_are_as_if_they_were_not_there(chosen: list[bool]) -> None:
    """But for the share that the others are of the batch; no weight at all is no loss."""
    student, teacher, labels = draw()
    keep, leaf = torch.tensor(chosen), student.clone().requires_grad_()
    found = dist(leaf, teacher, labels, weights=keep.float())
    (gradient,) = torch.autograd.grad(found, leaf)
    if not any(chosen):
        assert found.item() == 0
        assert torch.equal(gradient, torch.zeros(12, 10))
        return
    expected = dist(leaf[keep], teacher[keep], labels[keep]) * keep.float().mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, leaf)[0], rtol=1e-3, atol=1e-5
    )


def test_a_weight_is_a_number_of_copies() -> None:
    """Rows with whole weights weigh as a batch in which they are repeated."""
    student, teacher, labels = draw(rows=4)
    copies = torch.tensor([1, 3, 0, 2])
    again = torch.arange(4).repeat_interleave(copies)
    found = dist(student, teacher, labels, weights=copies.float())
    expected = dist(student[again], teacher[again], labels[again]) * 6 / 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
