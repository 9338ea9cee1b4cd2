"""The dynamic bias-aware loss against the paper's formula on sub-batches."""

import math
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.bias import bias_weights
from stages.settings import BiasSettings, Reduction, Schedule

MIXES = {
    "all-right": torch.zeros(16, dtype=torch.bool),
    "all-wrong": torch.ones(16, dtype=torch.bool),
    "one-wrong": torch.arange(16) == 5,
    "one-right": torch.arange(16) != 5,
    "half": torch.arange(16) % 2 == 0,
    "single-row-right": torch.tensor([False]),
    "single-row-wrong": torch.tensor([True]),
}
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def b_of(schedule: Schedule, epoch: int, epochs: int) -> float:
    return bias_weights("rectify", schedule, "subset", epoch, epochs).right


def row_losses(size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.1


# ---- settings that are left out --------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        (BiasSettings(mode="rectify"), ("constant", "batch")),
        (BiasSettings(mode="rectify", schedule="ramp"), ("ramp", "batch")),
        (BiasSettings(mode="rectify", as_published=True), ("cosine", "subset")),
        # runs that were made before there was as_published
        (BiasSettings(mode="rectify", reduction="subset"), ("cosine", "subset")),
        (BiasSettings(mode="rectify", reduction="batch"), ("cosine", "batch")),
        (BiasSettings(mode="eliminate"), ("constant", "subset")),
        (BiasSettings(mode="eliminate", as_published=True), ("constant", "subset")),
    ],
)
def test_what_is_left_out_is_the_modes(settings: BiasSettings, chosen: tuple[str, str]) -> None:
    resolved = settings.resolved()
    for each in (settings, resolved, resolved.resolved()):
        assert (each.chosen_schedule, each.chosen_reduction) == chosen
    assert not resolved.as_published


@pytest.mark.parametrize(
    "settings",
    [{"mode": "none"}, {"mode": "correct"}, {"schedule": "ramp"}, {"reduction": "batch"}],
)
def test_as_published_does_not_go_with_other_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BiasSettings(**{"mode": "rectify", "as_published": True} | settings)


# ---- the schedule ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "epoch", "expected"),
    [
        ("cosine", 0, 1.0),
        ("cosine", 150, 0.5),
        ("cosine", 100, 0.75),
        ("cosine", 299, 2.7415e-5),
        ("linear", 0, 1.0),
        ("linear", 75, 0.75),
        ("linear", 150, 0.5),
        ("linear", 299, 1 / 300),
        ("constant", 0, 1.0),
        ("constant", 299, 1.0),
        ("ramp", 0, 1.0),
        ("ramp", 299, 1.0),
    ],
)
def test_schedule_values(schedule: Schedule, epoch: int, expected: float) -> None:
    assert b_of(schedule, epoch, 300) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("epochs", [1, 2, 7, 300])
def test_weight_moves_from_right_to_wrong(schedule: Schedule, epochs: int) -> None:
    every = [bias_weights("rectify", schedule, "subset", e, epochs) for e in range(epochs)]
    right = [weights.right for weights in every]
    assert right[0] == 1
    assert all(before > after > 0 for before, after in pairwise(right))
    assert all(math.isclose(weights.right + weights.wrong, 1) for weights in every)


def test_constant_rectification_keeps_both_kinds_whole() -> None:
    weights = bias_weights("rectify", "constant", "batch", 7, 10)
    assert (weights.right, weights.wrong) == (1, 1)


@pytest.mark.parametrize("epoch", [0, 1, 5, 9])
def test_a_ramp_adds_wrong_rows_along_the_cosine(epoch: int) -> None:
    """L = L_right + (1 - b) L_wrong."""
    ramp, cosine = (bias_weights("rectify", s, "batch", epoch, 10) for s in ("ramp", "cosine"))
    assert ramp.right == 1
    assert ramp.wrong == cosine.wrong == pytest.approx(math.sin(math.pi / 2 * epoch / 10) ** 2)
    assert bias_weights("eliminate", "ramp", "batch", epoch, 10).wrong == 0


# ---- the loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_subset_reduction_is_the_papers(wrong: Tensor, schedule: Schedule, epoch: int) -> None:
    """L = b * mean over right rows + (1 - b) * mean over wrong rows; an empty kind counts 0."""
    losses, weights = row_losses(len(wrong)), bias_weights("rectify", schedule, "subset", epoch, 10)
    b = {"cosine": math.cos(math.pi / 2 * epoch / 10) ** 2, "linear": 1 - epoch / 10}.get(schedule)
    b_right, b_wrong = (1.0, 1.0) if b is None else (b, 1 - b)
    if schedule == "ramp":
        b_wrong = math.sin(math.pi / 2 * epoch / 10) ** 2
    expected = 0.0
    if (~wrong).any():
        expected += b_right * losses[~wrong].mean().item()
    if wrong.any():
        expected += b_wrong * losses[wrong].mean().item()
    assert (weights.rows(wrong) * losses).mean().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrong", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_batch_reduction_divides_sums_by_the_batch(wrong: Tensor, epoch: int) -> None:
    losses, weights = row_losses(len(wrong)), bias_weights("rectify", "linear", "batch", epoch, 10)
    b = 1 - epoch / 10
    expected = (b * losses[~wrong].sum() + (1 - b) * losses[wrong].sum()) / len(wrong)
    assert (weights.rows(wrong) * losses).mean().item() == pytest.approx(expected.item(), rel=1e-5)
