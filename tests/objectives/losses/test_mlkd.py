"""MLKD against a literal transcription of what its released code does; weights of rows."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_losses import KINDS, assert_slopes, averaged, divergence, draw, log_softmax, softmax
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.losses import TeacherRows, TemperedRows, standardised
from stages.objectives.losses.mlkd import mlkd as loss_of_pairs
from stages.settings import LossSettings
from stages.training.objective import Objective, student_loss

HALF = 8


def pairs(
    kind: str = "mixed", classes: int = 6, seed: int = 0, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weak rows, then as many strong ones of the same labels."""
    student, teacher, labels = draw(kind, classes, 2 * HALF, seed, scale)
    return student, teacher, labels


def mlkd(student: Tensor, teacher: TeacherRows, *more: Any, **named: Any) -> Tensor:
    """Of rows (2B, C), as `pairs` gives them."""
    return loss_of_pairs(student.unflatten(0, (2, -1)), teacher, *more, **named)


def row_loss(z_s: np.ndarray, z_t: np.ndarray, t: float, lskd: bool = False) -> float:
    if lskd:
        z_s, z_t = (
            (z - z.mean(1, keepdims=True)) / (1e-7 + z.std(1, keepdims=True, ddof=1))
            for z in (z_s, z_t)
        )
    pairs = zip(z_s, z_t, strict=True)
    rows = [divergence(log_softmax(r, t), log_softmax(s, t)) for s, r in pairs]
    return float(t**2 * np.mean(rows))


def probabilities(z: np.ndarray, t: float) -> np.ndarray:
    return np.array([softmax(row, t) for row in z])


def class_loss(z_s: np.ndarray, z_t: np.ndarray, t: float) -> float:
    return batch_loss(z_s, z_t, t, of_classes=True)


def batch_loss(z_s: np.ndarray, z_t: np.ndarray, t: float, of_classes: bool = False) -> float:
    """Squared differences of the products of every two rows; of every two classes."""
    p_s, p_t = probabilities(z_s, t), probabilities(z_t, t)
    if of_classes:
        p_s, p_t = p_s.T, p_t.T
    total = 0.0
    for i in range(len(p_s)):
        for j in range(len(p_s)):
            total += float(((p_t[i] * p_t[j]).sum() - (p_s[i] * p_s[j]).sum()) ** 2)
    return total / len(p_s)


def transcribed(student: Tensor, teacher: TeacherRows, first: float, lskd: bool = False) -> float:
    """The terms of the released code in its order, without its weight of .9 and its CE."""
    weak, z_s = slice(HALF), student.double().numpy()
    loss = weak_terms(student[weak], halved(teacher), first, lskd)
    for number, t in enumerate((first, 3.0, 5.0, 2.0, 6.0)):
        half = slice(HALF, None) if number < 3 else weak  # "strong", but of the weak views
        loss += row_loss(z_s[half], rows_at(teacher, t)[half], t, lskd)
    return loss


def rows_at(teacher: TeacherRows, t: float) -> np.ndarray:
    found: np.ndarray = (teacher if isinstance(teacher, Tensor) else teacher.at(t)).double().numpy()
    return found


def halved(teacher: TeacherRows) -> TeacherRows:
    """Of the weak views."""
    if isinstance(teacher, Tensor):
        return teacher[:HALF]
    return TemperedRows(lambda t: teacher.at(t)[:HALF])


def weak_terms(student: Tensor, teacher: TeacherRows, first: float, lskd: bool = False) -> float:
    """`loss_kd_weak + loss_cc_weak + loss_bc_weak`: a scalar times a mask, and its mean."""
    confident = probabilities(rows_at(teacher, 1.0), 1.0)
    mask = confident.max(1) <= np.percentile(confident.max(1), 50)
    class_mask = confident.sum(0) <= np.percentile(confident.sum(0), 50)
    z_s, loss = student.double().numpy(), 0.0
    for t in (first, 3.0, 5.0, 2.0, 6.0):
        z_t = rows_at(teacher, t)
        loss += float(np.mean(row_loss(z_s, z_t, t, lskd) * mask))
        loss += float(np.mean(class_loss(z_s, z_t, t) * class_mask))
        loss += float(np.mean(batch_loss(z_s, z_t, t) * mask))
    return loss


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lskd", [False, True])
def test_it_is_what_the_code_does(kind: str, classes: int, lskd: bool) -> None:
    student, teacher, labels = pairs(kind, classes)
    for first in (4.0, 2.0):
        found = mlkd(student, teacher, labels, first, lskd)
        assert found.shape == ()
        expected = transcribed(student, teacher, first, lskd)
        assert found.item() == pytest.approx(expected, rel=2e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    student, teacher, labels = pairs(classes=3)
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mlkd(leaf, teacher, labels), leaf)
    places = ((0, 0), (HALF - 1, 2), (HALF, 1), (2 * HALF - 1, 0))
    assert_slopes(lambda z: transcribed(z, teacher, 4.0), student, gradient, places)


def test_several_teachers_are_read_at_each_temperature() -> None:
    student, one, labels = pairs()
    mean = averaged([one, pairs(seed=1)[1]], shift=5.0)
    expected = transcribed(student, mean, 4.0)
    assert mlkd(student, mean, labels).item() == pytest.approx(expected, rel=5e-4)


def test_lskd_standardises_the_row_terms_only() -> None:
    """As the objective is fed them: a shift is nothing, a scale is something."""
    student, teacher, labels = pairs()
    objective = Objective(student_loss(LossSettings(name="mlkd", standardise=True)))
    found, ones = objective(student, teacher, labels, torch.ones(2 * HALF)), torch.ones(2 * HALF)
    assert found.item() == pytest.approx(transcribed(student, teacher, 2.0, True), rel=1e-3)
    all_standardised = mlkd(standardised(student), standardised(teacher), labels, 2.0)
    assert (found - all_standardised).abs() > 0.1
    torch.testing.assert_close(
        objective(student + 7, teacher - 3, labels, ones), found, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(16, 6), (3, 5, 6)])
def test_rows_of_one_view_are_refused(shape: tuple[int, ...]) -> None:
    """And not taken for a batch of half the size."""
    rows = torch.randn(shape)
    with pytest.raises(ConfigError):
        loss_of_pairs(rows, rows, torch.zeros(shape[-2], dtype=torch.int64))


def test_rows_of_the_teacher_may_be_stacked_too() -> None:
    student, teacher, labels = pairs()
    stacked = loss_of_pairs(student.view(2, HALF, 6), teacher.view(2, HALF, 6), labels)
    assert torch.equal(stacked, mlkd(student, teacher, labels))


# ---- weights of rows ------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=2 * HALF, max_size=2 * HALF))
@settings(max_examples=25, deadline=None)
def test_rows_of_weight_0_are_as_if_they_were_not_there(chosen: list[bool]) -> None:
    """Whatever the student has in them; nor have they a gradient."""
    student, teacher, labels = pairs()
    keep = torch.tensor(chosen)
    other = torch.where(keep[:, None], student, draw(rows=2 * HALF, classes=6, seed=9)[0])
    values = []
    for logits in (student, other):
        leaf = logits.clone().requires_grad_()
        values.append(mlkd(leaf, teacher, labels, weights=keep.float()))
        (gradient,) = torch.autograd.grad(values[-1], leaf)
        assert gradient.isfinite().all()
        assert not gradient[~keep].any()
    torch.testing.assert_close(*values)
    if not any(chosen):
        assert values[0].item() == 0


def test_a_pair_of_rows_weighs_the_root_of_both() -> None:
    """The class and batch terms by hand, where the row terms are taken away."""
    student, teacher, labels = pairs()
    weights = torch.rand(2 * HALF, generator=torch.Generator().manual_seed(4))
    confident = teacher[:HALF].softmax(1)
    unsure, rare = (
        (v <= v.quantile(0.5)).float().mean().item() for v in (confident.amax(1), confident.sum(0))
    )
    expected = 0.0
    roots = weights[:HALF, None].sqrt() * weights[None, :HALF].sqrt()
    for place, t in enumerate((4.0, 3.0, 5.0, 2.0, 6.0)):
        log_s, log_t = (torch.log_softmax(z / t, 1) for z in (student, teacher))
        weak, strong = (t**2 * weights * (log_t.exp() * (log_t - log_s)).sum(1)).chunk(2)
        expected += unsure * weak.mean().item() + (strong if place < 3 else weak).mean().item()
        p_s, p_t = log_s[:HALF].exp(), log_t[:HALF].exp()
        grams = p_t @ p_t.T - p_s @ p_s.T
        expected += unsure * (roots * grams**2).sum().item() / HALF
        outer = torch.einsum("ia,ib->iab", p_t, p_t) - torch.einsum("ia,ib->iab", p_s, p_s)
        together = torch.einsum("iab,jab->ij", outer, outer)
        expected += rare * (roots * together).sum().item() / 6
    found = mlkd(student, teacher, labels, weights=weights).item()
    assert found == pytest.approx(expected, rel=1e-4)
