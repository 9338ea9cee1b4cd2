"""CTKD: KD at a temperature whose gradient is turned round."""

import math

import pytest
import torch
from row_losses import KINDS, averaged, draw

from stages.errors import ConfigError
from stages.objectives.losses import CTKD, kd

START = 1 + 20 / (1 + math.exp(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_kd_at_its_temperature(kind: str) -> None:
    student, teacher, labels = draw(kind)
    loss = CTKD()
    loss.start_epoch(0)
    assert loss.temperature.item() == pytest.approx(START)  # 15.6
    rows = loss(student, teacher, labels, reduction="none")
    expected = kd(student, teacher, labels, START, reduction="none")
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss(student, teacher, labels), rows.mean())


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, (math.cos(math.pi / 10) - 1) / 2), (4, -0.5), (9, -1.0), (10, -1.0), (239, -1.0)],
)
def test_the_gradient_of_the_temperature_is_the_reverse_of_kds(epoch: int, expected: float) -> None:
    student, teacher, labels = draw()
    loss = CTKD()
    loss.start_epoch(epoch)
    loss(student, teacher, labels).backward()

    def kd_at(theta: float) -> float:
        t = 1 + 20 / (1 + math.exp(-theta))
        return kd(student.double(), teacher.double(), labels, t).item()

    step = 0.05  # of a smooth curve, in float32
    slope = (kd_at(1 + step) - kd_at(1 - step)) / (2 * step)
    assert abs(slope) > 0.01
    assert loss.theta.grad is not None
    assert loss.theta.grad.item() == pytest.approx(expected * slope, rel=1e-2)


def test_its_range_and_its_decay_can_be_set() -> None:
    """T = t_start + t_end sigmoid(theta); the decay of ImageNet in the released code is 5."""
    loss = CTKD(t_start=2.0, t_end=4.0, decay=5.0)
    for epoch, expected in ((0, (math.cos(math.pi / 5) - 1) / 2), (4, -1.0), (5, -1.0)):
        loss.start_epoch(epoch)
        assert loss.reversal == pytest.approx(expected)
    for theta, expected in ((-30.0, 2.0), (0.0, 4.0), (30.0, 6.0)):
        with torch.no_grad():
            loss.theta.fill_(theta)
        assert loss.temperature.item() == pytest.approx(expected)


def test_before_the_first_epoch_it_is_refused() -> None:
    """And does not stay KD at the first temperature without a word."""
    with pytest.raises(ConfigError) as refused:
        CTKD()(*draw())
    assert "start_epoch" in refused.value.remedy


def test_several_teachers_are_read_at_the_learned_temperature() -> None:
    """And the temperature has its gradient through them as well."""
    student, one, labels = draw()
    teachers = [one, draw(seed=1)[1]]

    def value_and_slope(theta: float) -> tuple[float, float]:
        loss = CTKD()
        loss.start_epoch(20)
        with torch.no_grad():
            loss.theta.fill_(theta)
        value = loss(student, averaged(teachers), labels)
        value.backward()
        assert loss.theta.grad is not None
        return value.item(), loss.theta.grad.item()

    (before, _), (value, slope), (after, _) = (value_and_slope(1 + d) for d in (-0.05, 0, 0.05))
    assert slope == pytest.approx(-(after - before) / 0.1, rel=1e-2)
    mean = averaged(teachers).at(START)
    assert value == pytest.approx(kd(student, mean, labels, START).item(), rel=1e-3)
