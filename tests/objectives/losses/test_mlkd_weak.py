"""MLKD of one view: the weak terms of the released code, and those alone."""

import numpy as np
import pytest
import torch
from row_losses import KINDS, averaged, draw
from test_mlkd import batch_loss, class_loss, probabilities, row_loss
from torch import Tensor

from stages.objectives.losses import TeacherRows
from stages.objectives.losses.mlkd_weak import mlkd_weak


def transcribed(student: Tensor, teacher: TeacherRows, first: float, lskd: bool = False) -> float:
    """`loss_kd_weak + loss_cc_weak + loss_bc_weak` as they are written, without their .9."""

    def rows(t: float) -> np.ndarray:
        z = teacher if isinstance(teacher, Tensor) else teacher.at(t)
        found: np.ndarray = z.double().numpy()
        return found

    def scaled(z: np.ndarray) -> np.ndarray:
        deviation = 1e-7 + z.std(1, keepdims=True, ddof=1)
        found: np.ndarray = (z - z.mean(1, keepdims=True)) / deviation if lskd else z
        return found

    confident = probabilities(rows(1.0), 1.0)
    mask = confident.max(1) <= np.percentile(confident.max(1), 50)
    class_mask = confident.sum(0) <= np.percentile(confident.sum(0), 50)
    z_s, loss = student.double().numpy(), 0.0
    for t in (first, 3.0, 5.0, 2.0, 6.0):
        loss += float(np.mean(row_loss(scaled(z_s), scaled(rows(t)), t) * mask))
        loss += float(np.mean(class_loss(z_s, rows(t), t) * class_mask))
        loss += float(np.mean(batch_loss(z_s, rows(t), t) * mask))
    return loss


@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lskd", [False, True])
def test_it_is_what_the_code_does_to_weak_views(kind: str, classes: int, lskd: bool) -> None:
    student, teacher, labels = draw(kind, classes, 8)
    leaf = student.clone().requires_grad_()
    found = mlkd_weak(leaf, teacher, labels, 4.0, lskd)
    assert found.item() == pytest.approx(transcribed(student, teacher, 4.0, lskd), rel=2e-4)
    found.backward()
    assert leaf.grad is not None
    for i, c in ((0, 0), (7, 1)):
        step = torch.zeros(8, classes, dtype=torch.float64)
        step[i, c] = 1e-5
        up, down = (transcribed(student + d, teacher, 4.0, lskd) for d in (step, -step))
        assert leaf.grad[i, c].item() == pytest.approx((up - down) / 2e-5, rel=2e-3, abs=2e-4)


def test_several_teachers_are_read_at_each_temperature() -> None:
    student, one, labels = draw(classes=6)
    mean = averaged([one, draw(classes=6, seed=1)[1]], shift=5.0)
    expected = transcribed(student, mean, 4.0)
    assert mlkd_weak(student, mean, labels).item() == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("weight", [1e-6, 0.3, 50.0])
def test_equal_weights_scale_the_loss(weight: float) -> None:
    student, teacher, labels = draw()
    found = mlkd_weak(student, teacher, labels, weights=torch.full((12,), weight))
    torch.testing.assert_close(found, weight * mlkd_weak(student, teacher, labels))
