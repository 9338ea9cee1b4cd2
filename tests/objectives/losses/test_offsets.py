"""A constant on a row of logits changes no probability: no loss of batches, in float32 either.

Losses of rows: `RowLoss`.
"""

import pytest
from row_losses import assert_alike, offset, on_grid

from stages.settings import LossSettings
from stages.training.objective import Objective, student_loss


@pytest.mark.parametrize(("of_student", "of_teacher"), [(1e4, 1e4), (1e4, 0.0), (37.0, 5.0)])
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("name", ["ctkd", "dist", "mlkd", "mlkd_weak", "crld"])
def test_an_offset_of_a_row_is_nothing(
    name: str, standardise: bool, of_student: float, of_teacher: float
) -> None:
    student, teacher, labels = on_grid()
    objective = Objective(student_loss(LossSettings(name=name, standardise=standardise)))
    objective.start_epoch(0)
    leaf, moved = student.requires_grad_(), offset(student.detach(), of_student, 1).requires_grad_()
    plain = objective(leaf, teacher, labels)
    found = objective(moved, offset(teacher, of_teacher, 2), labels)
    assert_alike(found, plain, moved, leaf)
