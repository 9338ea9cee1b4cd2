"""WSLD against its formula: the weight of a row, and that it is a constant."""

import math

import pytest
import torch
from row_losses import KINDS, At, Row, RowLoss, draw, log_softmax, part_of, softmax

from stages.objectives.losses.rows import paired
from stages.objectives.losses.wsld import wsld


def weight(z_s: Row, z_t: Row, y: int) -> float:
    hard_s, hard_t = -log_softmax(z_s)[y], -log_softmax(z_t)[y]
    return 1 - math.exp(-max(0, hard_s / (hard_t + 1e-7)))


def wsld_formula(z_s: Row, at: At, y: int, held: Row, temperature: float = 4.0) -> float:
    t = temperature
    soft = -sum(p * log for p, log in zip(softmax(at(t), t), log_softmax(z_s, t), strict=True))
    return float(weight(held, at(1.0), y) * t**2 * soft)


class TestWsld(RowLoss):
    loss, formula = staticmethod(wsld), staticmethod(wsld_formula)
    parameters = ({"temperature": 2.0}, {}, {"temperature": 1.0})
    reads = (1.0, 2.0)
    widest = 2.0  # a quotient of two cross-entropies that may both be nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 4])
def test_the_weight_of_partial_rows_is_exact(kind: str, k: int) -> None:
    student, teacher, labels = draw(kind)
    part = part_of(teacher, labels, k)
    lumped_s, lumped_t, _ = paired(student, part, labels, 4.0)
    soft = -((lumped_t / 4).softmax(1) * (lumped_s / 4).log_softmax(1)).sum(1)
    found = wsld(student, part, labels, reduction="none") / (16 * soft)
    rows = zip(student.double().numpy(), teacher.double().numpy(), labels.tolist(), strict=True)
    expected = torch.tensor([weight(*row) for row in rows])
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)
