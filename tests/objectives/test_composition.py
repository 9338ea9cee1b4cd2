"""Bias weights with every loss: mode, schedule and reduction, in batches of any mix."""

import math
from itertools import product
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from stages.objectives.bias import bias_weights
from stages.objectives.losses import DEFINITIONS
from stages.settings import BiasMode, LossSettings, Reduction, Schedule
from stages.training.objective import Objective, student_loss

NAMES = [name for name in DEFINITIONS if name != "ce"]
OF_ROWS = [name for name in NAMES if not DEFINITIONS[name].couples_rows]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
SIZE, EPOCHS = 8, 10
MIXES = {
    "no-wrong": torch.zeros(SIZE, dtype=torch.bool),
    "only-wrong": torch.ones(SIZE, dtype=torch.bool),
    "one-wrong": torch.arange(SIZE) == 3,
    "one-right": torch.arange(SIZE) == 5,
    "half": torch.arange(SIZE) % 2 == 0,
}


def draw(wrong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits (B, C), and labels that the teacher has wrong just there."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, SIZE, 6, generator=generator) * 2
    order = teacher.argsort(1, descending=True)
    return student, teacher, torch.where(wrong, order[:, 2], order[:, 0])


def objective_of(name: str, epoch: int, standardise: bool = False) -> Objective:
    """As bias-aware runs have it: `bias.reduction` averages the kinds of rows of `lr` as well."""
    average: Literal["batch"] | None = "batch" if name == "lr" else None
    settings = LossSettings(name=name, standardise=standardise, average=average)
    objective = Objective(student_loss(settings))
    objective.start_epoch(epoch)
    return objective


def value_and_gradient(
    objective: Objective, wrong: Tensor, weights: Tensor
) -> tuple[float, Tensor]:
    student, teacher, labels = draw(wrong)
    leaf = student.requires_grad_()
    value = objective(leaf, teacher, labels, weights).mean()
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_finite(name: str) -> None:
    """With no wrong row, and with nothing but wrong rows, at the first and the last epoch."""
    ways: tuple[tuple[BiasMode, Schedule], ...] = (
        ("none", "constant"), ("eliminate", "constant"), ("rectify", "cosine"), ("rectify", "ramp")
    )  # fmt: skip
    for (mode, schedule), reduction in product(ways, REDUCTIONS):
        for epoch, (mix, wrong) in product((0, EPOCHS - 1), MIXES.items()):
            bias = bias_weights(mode, schedule, reduction, epoch, EPOCHS)
            weights = bias.rows(wrong)
            value, gradient = value_and_gradient(objective_of(name, epoch), wrong, weights)
            case = (mode, schedule, reduction, epoch, mix)
            assert math.isfinite(value), case
            assert gradient.isfinite().all(), case
            ignored = weights == 0
            assert (gradient[ignored] == 0).all(), case
            if ignored.all():
                assert value == 0, case


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", OF_ROWS)
def test_elimination_is_the_sum_over_right_rows(name: str, mix: str) -> None:
    wrong = MIXES[mix]
    objective, (student, teacher, labels) = objective_of(name, 4), draw(wrong)
    alone = [
        objective(student[i, None], teacher[i, None], labels[i, None], torch.ones(1)).item()
        for i in range(SIZE)
        if not wrong[i]
    ]
    for reduction in REDUCTIONS:
        size = SIZE if reduction == "batch" else max(len(alone), 1)
        weights = bias_weights("eliminate", "constant", reduction, 4, EPOCHS).rows(wrong)
        value, _ = value_and_gradient(objective, wrong, weights)
        assert value == pytest.approx(sum(alone) / size, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_bias_is_the_loss_itself(name: str) -> None:
    wrong = MIXES["half"]
    student, teacher, labels = draw(wrong)
    objective = objective_of(name, 4)
    weights = bias_weights("none", "cosine", "subset", 4, EPOCHS).rows(wrong)
    expected = objective(student, teacher, labels).mean()
    torch.testing.assert_close(objective(student, teacher, labels, weights).mean(), expected)


@pytest.mark.parametrize("name", ["crld", "dist", "mlkd", "mlkd_weak"])
def test_wrong_rows_are_as_if_they_were_not_there_for_coupled_losses(name: str) -> None:
    """Elimination: what the student says of them changes nothing."""
    wrong = MIXES["half"]
    student, teacher, labels = draw(wrong)
    other = torch.where(wrong[:, None], student.flip(0) * 2, student)
    weights = bias_weights("eliminate", "constant", "subset", 0, EPOCHS).rows(wrong)
    objective = objective_of(name, 0)
    values = [objective(z, teacher, labels, weights) for z in (student, other)]
    torch.testing.assert_close(*values)
    assert values[0].shape == ()


def test_weights_of_the_last_epoch_scale_coupled_losses() -> None:
    """No wrong row, and b = 2.7e-5 on all others."""
    wrong = MIXES["no-wrong"]
    bias = bias_weights("rectify", "cosine", "subset", 299, 300)
    for name in ("crld", "dist", "mlkd", "mlkd_weak"):
        objective = objective_of(name, 299)
        plain, plain_gradient = value_and_gradient(objective, wrong, torch.ones(SIZE))
        value, gradient = value_and_gradient(objective, wrong, bias.rows(wrong))
        assert value == pytest.approx(bias.right * plain, rel=1e-4)
        torch.testing.assert_close(gradient, bias.right * plain_gradient, rtol=1e-3, atol=1e-10)
