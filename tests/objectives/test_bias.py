"""The dynamic bias-aware loss against the paper's formula on sub-batches."""

import math
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.bias import bias_weights
from stages.settings import BiasSettings, Schedule

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


SCHEDULED: dict[Schedule, dict[int, float]] = {
    "cosine": {0: 1.0, 100: 0.75, 150: 0.5, 299: 2.7415e-5},
    "linear": {0: 1.0, 75: 0.75, 150: 0.5, 299: 1 / 300},
    "constant": {0: 1.0, 299: 1.0},
    "ramp": {0: 1.0, 299: 1.0},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_values(schedule: Schedule) -> None:
    for epoch, expected in SCHEDULED[schedule].items():
        found = bias_weights("rectify", schedule, "subset", epoch, 300).right
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("epochs", [1, 2, 7, 300])
def test_weight_moves_from_right_to_wrong(schedule: Schedule, epochs: int) -> None:
    every = [bias_weights("rectify", schedule, "subset", e, epochs) for e in range(epochs)]
    right = [weights.right for weights in every]
    assert right[0] == 1
    assert all(before > after > 0 for before, after in pairwise(right))
    assert all(math.isclose(weights.right + weights.wrong, 1) for weights in every)


# ---- the loss -------------------------------------------------------------------------------


def b_of(schedule: Schedule, epoch: int) -> tuple[float, float]:
    """What right and wrong rows weigh in the epoch of ten."""
    cosine = math.cos(math.pi / 2 * epoch / 10) ** 2
    return {
        "cosine": (cosine, 1 - cosine),
        "linear": (1 - epoch / 10, epoch / 10),
        "constant": (1.0, 1.0),
        "ramp": (1.0, 1 - cosine),
    }[schedule]


@pytest.mark.parametrize("wrong", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_subset_reduction_is_the_papers(wrong: Tensor, schedule: Schedule, epoch: int) -> None:
    """L = b * mean over right rows + (1 - b) * mean over wrong rows; an empty kind counts 0.
    Reduced over the batch, sums are divided by its size.
    """
    losses = torch.rand(len(wrong), generator=torch.Generator().manual_seed(1)) + 0.1
    kinds = zip(b_of(schedule, epoch), (losses[~wrong], losses[wrong]), strict=True)
    parts = [(b, rows) for b, rows in kinds if len(rows)]
    for reduction, expected in (
        ("subset", sum(b * rows.mean() for b, rows in parts)),
        ("batch", sum(b * rows.sum() for b, rows in parts) / len(wrong)),
    ):
        weights = bias_weights("rectify", schedule, reduction, epoch, 10)  # type: ignore[arg-type]
        found = (weights.rows(wrong) * losses).mean()
        torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-5, atol=1e-6)
