"""MLKD against a literal transcription of what its released code does; weights of rows."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_losses import KINDS, averaged, draw, log_softmax, softmax
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.losses import TeacherRows, standardised
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


def row_loss(z_s: np.ndarray, z_t: np.ndarray, t: float) -> float:
    total = 0.0
    for s, r in zip(z_s, z_t, strict=True):
        log_s, log_t = log_softmax(s, t), log_softmax(r, t)
        total += float((np.exp(log_t) * (log_t - log_s)).sum())
    return float(t**2 * total / len(z_s))


def probabilities(z: np.ndarray, t: float) -> np.ndarray:
    return np.array([softmax(row, t) for row in z])


def class_loss(z_s: np.ndarray, z_t: np.ndarray, t: float) -> float:
    p_s, p_t = probabilities(z_s, t), probabilities(z_t, t)
    classes = p_s.shape[1]
    total = 0.0
    for a in range(classes):
        for b in range(classes):
            total += float(((p_t[:, a] * p_t[:, b]).sum() - (p_s[:, a] * p_s[:, b]).sum()) ** 2)
    return total / classes


def batch_loss(z_s: np.ndarray, z_t: np.ndarray, t: float) -> float:
    p_s, p_t = probabilities(z_s, t), probabilities(z_t, t)
    total = 0.0
    for i in range(len(p_s)):
        for j in range(len(p_s)):
            total += float(((p_t[i] * p_t[j]).sum() - (p_s[i] * p_s[j]).sum()) ** 2)
    return total / len(p_s)


def transcribed(student: Tensor, teacher: TeacherRows, first: float, lskd: bool = False) -> float:
    """The terms of the released code in its order, without its weight of .9 and its CE."""

    def rows(z: TeacherRows, t: float) -> np.ndarray:
        found: np.ndarray = (z if isinstance(z, Tensor) else z.at(t)).double().numpy()
        return found

    def scaled(z: np.ndarray) -> np.ndarray:
        found: np.ndarray = (z - z.mean(1, keepdims=True)) / (
            1e-7 + z.std(1, keepdims=True, ddof=1)
        )
        return found if lskd else z

    confident = probabilities(rows(teacher, 1.0)[:HALF], 1.0)
    confidence, of_class = confident.max(1), confident.sum(0)
    mask = confidence <= np.percentile(confidence, 50)
    class_mask = of_class <= np.percentile(of_class, 50)
    loss = 0.0
    for t in (first, 3.0, 5.0, 2.0, 6.0):  # "weak": a scalar times a mask, and its mean
        z_s, z_t = student.double().numpy(), rows(teacher, t)
        loss += float(np.mean(row_loss(scaled(z_s)[:HALF], scaled(z_t)[:HALF], t) * mask))
        loss += float(np.mean(class_loss(z_s[:HALF], z_t[:HALF], t) * class_mask))
        loss += float(np.mean(batch_loss(z_s[:HALF], z_t[:HALF], t) * mask))
    for t, half in (
        (first, slice(HALF, None)),
        (3.0, slice(HALF, None)),
        (5.0, slice(HALF, None)),
        (2.0, slice(HALF)),  # "strong", but of the weak views
        (6.0, slice(HALF)),
    ):
        z_s, z_t = student.double().numpy(), rows(teacher, t)
        loss += row_loss(scaled(z_s)[half], scaled(z_t)[half], t)
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
    mlkd(leaf, teacher, labels).backward()
    assert leaf.grad is not None
    for i, c in ((0, 0), (HALF - 1, 2), (HALF, 1), (2 * HALF - 1, 0)):
        step = torch.zeros(2 * HALF, 3, dtype=torch.float64)
        step[i, c] = 1e-5
        up, down = (transcribed(student + d, teacher, 4.0) for d in (step, -step))
        assert leaf.grad[i, c].item() == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-4)


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


def test_extreme_logits() -> None:
    student, teacher, labels = pairs()
    leaf = (student.sign() * 200).requires_grad_()
    value = mlkd(leaf, teacher.sign() * -200, labels)
    value.backward()
    assert value.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(16, 6), (3, 5, 6)])
def test_rows_of_one_view_are_refused(shape: tuple[int, ...]) -> None:
    """And not taken for a batch of half the size."""
    rows = torch.randn(shape)
    with pytest.raises(ConfigError, match="weak and of a strong view"):
        loss_of_pairs(rows, rows, torch.zeros(shape[-2], dtype=torch.int64))


def test_rows_of_the_teacher_may_be_stacked_too() -> None:
    student, teacher, labels = pairs()
    stacked = loss_of_pairs(student.view(2, HALF, 6), teacher.view(2, HALF, 6), labels)
    assert torch.equal(stacked, mlkd(student, teacher, labels))


# ---- weights of rows ------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 1e-6, 0.3, 50.0])
def test_equal_weights_scale_the_loss(weight: float) -> None:
    student, teacher, labels = pairs()
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    found = mlkd(leaves[0], teacher, labels, weights=torch.full((2 * HALF,), weight))
    plain = mlkd(leaves[1], teacher, labels)
    torch.testing.assert_close(found, weight * plain, rtol=1e-4, atol=0)
    gradients = [torch.autograd.grad(v, z)[0] for v, z in zip((found, plain), leaves, strict=True)]
    torch.testing.assert_close(gradients[0], weight * gradients[1], rtol=1e-3, atol=1e-5 * weight)


@given(st.lists(st.booleans(), min_size=2 * HALF, max_size=2 * HALF))
@settings(max_examples=25, deadline=None)
def test_rows_of_weight_0_are_as_if_they_were_not_there(chosen: list[bool]) -> None:
    """Whatever the student has in them; nor have they a gradient."""
    student, teacher, labels = pairs()
    keep = torch.tensor(chosen)
    other = torch.where(keep[:, None], student, draw(rows=2 * HALF, classes=6, seed=9)[0])
    leaves = [z.clone().requires_grad_() for z in (student, other)]
    values = [mlkd(leaf, teacher, labels, weights=keep.float()) for leaf in leaves]
    torch.testing.assert_close(*values)
    for value, leaf in zip(values, leaves, strict=True):
        value.backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert torch.equal(leaf.grad[~keep], torch.zeros(int((~keep).sum()), 6))
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
