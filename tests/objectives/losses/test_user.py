"""Losses of a user's own: `module:callable`."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from row_losses import draw
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.losses import TemperedRows, build_loss, definition_of, kd
from stages.settings import LossSettings
from stages.training.objective import Objective, student_loss

STUDENT, TEACHER, LABELS = draw(rows=6, classes=5)


def of_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 3.0,
    margin: float = 0.5,
    reduction: str = "mean",
) -> Tensor:
    rows = (student_logits - teacher_logits / temperature).square().sum(1) + margin
    return rows.mean() if reduction == "mean" else rows


def of_batch(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def weighted(
    student: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    rows = (student - teacher).square().sum(1)
    return (rows if weights is None else weights * rows).mean()


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    mine = ModuleType("my_losses")
    mine.__dict__.update(of_rows=of_rows, of_batch=of_batch, weighted=weighted)
    monkeypatch.setitem(sys.modules, "my_losses", mine)
    return mine


def test_it_is_built_like_any_other() -> None:
    found = build_loss("my_losses:of_rows", margin=2.0)(STUDENT, TEACHER, LABELS)
    assert torch.equal(found, of_rows(STUDENT, TEACHER, LABELS, margin=2.0))
    found = build_loss("stages.objectives.losses.kd:kd", temperature=2.0)(STUDENT, TEACHER, LABELS)
    assert torch.equal(found, kd(STUDENT, TEACHER, LABELS, 2.0))


@pytest.mark.parametrize("name", ["of_rows", "of_batch", "weighted"])
def test_what_a_run_minimises(name: str) -> None:
    objective = Objective(student_loss(LossSettings(name=f"my_losses:{name}", weight=2.0)))
    objective.start_epoch(0)
    function: Callable[..., Tensor] = globals()[name]
    batch, weights = (STUDENT, TEACHER, LABELS), torch.arange(6.0)
    assert torch.equal(objective(*batch).mean(), function(*batch))
    assert objective.weight == 2
    if name == "of_batch":
        with pytest.raises(ConfigError, match="weights"):
            objective(*batch, weights)
        return
    rows = name == "of_rows"
    expected = weights * of_rows(*batch, reduction="none") if rows else weighted(*batch, weights)
    assert torch.equal(objective(*batch, weights), expected)


def test_its_defaults_are_those_of_its_signature() -> None:
    chosen = student_loss(LossSettings(name="my_losses:of_rows"))
    settings = chosen.settings
    assert (settings.ce_weight, settings.weight, settings.temperature) == (1, 1, 3)
    assert chosen.rectified_at == 3
    assert chosen.reads_offset
    assert not definition_of("my_losses:of_batch").weighs_rows


def test_parameters_that_no_setting_has() -> None:
    settings = LossSettings(name="my_losses:of_rows", parameters=("margin=2e0",))
    value = Objective(student_loss(settings))(STUDENT, TEACHER, LABELS)
    assert torch.equal(value, of_rows(STUDENT, TEACHER, LABELS, margin=2.0, reduction="none"))
    for wrong in ("margin=wide", "width=1", "margin"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            student_loss(LossSettings(name="my_losses:of_rows", parameters=(wrong,)))


def test_rows_by_temperature_are_read_at_its_own() -> None:
    rows = TemperedRows(lambda temperature: TEACHER * temperature)
    found = build_loss("my_losses:of_rows")(STUDENT, rows, LABELS)
    assert torch.equal(found, of_rows(STUDENT, 3 * TEACHER, LABELS))
    with pytest.raises(ConfigError, match="whole"):
        build_loss("my_losses:of_rows")(
            STUDENT, TemperedRows(lambda _: TEACHER, LABELS[:, None]), LABELS
        )


@pytest.mark.parametrize(
    "wrong",
    [3, Tensor, lambda student: student, lambda s, t, y, alpha: s, lambda s, t, *, y: s],
    ids=["number", "class", "one", "no-default", "keyword"],
)
def test_what_is_no_loss(module: ModuleType, wrong: Any) -> None:
    module.__dict__["wrong"] = wrong
    for name in ("my_losses:wrong", "my_losses:absent", "no_such_module:loss"):
        with pytest.raises(ConfigError, match=name):
            build_loss(name)


@pytest.mark.parametrize(
    "wrong",
    [
        *(lambda s, t, y: 1.0, lambda s, t, y: s, lambda s, t, y: y.sum(), lambda s, t, y: s @ t),
        lambda s, t, y, reduction="mean": s.mean(),
    ],
    ids=["number", "matrix", "integer", "raises", "no-rows"],
)
def test_what_returns_no_loss(module: ModuleType, wrong: Any) -> None:
    module.__dict__["wrong"] = wrong
    objective = Objective(student_loss(LossSettings(name="my_losses:wrong")))
    with pytest.raises(ConfigError, match="my_losses:wrong"):
        objective(STUDENT, TEACHER, LABELS)
