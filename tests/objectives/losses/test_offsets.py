"""A constant on a row of logits changes no probability: it changes no loss, in float32 either.

Logits here are multiples of 1/256, so that adding up to 10,000 to them is exact, and what is lost
is lost in the loss.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from row_losses import Formula, Row, by_formula, draw, part_of
from test_abkd import abkd_formula
from test_adaptconf import adaptconf_formula
from test_corrections import ka_lsr_formula, la_formula, lr_formula, rc_formula
from test_crld import transcribed as crld_formula
from test_ctkd import START
from test_dist import formula as dist_formula
from test_dkd import dkd_formula, nkd_formula
from test_kd import ce_formula, kd_formula
from test_mlkd import HALF, transcribed
from test_mlkd_weak import transcribed as weak_formula
from test_rld import rld_formula
from test_ttm import ttm_formula, wttm_formula
from test_wsld import wsld_formula
from torch import Tensor

from stages.settings import LossSettings
from stages.training.objective import Objective, StudentLoss, student_loss

ROWS = {
    "ce": ce_formula,
    "kd": kd_formula,
    "abkd": abkd_formula,
    "adaptconf": adaptconf_formula,
    "dkd": dkd_formula,
    "nkd": nkd_formula,
    "ctkd": lambda *row: kd_formula(*row, START),
    "ttm": ttm_formula,
    "wttm": wttm_formula,
    "rld": rld_formula,
    "la": la_formula,
    "ka_lsr": ka_lsr_formula,
    "lr": lr_formula,
    "rc": rc_formula,
    "wsld": wsld_formula,
}
NAMES = [*ROWS, "dist", "mlkd", "mlkd_weak", "crld"]
# By their formulas, not by rounding: the squared error of `lr` on right rows is of logits, and `rc`
# adds the student's largest logit to the label's.
MOVED_BY = {"lr": "either side", "rc": "the student"}
OFFSETS = {"large": (1e4, 1e4), "student": (1e4, 0.0), "teacher": (0.0, 1e4), "small": (37.0, 5.0)}


def on_grid(kind: str = "mixed") -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, labels = draw(kind, 6, 2 * HALF)
    return (student * 256).round() / 256, (teacher * 256).round() / 256, labels


def offset(logits: Tensor, largest: float, seed: int) -> Tensor:
    """Another constant on every row, the largest of them `largest`."""
    generator = torch.Generator().manual_seed(seed)
    constants = (torch.rand(len(logits), 1, generator=generator) * 2 - 1) * largest
    constants[0], constants[1] = largest, -largest
    moved = logits + constants.round()
    assert torch.equal(moved.double(), logits.double() + constants.round().double())
    return moved


def loss_of(name: str, standardise: bool = False) -> StudentLoss:
    """With rows of `lr` that do not depend on the others."""
    average: Literal["batch"] | None = "batch" if name == "lr" else None
    return student_loss(LossSettings(name=name, standardise=standardise, average=average))


def objective_of(loss: StudentLoss) -> Objective:
    objective = Objective(loss)
    if objective.learned is not None:
        objective.learned.start_epoch(0)
    return objective


def parameters_of(loss: StudentLoss) -> dict[str, float]:
    own = set(loss.definition.defaults) - {"average"}
    return {key: v for key in own if (v := getattr(loss.settings, key)) is not None}


def by_rows(formula: Formula) -> Callable[[Tensor, Tensor, Tensor, dict[str, float]], Row]:
    return lambda s, t, y, given: by_formula(formula, s, lambda _: t, y, given)


def expected(name: str, s: Tensor, t: Tensor, y: Tensor, given: dict[str, float]) -> Row:
    """float64, of every row or of the batch."""
    if name == "dist":
        return np.array(dist_formula(s, t, given["temperature"], given["beta"], given["gamma"]))
    if name == "mlkd":
        return np.array(transcribed(s, t, given["temperature"]))
    if name == "mlkd_weak":
        return np.array(weak_formula(s, t, given["temperature"]))
    if name == "crld":
        return np.array(crld_formula(s, t))
    return by_rows(ROWS[name])(s, t, y, given)


def value_and_gradient(loss: StudentLoss, s: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    leaf = s.clone().requires_grad_()
    value = objective_of(loss)(leaf, t, y)
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return [value.detach(), gradient]


def check(
    loss: StudentLoss, s: Tensor, t: Tensor, y: Tensor, moved_s: Tensor, moved_t: Tensor
) -> None:
    value, gradient = value_and_gradient(loss, moved_s, moved_t, y)
    plain, plain_gradient = value_and_gradient(loss, s, t, y)
    torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-5)
    scale = float(plain_gradient.abs().max())
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(("of_student", "of_teacher"), OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("name", NAMES)
def test_an_offset_of_a_row_is_nothing(name: str, of_student: float, of_teacher: float) -> None:
    s, t, y = on_grid()
    loss = loss_of(name)
    moved_s = offset(s, of_student, 1)
    moved_t = moved_s - s + t if name == "lr" else offset(t, of_teacher, 2)
    if name == "rc":
        moved_s = s
    check(loss, s, t, y, moved_s, moved_t)
    value = value_and_gradient(loss, moved_s, moved_t, y)[0]
    formula = expected(name, s, t, y, parameters_of(loss))
    np.testing.assert_allclose(value, formula, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_standardised_rows_have_no_offset(name: str) -> None:
    """Not of `lr` and `rc` either."""
    if name == "ce":
        return
    s, t, y = on_grid()
    loss = loss_of(name, True)
    check(loss, s, t, y, offset(s, 1e4, 1), offset(t, 1e4, 2))


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("ce", "ctkd", "lr")])
def test_an_offset_of_a_row_known_in_part_is_nothing(name: str) -> None:
    s, t, y = on_grid()
    loss = loss_of(name)
    moved = s if name in MOVED_BY else offset(s, 1e4, 1)
    given = [part_of(z, y, 3) for z in (t, offset(t, 1e4, 2))]
    values = [objective_of(loss)(z, rows, y) for z, rows in zip((s, moved), given, strict=True)]
    # what is kept of the rest as float32 is rounded before the loss sees it
    torch.testing.assert_close(*values, rtol=2e-3, atol=2e-3)


def test_what_an_offset_changes_by_its_formula() -> None:
    """And is computed in full precision nevertheless; wrong rows of `lr` are not moved."""
    for name in MOVED_BY:
        s, t, y = on_grid("mixed" if name == "rc" else "right")
        loss = loss_of(name)
        value = objective_of(loss)(offset(s, 37.0, 1), t, y)
        assert not torch.allclose(value, objective_of(loss)(s, t, y))
        formula = expected(name, offset(s, 37.0, 1), t, y, parameters_of(loss))
        np.testing.assert_allclose(value, formula, rtol=1e-4)
    s, t, y = on_grid("wrong")
    check(loss_of("lr"), s, t, y, offset(s, 1e4, 1), offset(t, 1e4, 2))
