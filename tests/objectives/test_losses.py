"""What the table of losses says of each, and what every loss has in common."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from row_losses import draw
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.losses import (
    CTKD,
    DEFINITIONS,
    LOSSES,
    PARAMETERS,
    TeacherRows,
    TemperedRows,
    build_loss,
)
from stages.registry import names_in
from stages.settings import LossSettings
from stages.training.objective import Objective, student_loss

# ce_weight, weight, warmup, parameters: of the sources that the docstrings name
OFFICIAL: dict[str, tuple[float, float, int, dict[str, Any]]] = {
    "ce": (1.0, 0.0, 0, {}),
    "kd": (0.1, 0.9, 0, {"temperature": 4.0}),
    "dkd": (1.0, 1.0, 20, {"temperature": 4.0, "alpha": 1.0, "beta": 8.0}),
    "nkd": (1.0, 1.0, 0, {"temperature": 1.0, "gamma": 1.5}),
    "dist": (1.0, 2.0, 0, {"temperature": 4.0, "beta": 1.0, "gamma": 1.0}),
    "mlkd": (0.2, 0.9, 0, {"temperature": 4.0}),
    "mlkd_weak": (0.1, 0.9, 0, {"temperature": 4.0}),
    "crld": (
        2.0, 1.0, 0,
        {"temperature": 4.0, "alpha": 2.0, "beta": 0.5, "sure_weak": 0.9, "sure_strong": 0.2},
    ),
    "abkd": (1.0, 32.0, 0, {"temperature": 4.0, "alpha": 0.8, "beta": 0.3}),
    "adaptconf": (1.0, 1.0, 0, {"temperature": 1.0, "sure_temperature": 0.5}),
    "ctkd": (0.1, 0.9, 0, {"t_start": None, "t_end": None, "decay": None}),
    "ttm": (1.0, 45.0, 0, {"temperature": 10.0}),
    "wttm": (1.0, 4.0, 0, {"temperature": 5.0}),
    "rld": (
        1.0, 1.0, 20, {"temperature": 4.0, "alpha": 1.0, "beta": 8.0, "sure_temperature": None}
    ),
    "la": (0.0, 1.0, 0, {"temperature": 4.0}),
    "ka_lsr": (0.1, 0.9, 0, {"temperature": 4.0, "epsilon": 0.1}),
    "lr": (0.0, 1.0, 0, {"alpha": 4.0, "beta": 0.8, "average": "kind"}),
    "rc": (1.0, 1.0, 0, {"temperature": 4.0, "beta": 0.1}),
    "wsld": (1.0, 2.25, 0, {"temperature": 4.0}),
}  # fmt: skip
READS: dict[str, list[float]] = {
    **{"ce": [], "kd": [4], "abkd": [4], "adaptconf": [1], "dkd": [4], "nkd": [1], "ttm": [10]},
    **{"wttm": [1, 5], "rld": [4], "la": [4], "ka_lsr": [4], "rc": [4], "wsld": [1, 4]},
}
"""At which temperatures losses read partial rows; those that are not here refuse them."""


def loss_of(name: str) -> Callable[[Tensor, TeacherRows, Tensor], Tensor]:
    """The mean of a batch, as it is trained with in the first epoch."""
    objective = Objective(student_loss(LossSettings(name=name)))
    if objective.learned is not None:
        objective.learned.start_epoch(0)
    return lambda student, teacher, labels: objective(student, teacher, labels).mean()


def test_the_table_is_complete() -> None:
    assert set(OFFICIAL) == set(DEFINITIONS)
    coupled = [name for name, d in DEFINITIONS.items() if d.couples_rows]
    assert coupled == ["crld", "dist", "mlkd", "mlkd_weak"]
    assert [name for name, d in DEFINITIONS.items() if d.views == 2] == ["crld", "mlkd"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_defaults_are_the_official_ones(name: str) -> None:
    definition = DEFINITIONS[name]
    found = (definition.ce_weight, definition.weight, definition.warmup, definition.defaults)
    assert found == OFFICIAL[name]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_what_is_read_of_partial_rows(name: str) -> None:
    """What a loss declares is what it does."""
    definition, (student, teacher, labels) = DEFINITIONS[name], draw(classes=6, rows=4)
    asked: set[float] = set()

    def at(temperature: float) -> Tensor:
        asked.add(temperature)
        return teacher

    kept = torch.cat([labels[:, None], (labels[:, None] + 1) % 6], dim=1)
    rows = TemperedRows(at, kept)
    if name in READS:
        definition.make({})(student, rows, labels)
        assert definition.temperatures({}) == sorted(asked) == READS[name]
        return
    with pytest.raises(ConfigError, match=name):
        definition.temperatures({})
    with pytest.raises(ConfigError, match=name):
        definition.make({})(student, rows, labels)


def test_what_is_read_follows_the_parameters() -> None:
    assert DEFINITIONS["rld"].temperatures({"temperature": 2.0, "sure_temperature": 3.0}) == [2, 3]
    assert DEFINITIONS["wttm"].temperatures({"temperature": 1.0}) == [1]


@pytest.mark.parametrize("name", [name for name, d in DEFINITIONS.items() if d.views == 1])
def test_which_losses_read_the_offset_of_a_teacher(name: str) -> None:
    student, teacher, labels = draw()
    values = [loss_of(name)(student, rows, labels) for rows in (teacher, teacher + 8)]
    same = torch.allclose(*values, rtol=1e-3, atol=1e-6)
    assert same is not DEFINITIONS[name].reads_offset


@pytest.mark.parametrize("name", DEFINITIONS)
def test_what_every_loss_has_in_common(name: str) -> None:
    """It leaves what it is given as it is, takes rows by temperature, and computes in float32."""
    given = draw()
    student, teacher, labels = (t.clone() for t in given)
    loss = loss_of(name)
    value = loss(student, teacher, labels)
    assert all(map(torch.equal, given, (student, teacher, labels)))
    assert torch.equal(loss(student, TemperedRows(lambda _: teacher), labels), value)
    for dtype in (torch.bfloat16, torch.float16):
        low = student.to(dtype).requires_grad_()
        value = loss(low, teacher.to(dtype), labels)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(low.float(), teacher.to(dtype).float(), labels))
        (gradient,) = torch.autograd.grad(value, low)
        assert gradient.dtype == dtype


# ---- in a loop of one's own -----------------------------------------------------------------


@pytest.mark.parametrize("name", DEFINITIONS)
def test_any_loss_is_built_and_called_alike(name: str) -> None:
    """With its official defaults, and with what is set; or it says what it needs."""
    batch = draw()
    given = {"temperature": 2.0} if "temperature" in DEFINITIONS[name].defaults else {}
    for parameters in ({}, given):
        loss = build_loss(name, **parameters)
        if name in ("crld", "ctkd", "mlkd"):
            with pytest.raises(ConfigError) as refused:
                loss(*batch)
            assert refused.value.remedy
            continue
        value = loss(*batch)
        assert torch.equal(value, LOSSES[name](*batch, **parameters))
        assert value.shape == ()
    if name == "ctkd":  # a module: every student has a temperature of its own
        assert isinstance(loss, CTKD)
        assert build_loss("ctkd") is not loss
        with pytest.raises(ConfigError, match="ctkd"):
            LOSSES["ctkd"](*batch)


@pytest.mark.parametrize("name", ["ce", "kd", "lr"])
def test_parameters_that_a_loss_does_not_have(name: str) -> None:
    for parameter in set(PARAMETERS) - DEFINITIONS[name].defaults.keys():
        with pytest.raises(ConfigError, match=f"'{name}' has no {parameter}"):
            build_loss(name, **{parameter: 1.0})
    with pytest.raises(ConfigError, match="'hinton'"):
        build_loss("hinton")


def test_losses_are_found_without_torch() -> None:
    assert set(names_in("stages.objectives.losses", "loss")) == set(DEFINITIONS)
    code = "import sys, pipeline.choices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
