"""CRLD against a transcription of its released loss, row after row; weights of rows."""

import numpy as np
import pytest
import torch
from row_losses import KINDS, assert_slopes, divergence, draw, log_softmax, softmax
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.losses.crld import crld

HALF = 8


def transcribed(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    t: float = 4.0,
    thresholds: tuple[float, float] = (0.9, 0.2),
) -> float:
    """2 mean(m_w (KD_ww + KD_ss)) + .5 mean(m_s (KD_sw + KD_ws)); a pair weighs the root of both.

    Rows (2B, C), the weak views first.
    """
    half = len(student) // 2
    z_s, z_t = student.double().numpy(), teacher.double().numpy()
    w = np.ones(2 * half) if weights is None else weights.double().numpy()

    def kd(of_student: int, of_teacher: int) -> float:
        rows = log_softmax(z_t[of_teacher], t), log_softmax(z_s[of_student], t)
        return float((w[of_student] * w[of_teacher]) ** 0.5 * t**2 * divergence(*rows))

    total = 0.0
    for weak in range(half):
        strong = weak + half
        if softmax(z_t[weak]).max() >= thresholds[0]:
            total += 2 * (kd(weak, weak) + kd(strong, strong))
        if softmax(z_t[strong]).max() >= thresholds[1]:
            total += 0.5 * (kd(strong, weak) + kd(weak, strong))
    return total / half


def loss_of(student: Tensor, teacher: Tensor, labels: Tensor, **named: object) -> Tensor:
    return crld(student.unflatten(0, (2, -1)), teacher, labels, **named)  # type: ignore[arg-type]


@pytest.mark.parametrize("thresholds", [(0.9, 0.2), (0.5, 0.6), (0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_code_does(kind: str, thresholds: tuple[float, float]) -> None:
    student, teacher, labels = draw(kind, 6, 2 * HALF)
    weak, strong = thresholds
    for weights in (None, torch.rand(2 * HALF, generator=torch.Generator().manual_seed(1))):

        def expected(z: Tensor, w: Tensor | None = weights) -> float:
            return transcribed(z, teacher, w, thresholds=thresholds)

        leaf = student.clone().requires_grad_()
        found = loss_of(leaf, teacher, labels, sure_weak=weak, sure_strong=strong, weights=weights)
        assert found.shape == ()
        assert found.item() == pytest.approx(expected(student), rel=2e-4, abs=1e-6)
        (gradient,) = torch.autograd.grad(found, leaf)
        places = ((0, 0), (HALF - 1, 5), (HALF, 1), (2 * HALF - 1, 3))
        assert_slopes(expected, student, gradient, places)


def test_lskd_standardises_the_kd_terms_and_not_the_masks() -> None:
    student, teacher, labels = draw("mixed", 6, 2 * HALF)
    z_s, z_t = ((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True) for z in (student, teacher))
    all_sure = transcribed(z_s, z_t, thresholds=(0.0, 0.0))
    found = loss_of(student, teacher, labels, standardise=True, sure_weak=0.0, sure_strong=0.0)
    assert found.item() == pytest.approx(all_sure, rel=1e-3)
    sharp = loss_of(student, teacher * 10, labels, standardise=True)
    assert sharp.item() == pytest.approx(all_sure, rel=1e-3)  # nothing was masked


def test_rows_of_one_view_are_refused() -> None:
    rows = torch.randn(16, 6)
    with pytest.raises(ConfigError, match="weak and of a strong view"):
        crld(rows, rows, torch.zeros(16, dtype=torch.int64))
