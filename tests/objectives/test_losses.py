"""The losses against loops in float64, and against DKD's identity."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.objectives.losses import LOSSES, ce, kd

EXTREME = {
    "student-sure": (1e4, 1.0),
    "teacher-sure": (1.0, 1e4),
    "both-sure": (1e4, 1e4),
    "student-beyond-float16": (3e30, 1.0),
}


def draw(rows: int = 32, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits (B, C) and labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, classes, generator=generator) * 3
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def naive_log_softmax(row: list[float], temperature: float) -> list[float]:
    scaled = [value / temperature for value in row]
    top = max(scaled)
    total = top + math.log(sum(math.exp(value - top) for value in scaled))
    return [value - total for value in scaled]


def naive_kd(student: Tensor, teacher: Tensor, temperature: float) -> list[float]:
    rows = []
    for z_s, z_t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        log_s, log_t = naive_log_softmax(z_s, temperature), naive_log_softmax(z_t, temperature)
        divergence = sum(math.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True))
        rows.append(temperature**2 * divergence)
    return rows


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_kd_is_the_formula(classes: int, temperature: float) -> None:
    student, teacher, labels = draw(classes=classes)
    expected = naive_kd(student, teacher, temperature)
    rows = kd(student, teacher, labels, temperature, reduction="none")
    assert rows.shape == (32,)
    np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-4, atol=5e-7 * temperature**2)
    mean = kd(student, teacher, labels, temperature)
    assert mean.shape == ()
    assert mean.item() == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_ce_is_the_formula(classes: int) -> None:
    student, _, labels = draw(classes=classes)
    pairs = zip(student.double().tolist(), labels.tolist(), strict=True)
    expected = [-naive_log_softmax(row, 1.0)[label] for row, label in pairs]
    rows = ce(student, None, labels, reduction="none")
    np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert ce(student, None, labels).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_ce_ignores_teacher_and_temperature() -> None:
    student, teacher, labels = draw()
    assert torch.equal(ce(student, teacher, labels, temperature=7.0), ce(student, None, labels))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_splits_into_the_two_parts_of_dkd(temperature: float) -> None:
    """KL(p_t || p_s) = TCKD + (1 - p_t(y)) NCKD: Zhao et al. 2022, eq. 7."""
    student, teacher, labels = (t.double() if t.is_floating_point() else t for t in draw())
    p_s, p_t = (torch.softmax(z / temperature, 1) for z in (student, teacher))
    s_y, t_y = (p.gather(1, labels[:, None]).squeeze(1) for p in (p_s, p_t))
    tckd = t_y * (t_y / s_y).log() + (1 - t_y) * ((1 - t_y) / (1 - s_y)).log()
    others = torch.ones_like(p_s, dtype=torch.bool).scatter(1, labels[:, None], False)
    hat_s, hat_t = (
        p[others].view(len(p), -1) / (1 - y[:, None]) for p, y in ((p_s, s_y), (p_t, t_y))
    )
    nckd = (hat_t * (hat_t / hat_s).log()).sum(1)
    expected = temperature**2 * (tckd + (1 - t_y) * nckd)
    rows = kd(student, teacher, labels, temperature, reduction="none")
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-5)


def test_kd_is_zero_where_both_agree_up_to_a_constant() -> None:
    student, _, labels = draw()
    shifted = student + torch.arange(32.0)[:, None]
    rows = kd(student, shifted, labels, reduction="none")
    assert rows.abs().max() < 1e-4


@pytest.mark.parametrize(("student_scale", "teacher_scale"), EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_stay_finite(
    loss: Callable[..., Tensor], student_scale: float, teacher_scale: float
) -> None:
    student, teacher, labels = draw()
    student = (student * student_scale).requires_grad_()
    value = loss(student, teacher * teacher_scale, labels, 4.0)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradient_is_the_analytic_one(loss: Callable[..., Tensor]) -> None:
    """d/dz_s of T^2 KL is T (p_s - p_t), of CE p_s - onehot(y)."""
    student, teacher, labels = draw()
    leaf = student.clone().requires_grad_()
    loss(leaf, teacher, labels, 4.0, reduction="none").sum().backward()
    if loss is kd:
        expected = 4.0 * (torch.softmax(student / 4, 1) - torch.softmax(teacher / 4, 1))
    else:
        expected = torch.softmax(student, 1) - torch.nn.functional.one_hot(labels, 10)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_low_precision_logits_are_computed_in_float32(loss: Callable[..., Tensor]) -> None:
    student, teacher, labels = draw()
    for dtype in (torch.bfloat16, torch.float16):
        low = student.to(dtype).requires_grad_()
        rows = loss(low, teacher, labels, 4.0, reduction="none")
        assert rows.dtype == torch.float32
        assert torch.equal(rows, loss(low.float(), teacher, labels, 4.0, reduction="none"))
        rows.sum().backward()
        assert low.grad is not None
        assert low.grad.dtype == dtype
