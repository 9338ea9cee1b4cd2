"""MLKD of one view: the weak terms of the released code, and those alone."""

from functools import partial

import pytest
import torch
from row_losses import KINDS, assert_slopes, averaged, draw
from test_mlkd import weak_terms as transcribed

from stages.objectives.losses.mlkd_weak import mlkd_weak


@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lskd", [False, True])
def test_it_is_what_the_code_does_to_weak_views(kind: str, classes: int, lskd: bool) -> None:
    student, teacher, labels = draw(kind, classes, 8)
    leaf = student.clone().requires_grad_()
    found = mlkd_weak(leaf, teacher, labels, 4.0, lskd)
    assert found.item() == pytest.approx(transcribed(student, teacher, 4.0, lskd), rel=2e-4)
    (gradient,) = torch.autograd.grad(found, leaf)
    expected = partial(transcribed, teacher=teacher, first=4.0, lskd=lskd)
    assert_slopes(expected, student, gradient, ((0, 0), (7, 1)), rel=2e-3, abs=2e-4)


def test_several_teachers_are_read_at_each_temperature() -> None:
    student, one, labels = draw(classes=6)
    mean = averaged([one, draw(classes=6, seed=1)[1]], shift=5.0)
    expected = transcribed(student, mean, 4.0)
    assert mlkd_weak(student, mean, labels).item() == pytest.approx(expected, rel=5e-4)
