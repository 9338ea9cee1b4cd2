"""ABKD against its formula, at the four kinds of alpha and beta, and where it is a known loss."""

import math

import pytest
import torch
from row_losses import KINDS, At, Row, RowLoss, divergence, draw, log_softmax
from torch import Tensor

from stages.objectives.losses import kd
from stages.objectives.losses.abkd import abkd


def abkd_formula(
    z_s: Row, at: At, y: int, held: Row, temperature: float = 4.0, alpha: float = 0.8,
    beta: float = 0.3,
) -> float:  # fmt: skip
    t, a, b = temperature, alpha, beta
    total = 0.0
    for log_p, log_q in zip(log_softmax(at(t), t), log_softmax(z_s, t), strict=True):
        p_a, q_a, p_b, q_b = (math.exp(x) for x in (a * log_p, a * log_q, b * log_p, b * log_q))
        if a == b == 0:
            total += 0.5 * (log_q - log_p) ** 2
        elif a == 0:
            total += (q_b * b * (log_q - log_p) - q_b + p_b) / b
        elif b == 0:
            total += (p_a * a * (log_p - log_q) - p_a + q_a) / a
        else:
            both = a / (a + b) * p_a * p_b + b / (a + b) * q_a * q_b
            total -= (p_a * q_b - both) / (a * b)
    return total


class TestAbkd(RowLoss):
    loss, formula = staticmethod(abkd), staticmethod(abkd_formula)
    parameters = (
        {"temperature": 2.0},
        {},
        {"alpha": 1.0, "beta": 0.0},
        {"alpha": 0.0, "beta": 0.7},
        {"alpha": 0.0, "beta": 0.0},
        {"alpha": 0.5, "beta": 0.5},
    )
    reads = (2.0,)


@pytest.mark.parametrize("kind", KINDS)
def test_its_limits_are_kl_both_ways(kind: str) -> None:
    student, teacher, labels = draw(kind)
    t = 3.0

    def of(alpha: float, beta: float) -> Tensor:
        return t**2 * abkd(student, teacher, labels, t, alpha, beta, reduction="none")

    torch.testing.assert_close(of(1, 0), kd(student, teacher, labels, t, reduction="none"))
    logs = [[log_softmax(z, t) for z in x.double().numpy()] for x in (student, teacher)]
    reverse = [t**2 * divergence(q, p) for q, p in zip(*logs, strict=True)]
    torch.testing.assert_close(of(0, 1), torch.tensor(reverse), rtol=1e-4, atol=1e-4)
