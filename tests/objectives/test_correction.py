"""The loss correction: against the authors' formula, finite differences, and target in closed form.

`released` writes `KDOrthoLoss` of microsoft/semiparametric-distillation out by its definition: the
derivative of the cross-entropy in the teacher's probabilities, by autograd, times the residual of
the label, whose division by p is bounded.
"""

import functools
from collections.abc import Callable

import pytest
import row_losses
import torch
from row_losses import part_of
from torch import Tensor

from stages.objectives.correction import corrected, direction
from stages.objectives.losses import DEFINITIONS, TeacherRows
from stages.settings import LossSettings
from stages.training.objective import Objective, student_loss

NAMES = [name for name in DEFINITIONS if name != "ce"]


def draw(classes: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """In float64; labels are the likeliest, middle and least likely classes."""
    student, teacher, _ = row_losses.draw(classes=classes, rows=8)
    places = torch.arange(8) % 3 * (classes - 1) // 2
    labels = teacher.argsort(1, descending=True).gather(1, places[:, None]).squeeze(1)
    return student.double(), teacher.double(), labels


def objective_of(name: str, standardise: bool = False, **given: float) -> Objective:
    average = "batch" if name == "lr" else None
    settings = LossSettings(name=name, standardise=standardise, average=average, **given)
    objective = Objective(student_loss(settings))
    objective.start_epoch(4)
    return objective


def released(student: Tensor, teacher: Tensor, labels: Tensor, t: float, eps: float) -> Tensor:
    """T^2 (KL + <dCE/dp, y - p>), the mean over the batch, with y / p as y / max(p, eps)."""
    total = student.new_zeros(())
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        log_q = (z_s / t).log_softmax(0)
        w = (z_t / t).softmax(0)
        total = total + (w * (w.log() - log_q)).sum()
        p = z_t.softmax(0).requires_grad_()
        powers = p ** (1 / t)
        ce = -(powers / powers.sum() * log_q).sum()
        (slope,) = torch.autograd.grad(ce, p, create_graph=True)
        p = p.detach()
        residual = -p.clone()
        residual[label] += p[label] / max(float(p[label]), eps)
        total = total + (slope * residual).sum()
    return t**2 * total / len(labels)


def of_entropy(teacher: Tensor, labels: Tensor, t: float, eps: float) -> Tensor:
    """What the correction of KL has beside that of CE: no student is in it."""
    w = (teacher / t).softmax(1)
    y = torch.eye(teacher.shape[1], dtype=teacher.dtype)[labels]
    a = y / teacher.softmax(1).clamp(eps) - 1
    moved = w * (a - (w * a).sum(1, keepdim=True)) / t
    return t**2 * (moved * w.log()).sum(1).mean()


@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_kd_is_the_authors(classes: int, t: float, eps: float) -> None:
    """In gradient, and in value but for a term without the student."""
    student, teacher, labels = draw(classes)
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    kd = objective_of("kd", temperature=t)
    value = corrected(lambda rows: kd(ours, rows, labels), teacher, labels, eps).mean()
    expected = released(theirs, teacher, labels, t, eps)
    torch.testing.assert_close(
        value.double(), expected + of_entropy(teacher, labels, t, eps), rtol=1e-4, atol=1e-4
    )
    pair = torch.autograd.grad(value, ours)[0], torch.autograd.grad(expected, theirs)[0]
    torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5)


def test_kd_has_the_target_of_the_closed_form() -> None:
    """target = p + gamma p (a - <p, a>) / T: it sums to 1, and has entries below 0."""
    student, teacher, labels = draw()
    t, alpha, gamma = 4.0, 0.01, 0.7
    p = (teacher / t).softmax(1)
    a = direction(teacher, labels, alpha).double()
    target = p + gamma * p * (a - (p * a).sum(1, keepdim=True)) / t
    torch.testing.assert_close(target.sum(1), torch.ones(len(target), dtype=torch.float64))
    assert (target < 0).any()
    expected = t**2 * (target * (p.log() - (student / t).log_softmax(1))).sum(1)
    kd = objective_of("kd")
    rows = corrected(lambda rows: kd(student, rows, labels), teacher, labels, alpha, gamma)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-5)


def along(loss: Callable[[TeacherRows], Tensor], up: TeacherRows, down: TeacherRows) -> Tensor:
    """The slope between two moved teachers, of a step of 4e-3 each way."""
    return (loss(up) - loss(down)) / 8e-3


def assert_moves(found: Tensor, expected: Tensor, leaf: Tensor) -> None:
    """In value and in the student's gradient."""
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    gradients = [
        torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_moves_along_its_derivative(name: str, standardise: bool) -> None:
    """Of rows known in part as well, as far as they are known."""
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in draw(12))
    objective, leaf = objective_of(name, standardise), student.clone().requires_grad_()

    def loss(rows: TeacherRows) -> Tensor:
        return objective(leaf, rows, labels)

    torch.testing.assert_close(corrected(loss, teacher, labels, 0.3, 0.0), loss(teacher))
    move = 4e-3 * direction(teacher, labels, 0.3)
    found = corrected(loss, teacher, labels, 0.3, 1.0) - loss(teacher)
    assert_moves(found, along(loss, teacher + move, teacher - move), leaf)
    if DEFINITIONS[name].reads is None or standardise:
        return
    part, up, down = (part_of(z, labels, 4) for z in (teacher, teacher + move, teacher - move))
    found = corrected(loss, part, labels, 0.3) - loss(part)
    assert_moves(found, along(loss, up, down), leaf)


@pytest.mark.parametrize("size", [1, 50, 200])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_stay_finite(name: str, size: float) -> None:
    """Also where a probability is 0 or 1 in float32: the bound holds."""
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in draw())
    leaf = (student.sign() * size).requires_grad_()
    objective = objective_of(name)
    value = corrected(
        lambda rows: objective(leaf, rows, labels), teacher.sign() * size + teacher, labels
    ).mean()
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
def test_the_direction_by_hand(alpha: float) -> None:
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.005, 0.005, 0.99]]).log()
    moves = direction(teacher + 3.0, torch.tensor([1, 0]), alpha)
    by_hand = [[-1.0, 1 / max(0.2, alpha) - 1, -1.0], [1 / max(0.005, alpha) - 1, -1.0, -1.0]]
    torch.testing.assert_close(moves, torch.tensor(by_hand), rtol=1e-5, atol=1e-5)


def test_the_correction_repairs_a_biased_teacher_to_second_order() -> None:
    """Over labels that are drawn from the truth, a small error of the teacher changes the expected
    gradient of plain KD in first order, of the corrected loss in second order.
    """
    generator = torch.Generator().manual_seed(0)
    truth, student, bias = torch.randn(3, 1, 4, generator=generator, dtype=torch.float64)
    kd = functools.partial(_expected_gradient, truth, student, alpha=1e-6)
    exact = kd(truth, gamma=0.0)
    errors: dict[float, list[float]] = {0.0: [], 1.0: []}
    for size in (0.2, 0.1):
        for gamma, found in errors.items():
            found.append(float((kd(truth + size * bias, gamma=gamma) - exact).norm()))
    first, second = (found[0] / found[1] for found in errors.values())
    assert first == pytest.approx(2, abs=0.3)
    assert second == pytest.approx(4, abs=0.8)


def _expected_gradient(
    truth: Tensor, student: Tensor, teacher: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Of KD at T = 2, over labels drawn from softmax(truth)."""
    objective: Callable[..., Tensor] = objective_of("kd", temperature=2.0)
    total = torch.zeros_like(student)
    for label, probability in enumerate(truth.softmax(1)[0]):
        leaf, labels = student.clone().requires_grad_(), torch.tensor([label])
        value = corrected(
            functools.partial(lambda z, y, rows: objective(z, rows, y), leaf, labels),
            teacher,
            labels,
            alpha,
            gamma,
        )
        total += probability * torch.autograd.grad(value.sum(), leaf)[0]
    return total
