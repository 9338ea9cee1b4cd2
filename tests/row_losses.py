"""What every loss of rows must do, as tests to inherit; and rows to try losses on.

The formulas that losses are held against are written with numpy in float64, a row at a time, from
the papers' definitions. Such a formula takes (z_s, at, y, held): the student's logits (C,), the
teacher's logits as a function of the temperature, the label, and the student's logits once more, as
a constant where a loss has no gradient.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from stages.objectives.losses import TemperedRows

Row = NDArray[np.float64]
At = Callable[[float], Row]
Formula = Callable[..., float]
Parameters = Mapping[str, float]

KINDS = ("mixed", "right", "wrong", "last")
"""Whether the teacher is right; `last`: the label is its least likely class."""


def draw(
    kind: str = "mixed", classes: int = 10, rows: int = 12, seed: int = 0, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits float32 (B, C), and labels int64 (B,)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, classes, generator=generator) * scale
    order = teacher.argsort(1, descending=True)
    place = {"right": 0, "wrong": 1, "last": classes - 1}.get(kind)
    labels = (
        torch.randint(classes, (rows,), generator=generator) if place is None else order.T[place]
    )
    if kind == "mixed":
        labels[::3] = order[::3, 0]
    return student, teacher, labels


def log_softmax(z: Row, temperature: float = 1.0) -> Row:
    found: Row = special.log_softmax(z / temperature)
    return found


def softmax(z: Row, temperature: float = 1.0) -> Row:
    found: Row = np.exp(log_softmax(z, temperature))
    return found


def log_sum(logs: Row) -> float:
    """log sum exp, -inf of nothing."""
    return float(special.logsumexp(logs)) if len(logs) else -math.inf


def divergence(log_p: Row, log_q: Row) -> float:
    """sum_c p_c (log p_c - log q_c)."""
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def without(z: Row, classes: Sequence[int]) -> Row:
    """The logits of the other classes."""
    return np.array([value for c, value in enumerate(z) if c not in classes])


def by_formula(
    formula: Formula,
    student: Tensor,
    at: Callable[[float], Tensor],
    labels: Tensor,
    parameters: Parameters,
    held: Tensor | None = None,
) -> Row:
    """The formula of every row: (B,)."""
    z_s, z_held = (z.double().numpy() for z in (student, student if held is None else held))

    def row(i: int, y: Tensor) -> float:
        return formula(z_s[i], lambda t: at(t)[i].double().numpy(), int(y), z_held[i], **parameters)

    return np.array([row(i, y) for i, y in enumerate(labels)])


def part_of(teacher: Tensor, labels: Tensor, k: int) -> TemperedRows:
    """The label and the k - 1 largest other logits of each row; of the rest the sum."""
    order = teacher.scatter(1, labels[:, None], torch.inf).argsort(1, descending=True)
    kept = order[:, torch.randperm(k, generator=torch.Generator().manual_seed(0))]
    rest = teacher.scatter(1, kept, -torch.inf)

    def at(temperature: float) -> Tensor:
        sums = torch.logsumexp(rest.double() / temperature, 1, keepdim=True)
        even = temperature * (sums - math.log(teacher.shape[1] - k))
        rows = even.float().expand_as(teacher).contiguous()
        return rows.scatter(1, kept, teacher.gather(1, kept))

    return TemperedRows(at, kept)


def averaged(teachers: Sequence[Tensor], shift: float = 0.0) -> TemperedRows:
    """The mean probabilities of several teachers at each temperature, up to a constant that is
    another at every temperature.
    """

    def at(temperature: float) -> Tensor:
        mean = torch.stack([(z.double() / temperature).softmax(1) for z in teachers]).mean(0)
        rows = temperature * mean.log() + shift * temperature**0.5
        return rows.float()

    return TemperedRows(at)


def on_grid() -> tuple[Tensor, Tensor, Tensor]:
    """Multiples of 1/256: to add up to 10,000 to them is exact."""
    student, teacher, labels = draw(classes=6, rows=16)
    return (student * 256).round() / 256, (teacher * 256).round() / 256, labels


def offset(logits: Tensor, largest: float, seed: int) -> Tensor:
    """Another constant on every row, the largest of them `largest`."""
    generator = torch.Generator().manual_seed(seed)
    constants = (torch.rand(len(logits), 1, generator=generator) * 2 - 1) * largest
    constants[0], constants[1] = largest, -largest
    moved = logits + constants.round()
    assert torch.equal(moved.double(), logits.double() + constants.round().double())
    return moved


def assert_alike(found: Tensor, plain: Tensor, moved: Tensor, leaf: Tensor) -> None:
    """In value and in gradient."""
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(v.sum(), z)[0] for v, z in ((found, moved), (plain, leaf))]
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * scale)


def assert_slopes(
    loss: Callable[[Tensor], float],
    student: Tensor,
    gradient: Tensor,
    places: Sequence[tuple[int, int]],
    **tolerances: float,
) -> None:
    """Finite differences of a loss of a batch, at some entries."""
    for i, c in places:
        step = torch.zeros(student.shape, dtype=torch.float64)
        step[i, c] = 1e-5
        slope = (loss(student + step) - loss(student - step)) / 2e-5
        near = {"rel": 1e-3, "abs": 1e-4, **tolerances}
        assert gradient[i, c].item() == pytest.approx(slope, **near)


class RowLoss:
    """Inherit, and name the loss and its formula.

    parameters: the settings to try. reads: the temperatures at which partial rows are read with the
    first of them; None where such rows are refused. unmoved: the side to whose logits a constant is
    something; `teacher` where it has to be the student's. widest: the largest deviation of logits
    at which float32 is as good as float64.
    """

    loss: ClassVar[Callable[..., Tensor]]
    formula: ClassVar[Formula]
    parameters: ClassVar[Sequence[Parameters]] = ({},)
    reads: ClassVar[Sequence[float] | None] = None
    unmoved: ClassVar[str] = ""
    widest: ClassVar[float] = 20.0

    def check(self, student: Tensor, teacher: Any, labels: Tensor, **tolerances: float) -> None:
        at = teacher.at if isinstance(teacher, TemperedRows) else lambda _: teacher
        for parameters in self.parameters:
            rows = self.loss(student, teacher, labels, reduction="none", **parameters)
            expected = by_formula(self.formula, student, at, labels, parameters)
            assert rows.shape == (len(labels),)
            assert rows.dtype == torch.float32
            scale = max(1, parameters.get("temperature", 4.0) ** 2 / 16)  # T^2 of rounding as well
            rtol, atol = tolerances.get("rtol", 2e-4), tolerances.get("atol", 2e-5 * scale)
            np.testing.assert_allclose(rows.detach().numpy(), expected, rtol=rtol, atol=atol)
            mean = self.loss(student, teacher, labels, **parameters)
            assert mean.shape == ()
            torch.testing.assert_close(mean, rows.mean())

    @pytest.mark.parametrize("classes", [2, 3, 10])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_row_is_the_formula(self, kind: str, classes: int) -> None:
        self.check(*draw(kind, classes))

    @given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6), st.floats(0.01, 20))
    @settings(
        max_examples=8,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.differing_executors],  # it is inherited
    )
    def test_any_rows(self, classes: int, rows: int, seed: int, scale: float) -> None:
        scale = min(scale, self.widest)
        self.check(*draw("mixed", classes, rows, seed, scale), rtol=1e-3, atol=2e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_gradient_is_that_of_finite_differences(self, kind: str) -> None:
        student, teacher, labels = draw(kind, 4, 3)
        for parameters in self.parameters:
            leaf, expected = student.clone().requires_grad_(), np.zeros(student.shape)
            self.loss(leaf, teacher, labels, reduction="none", **parameters).sum().backward()
            for c in range(4):
                moved = 1e-5 * torch.eye(4, dtype=torch.float64)[c]
                up, down = (
                    by_formula(
                        self.formula, student + d, lambda _: teacher, labels, parameters, student
                    )
                    for d in (moved, -moved)
                )
                expected[:, c] = (up - down) / 2e-5
            assert leaf.grad is not None
            np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("of_student", "of_teacher"), [(200, 1), (1, 200), (200, 200), (200, -200)]
    )
    def test_extreme_logits(self, kind: str, of_student: float, of_teacher: float) -> None:
        """Whole rows of +-200, where probabilities are 0 and 1 in float32."""
        student, teacher, labels = draw(kind)
        student = student.sign() * 200 + student if of_student == 200 else student
        teacher = teacher.sign() * of_teacher + teacher
        leaf = student.clone().requires_grad_()
        for parameters in self.parameters:
            (gradient,) = torch.autograd.grad(self.loss(leaf, teacher, labels, **parameters), leaf)
            assert gradient.isfinite().all()
        self.check(student, teacher, labels, rtol=2e-3, atol=1e-3)

    @pytest.mark.parametrize("largest", [1e4, 37.0])
    def test_an_offset_of_a_row_is_nothing(self, largest: float) -> None:
        """In float32 either; but for what `unmoved` names."""
        student, teacher, labels = on_grid()
        moved = student if "student" in self.unmoved else offset(student, largest, 1)
        other = offset(teacher, largest, 2)
        if self.unmoved == "teacher":
            other = moved - student + teacher
        for parameters in self.parameters:
            leaf, again = student.clone().requires_grad_(), moved.clone().requires_grad_()
            plain = self.loss(leaf, teacher, labels, reduction="none", **parameters)
            found = self.loss(again, other, labels, reduction="none", **parameters)
            assert_alike(found, plain, again, leaf)
            if self.reads is not None:
                values = [
                    self.loss(z, part_of(rows, labels, 3), labels, **parameters)
                    for z, rows in ((student, teacher), (moved, other))
                ]
                # what is kept of the rest as float32 is rounded before the loss sees it
                torch.testing.assert_close(*values, rtol=2e-3, atol=2e-3)

    def test_a_row_does_not_depend_on_the_others(self) -> None:
        student, teacher, labels = draw()
        rows = self.loss(student, teacher, labels, reduction="none")
        for i in (0, 5):
            alone = self.loss(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1])
            torch.testing.assert_close(alone, rows[i])

    def test_several_teachers_are_read_at_each_temperature(self) -> None:
        student, one, labels = draw(classes=5)
        other = draw(classes=5, seed=1)[1]
        shift = 0.0 if self.unmoved == "teacher" else 7.0
        self.check(student, averaged([one, other], shift), labels)

    # ---- rows that are known in part ----------------------------------------------------

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("classes", [3, 10])
    def test_all_but_one_class_is_all(self, kind: str, classes: int) -> None:
        student, teacher, labels = draw(kind, classes)
        part = part_of(teacher, labels, classes - 1)
        for parameters in self.parameters if self.reads is not None else ():
            leaf = student.clone().requires_grad_()
            values = [
                self.loss(leaf, rows, labels, reduction="none", **parameters)
                for rows in (part, teacher)
            ]
            torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
            gradients = [torch.autograd.grad(v.sum(), leaf)[0] for v in values]
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
