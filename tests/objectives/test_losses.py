"""What the table of losses says of each, and what every loss has in common."""

import pytest
import torch
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.losses import (
    CTKD,
    DEFINITIONS,
    LOSSES,
    TemperedRows,
    kd,
    temperatures_read,
)

EXTREME = {
    "student-sure": (1e4, 1.0),
    "teacher-sure": (1.0, 1e4),
    "both-sure": (1e4, 1e4),
    "all-equal": (0.0, 0.0),
}
# ce_weight, weight, warmup, parameters: of the sources that the docstrings name
OFFICIAL: dict[str, tuple[float, float, int, dict[str, float]]] = {
    "ce": (1.0, 0.0, 0, {}),
    "kd": (0.1, 0.9, 0, {"temperature": 4.0}),
    "dkd": (1.0, 1.0, 20, {"temperature": 4.0, "alpha": 1.0, "beta": 8.0}),
    "nkd": (1.0, 1.0, 0, {"temperature": 1.0, "gamma": 1.5}),
    "dist": (1.0, 2.0, 0, {"temperature": 4.0, "beta": 1.0, "gamma": 1.0}),
    "mlkd": (0.2, 0.9, 0, {"temperature": 4.0}),
    "ctkd": (0.1, 0.9, 0, {}),
    "ttm": (1.0, 45.0, 0, {"temperature": 10.0}),
    "wttm": (1.0, 4.0, 0, {"temperature": 5.0}),
    "rld": (
        1.0, 1.0, 20, {"temperature": 4.0, "alpha": 1.0, "beta": 8.0, "sure_temperature": 1.0}
    ),
    "la": (0.0, 1.0, 0, {"temperature": 4.0}),
    "ka_lsr": (0.1, 0.9, 0, {"temperature": 4.0, "epsilon": 0.1}),
    "lr": (0.0, 1.0, 0, {"alpha": 4.0, "beta": 0.8}),
    "rc": (1.0, 1.0, 0, {"temperature": 4.0, "beta": 0.1}),
    "wsld": (1.0, 2.25, 0, {"temperature": 4.0}),
}  # fmt: skip
READS = {
    "ce": [],
    "kd": [4.0],
    "dkd": [4.0],
    "nkd": [1.0],
    "ttm": [10.0],
    "wttm": [1.0, 5.0],
    "rld": [1.0, 4.0],
    "la": [4.0],
    "ka_lsr": [4.0],
    "rc": [4.0],
    "wsld": [1.0, 4.0],
}
"""At which temperatures losses read partial rows; those that are not here refuse them."""


def draw(rows: int = 32, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits (B, C) and labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, classes, generator=generator) * 3
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def test_the_table_is_complete() -> None:
    assert set(OFFICIAL) == set(DEFINITIONS) == set(LOSSES)
    assert LOSSES["kd"] is kd
    assert [name for name, d in DEFINITIONS.items() if d.couples_rows] == ["dist", "mlkd"]
    assert [name for name, d in DEFINITIONS.items() if d.views == 2] == ["mlkd"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_defaults_are_the_official_ones(name: str) -> None:
    definition = DEFINITIONS[name]
    found = (definition.ce_weight, definition.weight, definition.warmup, definition.defaults)
    assert found == OFFICIAL[name]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_what_is_read_of_partial_rows(name: str) -> None:
    loss = DEFINITIONS[name].make({})
    if name in READS:
        assert temperatures_read(loss) == READS[name]
    else:
        with pytest.raises(ConfigError, match=f"the loss '{name}' needs whole teacher rows"):
            temperatures_read(loss)


def test_what_is_read_follows_the_parameters() -> None:
    rld = DEFINITIONS["rld"].make({"temperature": 2.0, "sure_temperature": 3.0})
    assert temperatures_read(rld) == [2.0, 3.0]
    assert temperatures_read(DEFINITIONS["wttm"].make({"temperature": 1.0})) == [1.0]


@pytest.mark.parametrize(("student_scale", "teacher_scale"), EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_gradients_stay_finite(name: str, student_scale: float, teacher_scale: float) -> None:
    student, teacher, labels = draw()
    student = (student * student_scale).requires_grad_()
    value = DEFINITIONS[name].make({})(student, teacher * teacher_scale, labels)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", DEFINITIONS)
def test_low_precision_logits_are_computed_in_float32(name: str) -> None:
    student, teacher, labels = draw()
    loss = DEFINITIONS[name].make({})
    for dtype in (torch.bfloat16, torch.float16):
        low = student.to(dtype).requires_grad_()
        value = loss(low, teacher.to(dtype), labels)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(low.float(), teacher.to(dtype).float(), labels))
        value.backward()
        assert low.grad is not None
        assert low.grad.dtype == dtype


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_teacher_is_left_as_it_is(name: str) -> None:
    student, teacher, labels = draw()
    kept = [t.clone() for t in (student, teacher, labels)]
    DEFINITIONS[name].make({})(student, teacher, labels)
    assert all(torch.equal(a, b) for a, b in zip(kept, (student, teacher, labels), strict=True))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_rows_of_one_teacher_may_come_by_temperature(name: str) -> None:
    student, teacher, labels = draw()
    loss = DEFINITIONS[name].make({})
    expected = loss(student, teacher, labels)
    assert torch.equal(loss(student, TemperedRows(lambda _: teacher), labels), expected)


def test_ctkd_is_a_module_and_the_others_are_functions() -> None:
    learned = DEFINITIONS["ctkd"].make({})
    assert isinstance(learned, CTKD)
    assert DEFINITIONS["ctkd"].make({}) is not learned  # a temperature for every student
