"""LA, KA-LSR, LR and RC against their formulas: what they do on right and on wrong rows."""

import functools
import math

import numpy as np
import pytest
import torch
from row_losses import (
    KINDS,
    At,
    Row,
    RowLoss,
    averaged,
    by_formula,
    divergence,
    draw,
    log_softmax,
    part_of,
    softmax,
)
from test_kd import kd_formula
from torch import Tensor

from stages.objectives.losses import kd
from stages.objectives.losses.corrections import ka_lsr, la, lr, rc, swapped


def la_formula(z_s: Row, at: At, y: int, held: Row, temperature: float = 4.0) -> float:
    """Swapped in probability space."""
    t = temperature
    log_p = log_softmax(at(t), t)
    top = int(log_p.argmax())
    log_p[y], log_p[top] = log_p[top], log_p[y]
    return t**2 * divergence(log_p, log_softmax(z_s, t))


class TestLa(RowLoss):
    loss, formula = staticmethod(la), staticmethod(la_formula)
    parameters = ({"temperature": 2.0}, {}, {"temperature": 1.0})
    reads = (2.0,)


def ka_lsr_formula(
    z_s: Row, at: At, y: int, held: Row, temperature: float = 4.0, epsilon: float = 0.1
) -> float:
    t, classes = temperature, len(z_s)
    if int(at(t).argmax()) == y:
        return kd_formula(z_s, at, y, held, t)
    log_s, total = log_softmax(z_s, t), 0.0
    for c in range(classes):
        p = 1 - epsilon if c == y else epsilon / (classes - 1)
        total += p * (math.log(p) - log_s[c]) if p else 0.0
    return t**2 * total


class TestKaLsr(RowLoss):
    loss, formula = staticmethod(ka_lsr), staticmethod(ka_lsr_formula)
    parameters = ({"temperature": 2.0}, {}, {"epsilon": 0.4}, {"epsilon": 0.0}, {"epsilon": 1.0})
    reads = (2.0,)


def lr_formula(z_s: Row, at: At, y: int, held: Row, alpha: float = 4.0, beta: float = 0.8) -> float:
    z_t = at(1.0)
    top = int(z_t.argmax())
    if top == y:
        return float(-log_softmax(z_s)[y] + alpha * np.mean((z_s - z_t) ** 2))
    p_s, p_t = softmax(z_s), softmax(z_t)
    share = beta / (p_t[top] - p_t[y] + 1)
    revised = [share * p + (1 - share) * (c == y) for c, p in enumerate(p_t)]
    return float(np.mean((p_s - revised) ** 2))


class TestLr(RowLoss):
    loss = staticmethod(functools.partial(lr, average="batch"))
    formula = staticmethod(lr_formula)
    parameters = ({}, {"alpha": 1.0, "beta": 0.5})
    unmoved = "teacher"  # the mean squared error is of logits


def rc_formula(
    z_s: Row, at: At, y: int, held: Row, temperature: float = 4.0, beta: float = 0.1
) -> float:
    t, refined = temperature, held.copy()
    refined[y] = held[y] + held.max()
    itself = t**2 * divergence(log_softmax(refined, t), log_softmax(z_s, t))
    return kd_formula(z_s, at, y, held, t) + beta * itself


class TestRc(RowLoss):
    loss, formula = staticmethod(rc), staticmethod(rc_formula)
    parameters = ({"temperature": 2.0}, {}, {"beta": 1.0})
    reads = (2.0,)
    unmoved = "student"  # its largest logit is added to the label's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 4])
def test_the_swap_of_partial_rows_is_exact(kind: str, k: int) -> None:
    """LA of partial rows is KD with part of the swapped row."""
    student, teacher, labels = draw(kind)
    part = part_of(teacher, labels, k)
    kept = part.kept()
    assert kept is not None
    for t in (1.0, 4.0):
        found, expected = (
            (swapped(rows, labels) / t).softmax(1).gather(1, kept) for rows in (part.at(t), teacher)
        )
        torch.testing.assert_close(found, expected)
    if kind == "right":
        rows = [loss(student, part, labels, reduction="none") for loss in (la, kd)]
        torch.testing.assert_close(*rows)


def test_wrong_rows_of_ka_lsr_need_nothing_but_the_label() -> None:
    student, teacher, labels = draw("wrong")
    exact = ka_lsr(student, teacher, labels, reduction="none")
    other = draw("wrong", seed=3)[1].scatter(1, labels[:, None], -50.0)
    for rows in (part_of(teacher, labels, 2), part_of(teacher, labels, 4), other):
        torch.testing.assert_close(ka_lsr(student, rows, labels, reduction="none"), exact)


def test_what_rc_adds_does_not_read_the_teacher() -> None:
    student, teacher, labels = draw()
    first, *others = (
        rc(student, z, labels, reduction="none") - kd(student, z, labels, reduction="none")
        for z in (teacher, teacher.flip(1), averaged([teacher, student]))
    )
    for added in others:
        torch.testing.assert_close(added, first, rtol=1e-3, atol=1e-4)


def released_lr(z_s: Tensor, z_t: Tensor, labels: Tensor) -> float:
    """`revision_loss` of the code of arXiv 2408.07703, on the two sub-batches, in float64."""
    rows = by_formula(lr_formula, z_s, lambda _: z_t, labels, {})
    right = (z_t.argmax(1) == labels).numpy()
    return float(sum(rows[kind].mean() for kind in (right, ~right) if kind.any()))


@pytest.mark.parametrize("wrong", [0, 1, 3, 4])
def test_lr_averages_each_kind_over_its_own_rows(wrong: int) -> None:
    """As released; a batch without a kind has nothing of it."""
    student, teacher, labels = draw("right", 5, 4)
    labels = torch.where(torch.arange(4) < wrong, teacher.argsort(1)[:, 0], labels)
    expected = released_lr(student, teacher, labels)
    leaf = student.clone().requires_grad_()
    value = lr(leaf, teacher, labels)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    rows = lr(student, teacher, labels, average="batch", reduction="none")
    mean = lr(student, teacher, labels, average="batch").item()
    assert mean == pytest.approx(rows.mean().item())
    if wrong in (0, 4):
        assert mean == pytest.approx(expected, rel=1e-5)


def test_the_released_revision_loss_of_a_batch() -> None:
    """What `revision_loss` of zju-SWJ/RLD (d54578f) gives: one row is right, three are wrong."""
    teacher = torch.tensor(
        [[4.0, 1.0, 0.0, -1.0], [3.0, 2.0, 0.0, 1.0], [0.0, 5.0, 1.0, -2.0], [1.0, -1.0, 2.0, 4.0]]
    )
    student = torch.tensor(
        [[2.0, 1.0, 1.0, -1.0], [1.0, 2.0, -1.0, 0.0], [3.0, 1.0, 0.0, -1.0], [0.0, 0.0, 1.0, 2.0]]
    )
    labels = torch.tensor([0, 1, 0, 2])
    assert lr(student, teacher, labels).item() == pytest.approx(5.609188941, rel=1e-6)
