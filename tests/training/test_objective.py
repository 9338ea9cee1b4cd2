"""Settings of a loss: defaults filled in, and what it can be fed."""

import math
from typing import Any

import pytest
import torch

from stages.errors import ConfigError
from stages.objectives.losses import CTKD, DEFINITIONS, PARAMETERS
from stages.settings import LossSettings
from stages.training.objective import Objective, student_loss, unused_settings

NAMES = [name for name in DEFINITIONS if name != "ce"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_named_is_the_losss_own(name: str) -> None:
    found, definition = student_loss(LossSettings(name=name)).settings, DEFINITIONS[name]
    assert (found.ce_weight, found.weight) == (definition.ce_weight, definition.weight)
    assert found.warmup == definition.warmup
    for parameter in PARAMETERS:
        assert getattr(found, parameter) == definition.defaults.get(parameter)
    assert student_loss(found).settings == found


def test_what_is_named_stays() -> None:
    given: dict[str, Any] = {"ce_weight": 0.0, "weight": 3.0, "warmup": 0, "beta": 0.0}
    found = student_loss(LossSettings(name="dkd", temperature=2.0, **given)).settings
    assert {key: getattr(found, key) for key in given} == given
    assert (found.temperature, found.alpha) == (2.0, 1.0)


def test_ce_has_nothing() -> None:
    """What it passes over is named."""
    given = LossSettings(name="ce", temperature=2.0, beta=1.0, standardise=True)
    assert student_loss(given).settings == LossSettings(name="ce")
    assert unused_settings(given) >= ["loss.temperature", "loss.beta"]
    assert unused_settings(LossSettings(name="kd", temperature=2.0)) == []


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_a_loss_has_not_are_refused(name: str) -> None:
    own = DEFINITIONS[name].defaults
    for parameter in PARAMETERS:
        value = "batch" if parameter == "average" else 0.5
        given: dict[str, Any] = {parameter: value}
        settings = LossSettings(name=name, **given)
        if parameter in own:
            assert getattr(student_loss(settings).settings, parameter) == value
            continue
        with pytest.raises(ConfigError, match=f"the loss '{name}' has no {parameter}") as refused:
            student_loss(settings)
        assert all(known in refused.value.remedy for known in own)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="'kd' has no beta and no gamma\nIt has: temperature"):
        student_loss(LossSettings(gamma=1.0, beta=2.0))
    with pytest.raises(ConfigError, match="'dist2'"):
        student_loss(LossSettings(name="dist2"))


@pytest.mark.parametrize(
    ("warmup", "expected"), [(0, [2, 2, 2]), (1, [2, 2, 2]), (4, [0.5, 1.0, 1.5, 2, 2])]
)
def test_the_weight_warms_up_from_the_first_epoch(warmup: int, expected: list[float]) -> None:
    """min(epoch / warmup, 1) of epochs that count from 1."""
    objective = Objective(student_loss(LossSettings(name="dkd", weight=2.0, warmup=warmup)))
    found = []
    for epoch in range(len(expected)):
        objective.start_epoch(epoch)
        found.append(objective.weight)
    assert found == expected


def test_what_a_loss_learns() -> None:
    assert isinstance(Objective(student_loss(LossSettings(name="ctkd"))).learned, CTKD)
    others = [name for name in NAMES if name != "ctkd"]
    assert all(Objective(student_loss(LossSettings(name=name))).learned is None for name in others)


def test_ctkds_gradient_is_turned_with_the_epochs() -> None:
    objective = Objective(student_loss(LossSettings(name="ctkd")))
    found = []
    for epoch in (0, 4, 9, 30):
        objective.start_epoch(epoch)
        assert objective.learned is not None
        found.append(objective.learned.reversal)
    assert found == pytest.approx([(math.cos(math.pi / 10) - 1) / 2, -0.5, -1, -1])


def test_what_it_is_of_a_batch() -> None:
    """Rows, each times its weight; one number where rows are coupled."""
    student, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.arange(6) % 4, torch.arange(6.0)
    for name in NAMES:
        objective = Objective(student_loss(LossSettings(name=name)))
        objective.start_epoch(0)
        assert (objective.couples_rows, objective.views) == (
            name in ("crld", "dist", "mlkd", "mlkd_weak"),
            2 if name in ("crld", "mlkd") else 1,
        )
        value = objective(student, teacher, labels, weights)
        assert value.shape == (() if objective.couples_rows else (6,))
        if not objective.couples_rows:
            ones = objective(student, teacher, labels, torch.ones(6))
            torch.testing.assert_close(value, weights * ones)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LossSettings(), [4.0]),
        (LossSettings(temperature=2.0), [2.0]),
        (LossSettings(name="nkd", temperature=3.0), [1.0, 3.0]),
        (LossSettings(name="ttm", temperature=5.0), [5.0]),
        (LossSettings(name="wttm"), [1.0, 5.0]),
        (LossSettings(name="rld"), [4.0]),
        (LossSettings(name="rld", sure_temperature=2.0), [2.0, 4.0]),
        (LossSettings(name="wsld"), [1.0, 4.0]),
    ],
)
def test_temperatures_at_which_partial_rows_are_read(
    settings: LossSettings, expected: list[float]
) -> None:
    assert student_loss(settings).temperatures() == expected


@pytest.mark.parametrize("name", ["dist", "mlkd", "mlkd_weak", "crld", "ctkd", "lr"])
def test_losses_that_need_whole_rows(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' needs whole teacher rows"):
        student_loss(LossSettings(name=name)).temperatures()


@pytest.mark.parametrize("name", NAMES)
def test_partial_rows_are_not_standardised(name: str) -> None:
    with pytest.raises(ConfigError, match="standardised where whole rows are known"):
        student_loss(LossSettings(name=name, standardise=True)).temperatures()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LossSettings(), 4.0),
        (LossSettings(name="dist", temperature=2.0), 2.0),
        (LossSettings(name="mlkd"), 4.0),
        (LossSettings(name="ttm"), 10.0),
        (LossSettings(name="lr"), 1.0),
        (LossSettings(name="ctkd"), None),
        (LossSettings(standardise=True), None),
        (LossSettings(name="dkd", temperature=3.0, standardise=True), None),
    ],
)
def test_the_temperature_of_rectified_rows(settings: LossSettings, expected: float | None) -> None:
    assert student_loss(settings).rectified_at == expected
