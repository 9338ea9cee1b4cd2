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
    shiftable = False  # the mean squared error is of logits


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


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_logits_swaps_probabilities(kind: str) -> None:
    _, teacher, labels = draw(kind)
    for t in (1.0, 4.0):
        torch.testing.assert_close(
            (swapped(teacher, labels) / t).softmax(1), swapped((teacher / t).softmax(1), labels)
        )
    assert torch.equal(swapped(teacher, labels).argmax(1), labels)
    assert torch.equal(swapped(teacher, labels).sort(1).values, teacher.sort(1).values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 4])
def test_the_swap_of_partial_rows_is_exact(kind: str, k: int) -> None:
    """LA of partial rows is KD with part of the swapped row."""
    student, teacher, labels = draw(kind)
    part = part_of(teacher, labels, k)
    found = la(student, part, labels, reduction="none")
    again = part_of(teacher, labels, k)
    kept = part.kept()
    assert kept is not None
    for t in (1.0, 4.0):
        probabilities = (swapped(again.at(t), labels) / t).softmax(1).gather(1, kept)
        expected = (swapped(teacher, labels) / t).softmax(1).gather(1, kept)
        torch.testing.assert_close(probabilities, expected)
    if kind == "right":
        torch.testing.assert_close(found, kd(student, part, labels, reduction="none"))


@pytest.mark.parametrize("k", [2, 4])
def test_wrong_rows_of_ka_lsr_need_nothing_but_the_label(k: int) -> None:
    student, teacher, labels = draw("wrong")
    exact = ka_lsr(student, teacher, labels, reduction="none")
    part = part_of(teacher, labels, k)
    torch.testing.assert_close(ka_lsr(student, part, labels, reduction="none"), exact)
    other = draw("wrong", seed=3)[1]
    other = other.scatter(1, labels[:, None], -50.0)
    torch.testing.assert_close(ka_lsr(student, other, labels, reduction="none"), exact)


def test_what_rc_adds_does_not_read_the_teacher() -> None:
    student, teacher, labels = draw()
    added = [
        rc(student, z, labels, reduction="none") - kd(student, z, labels, reduction="none")
        for z in (teacher, teacher.flip(1), averaged([teacher, student]))
    ]
    torch.testing.assert_close(added[0], added[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(added[0], added[2], rtol=1e-3, atol=1e-4)


def released_lr(z_s: Tensor, z_t: Tensor, labels: Tensor) -> float:
    """`revision_loss` of the code of arXiv 2408.07703, on the two sub-batches, in float64."""
    total, rows = 0.0, range(len(labels))
    kinds = z_t.argmax(1) == labels
    for right in (True, False):
        of_kind = [
            lr_formula(z_s[i].double().numpy(), lambda _, i=i: z_t[i].double().numpy(), int(y), z_s)
            for i, y in zip(rows, labels, strict=True)
            if bool(kinds[i]) == right
        ]
        total += sum(of_kind) / len(of_kind) if of_kind else 0.0
    return total


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
