"""RLD against its formula; where the teacher is right it is DKD."""

import pytest
import torch
from row_losses import KINDS, At, Row, RowLoss, divergence, draw, log_softmax, part_of, without
from test_dkd import two_way

from stages.objectives.losses.dkd import dkd
from stages.objectives.losses.rld import rld


def rld_formula(
    z_s: Row, at: At, y: int, held: Row, temperature: float = 4.0, alpha: float = 1.0,
    beta: float = 8.0, sure_temperature: float | None = None,
) -> float:  # fmt: skip
    t, ta = temperature, sure_temperature or temperature
    top = int(at(ta).argmax())
    scd = ta**2 * divergence(two_way(at(ta), top, ta), two_way(z_s, y, ta))
    z_t = at(t)
    masked = [c for c in range(len(z_t)) if z_t[c] >= z_t[y]]
    mcd = 0.0
    if len(masked) < len(z_t):
        mcd = t**2 * divergence(*(log_softmax(without(z, masked), t) for z in (z_t, z_s)))
    return alpha * scd + beta * mcd


class TestRld(RowLoss):
    loss, formula = staticmethod(rld), staticmethod(rld_formula)
    parameters = (
        {"temperature": 4.0, "sure_temperature": 2.0, "alpha": 0.5},
        {},
        {"temperature": 1.0, "beta": 0.5},
    )
    reads = (2.0, 4.0)


@pytest.mark.parametrize("t", [1.0, 4.0])
@pytest.mark.parametrize("k", [2, 4, 9, None])
def test_right_rows_at_one_temperature_are_dkd(k: int | None, t: float) -> None:
    """Also where the rest of a row together is likelier than the label."""
    student, teacher, labels = draw("right", scale=1.0)
    rows = teacher if k is None else part_of(teacher, labels, k)
    found = rld(student, rows, labels, t, sure_temperature=t, reduction="none")
    torch.testing.assert_close(found, dkd(student, rows, labels, t, reduction="none"))


def test_a_label_that_is_the_teachers_last_class_has_no_mcd() -> None:
    student, teacher, labels = draw("last")
    for rows in (teacher, part_of(teacher, labels, 4)):
        leaf = student.clone().requires_grad_()
        mcd = rld(leaf, rows, labels, alpha=0.0, reduction="none")
        mcd.sum().backward()
        assert torch.equal(mcd, torch.zeros(12))
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros(12, 10))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 4])
def test_scd_of_partial_rows_is_exact(kind: str, k: int) -> None:
    student, teacher, labels = draw(kind)
    found, expected = (
        rld(student, rows, labels, beta=0.0, reduction="none")
        for rows in (part_of(teacher, labels, k), teacher)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
