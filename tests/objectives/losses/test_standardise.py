"""Logit standardisation against its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from row_losses import draw

from stages.objectives.losses import DEFINITIONS, kd, standardised
from stages.settings import LossSettings
from stages.training.objective import Objective, student_loss


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_every_row_is_the_formula(classes: int) -> None:
    z, _, _ = draw(classes=classes)
    expected = []
    for row in z.double().tolist():
        mean = sum(row) / classes
        deviation = (sum((v - mean) ** 2 for v in row) / (classes - 1)) ** 0.5
        expected.append([(v - mean) / (1e-7 + deviation) for v in row])
    np.testing.assert_allclose(standardised(z), expected, rtol=1e-4, atol=1e-6)


@given(st.floats(-100, 100), st.floats(0.1, 50), st.integers(0, 10**6))
@examples(max_examples=25, deadline=None)
def test_shift_and_scale_of_a_row_are_nothing(shift: float, scale: float, seed: int) -> None:
    z, _, _ = draw(seed=seed)
    torch.testing.assert_close(standardised(scale * z + shift), standardised(z), atol=1e-3, rtol=0)


def test_low_precision_and_rows_that_are_all_equal() -> None:
    z, _, _ = draw()
    assert standardised(z.half()).dtype == torch.float32
    torch.testing.assert_close(standardised(z.half()), standardised(z.half().float()))
    flat = torch.full((2, 5), 3.0, requires_grad=True)
    value = standardised(flat)
    (gradient,) = torch.autograd.grad(value.square().sum(), flat)
    assert torch.equal(value, torch.zeros(2, 5))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name, d in DEFINITIONS.items() if not d.standardises])
def test_any_loss_can_be_fed_standardised_logits(name: str) -> None:
    """So that a shift and a scale of either side are nothing to it."""
    if name == "ce":
        return
    objective = Objective(student_loss(LossSettings(name=name, standardise=True)))
    objective.start_epoch(3)
    student, teacher, labels = draw()
    ones = torch.ones(12)
    values = [
        objective(s, t, labels, ones)
        for s, t in ((student, teacher), (3 * student - 500, 0.2 * teacher + 100))
    ]
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)


def test_kd_is_fed_both_sides_standardised() -> None:
    objective = Objective(student_loss(LossSettings(standardise=True)))
    student, teacher, labels = draw()
    found = objective(student, teacher, labels, torch.ones(12))
    sides = [(z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True) for z in (student, teacher)]
    expected = kd(sides[0], sides[1], labels, 2.0, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(DEFINITIONS) - {"ce"}))
def test_the_defaults_of_lskd_are_for_what_it_standardises(name: str) -> None:
    plain, standard = (
        student_loss(LossSettings(name=name, standardise=standardise)).settings
        for standardise in (False, True)
    )
    weighted = ("kd", "dkd", "mlkd", "mlkd_weak", "ctkd", "rld", "rc")  # --kd-weight 9
    at_two = ("kd", "dkd", "mlkd", "mlkd_weak", "rld", "rc", "la")  # --base-temp 2
    assert standard.weight == (9 if name in weighted else plain.weight)
    assert standard.temperature == (2 if name in at_two else plain.temperature)
    assert standard.ce_weight == plain.ce_weight
    chosen = student_loss(LossSettings(name=name, standardise=True, weight=3.0)).settings
    assert chosen.weight == 3
