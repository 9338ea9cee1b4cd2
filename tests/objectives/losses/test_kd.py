"""KD against its formula and its analytic gradient; cross-entropy of plain and of mixed labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from row_losses import At, Row, RowLoss, divergence, draw, log_softmax, part_of

from stages.objectives.losses import ce, kd, mixed_ce


def kd_formula(z_s: Row, at: At, y: int, held: Row, temperature: float = 4.0) -> float:
    t = temperature
    return t**2 * divergence(log_softmax(at(t), t), log_softmax(z_s, t))


class TestKd(RowLoss):
    loss, formula = staticmethod(kd), staticmethod(kd_formula)
    parameters = ({"temperature": 2.0}, {}, {"temperature": 0.5}, {"temperature": 20.0})
    reads = (2.0,)


def ce_formula(z_s: Row, at: At, y: int, held: Row) -> float:
    return -float(log_softmax(z_s)[y])


class TestCe(RowLoss):
    loss, formula = staticmethod(ce), staticmethod(ce_formula)
    reads = ()


def test_kd_of_partial_rows_is_never_above_that_of_whole_ones() -> None:
    student, teacher, labels = draw()
    whole = kd(student, teacher, labels, reduction="none")
    before = torch.zeros(12)
    for k in (2, 4, 7, 9):
        rows = kd(student, part_of(teacher, labels, k), labels, reduction="none")
        assert (rows >= -1e-5).all()
        assert (rows <= whole + 1e-4).all()
        assert rows.mean() >= before.mean() - 1e-4  # more is known
        before = rows


def test_ce_ignores_the_teacher() -> None:
    student, teacher, labels = draw()
    assert torch.equal(ce(student, teacher, labels), ce(student, None, labels))
    torch.testing.assert_close(ce(student, None, labels), F.cross_entropy(student, labels))


def test_mixed_ce_is_that_of_both_labels_by_their_shares() -> None:
    student, _, labels = draw()
    partners, shares = labels.flip(0), torch.linspace(0, 1, 12)
    logs = [log_softmax(row) for row in student.double().numpy()]
    both = [
        -s * row[a] - (1 - s) * row[b]
        for row, a, b, s in zip(
            logs, labels.tolist(), partners.tolist(), shares.tolist(), strict=True
        )
    ]
    assert mixed_ce(student, labels, partners, shares).item() == pytest.approx(np.mean(both))
    assert torch.equal(mixed_ce(student, labels), ce(student, None, labels))
