"""What the losses share: teacher rows, whole or known in part, and divergences of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import ConfigError

Reduction = Literal["mean", "none"]


class Rows(Protocol):
    """Teacher rows that depend on the temperature: known in part (a `topk` cache), or averaged over
    several teachers.
    """

    def at(self, temperature: float) -> Tensor:
        """Rows whose softmax at this temperature is what is known, up to a constant of each row:
        float32 (B, C). Raises CacheError where it is not known.
        """

    def kept(self) -> Tensor | None:
        """int64 (B, k), 1 < k < C, distinct in each row: the label and the largest others, the
        classes whose logits are known and the same at every temperature, where of the rest only the
        sum is; None if all are known.
        """


TeacherRows = Tensor | Rows
"""float (B, C), or rows that depend on the temperature."""


@dataclass(frozen=True)
class TemperedRows:
    """`Rows` from a function of the temperature, and the classes that are kept."""

    read: Callable[[float], Tensor]
    classes: Tensor | None = None

    def at(self, temperature: float) -> Tensor:
        """See `Rows.at`."""
        return self.read(temperature)

    def kept(self) -> Tensor | None:
        """See `Rows.kept`."""
        return self.classes


def known(teacher: TeacherRows, temperature: float) -> Tensor:
    """What is known of the rows at a temperature, the rest of a row spread evenly: float32 (B, C).

    temperature: also a tensor (), where rows that depend on it carry its gradient.
    """
    return teacher.float() if isinstance(teacher, Tensor) else teacher.at(temperature)


def centred(logits: Tensor) -> Tensor:
    """Logits whose largest in each row is 0: float32 (B, C), the same distributions.

    What is divided by a temperature or averaged must be small first: float32 has 7 digits, and an
    offset of 10,000 leaves 3 of them behind the point. The gradient of a loss that no offset
    changes is the same with the maximum as a constant.
    """
    z = logits.float()
    return z - z.detach().amax(1, keepdim=True)


def partial(teacher: TeacherRows) -> bool:
    """Whether of some classes only the sum is known."""
    return _kept(teacher) is not None


def _kept(teacher: TeacherRows) -> Tensor | None:
    return None if isinstance(teacher, Tensor) else teacher.kept()


def paired(
    student_logits: Tensor, teacher: TeacherRows, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits and the labels, over the same classes: float32, float32, int64.

    Both sides are centred. Of rows known in part they have the kept classes and one for all the
    rest.
    """
    student, rows = centred(student_logits), known(teacher, temperature)
    if (kept := _kept(teacher)) is None:
        return student, centred(rows), labels
    # By a kept class: then the constant is the same at every temperature, as `wttm` needs it.
    rows = rows - rows.gather(1, kept).amax(1, keepdim=True)
    classes = (kept == labels[:, None]).long().argmax(1)
    return lump(student, kept, temperature), lump(rows, kept, temperature), classes


def beside(student_logits: Tensor, teacher: TeacherRows, temperature: float) -> Tensor:
    """The student's logits over the classes of `paired`, which may be read at another temperature:
    float32, centred.
    """
    student = centred(student_logits)
    kept = _kept(teacher)
    return student if kept is None else lump(student, kept, temperature)


def whole(teacher: TeacherRows, loss: str, temperature: float) -> Tensor:
    """The rows at a temperature: float32 (B, C). Raises ConfigError where part of them is known."""
    if partial(teacher):
        raise needs_whole_rows(loss)
    return known(teacher, temperature)


def check_two_views(student_logits: Tensor, loss: str) -> None:
    """Raise ConfigError unless logits are those of a weak and of a strong view, (2, B, C)."""
    if student_logits.dim() != 3 or len(student_logits) != 2:
        raise ConfigError(
            f"the loss '{loss}' takes the rows of a weak and of a strong view, (2, B, C), not "
            f"those of one: {tuple(student_logits.shape)}",
            "Stack the two, or use train-student, which reads both from a cache of paired views.",
        )


def needs_whole_rows(loss: str) -> ConfigError:
    """The error of a loss that cannot do with rows that are known in part."""
    return ConfigError(
        f"the loss '{loss}' needs whole teacher rows, the cache keeps part of each",
        "Use another loss, or cache with another --encoding.",
    )


def changed(teacher: TeacherRows, change: Callable[[Tensor], Tensor]) -> TeacherRows:
    """Rows after a change, which may touch kept classes, and all others of a row evenly."""
    if isinstance(teacher, Tensor):
        return change(teacher.float())
    return TemperedRows(lambda t: change(teacher.at(t)), teacher.kept())


def lump(logits: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """The logits of some classes, and one for all other classes together.

    logits: float (n, C). kept: int64 (n, k), k < C, distinct in each row. Returns (n, k + 1): with
    softmax(. / temperature), the last entry is the probability of all the rest. A loss on rows
    lumped on both sides is exact in what is kept and blind to how the rest divides; renormalising
    the kept ones instead would pull them up (Sparse Logit Sampling, arXiv 2503.16870).
    """
    lumped: Tensor = _Lump.apply(logits, kept, temperature)
    return lumped


class _Lump(torch.autograd.Function):
    """T logsumexp(z / T) of the rest, beside the kept logits. Of rows of many classes, one copy is
    made and nothing as large is kept for the way back, whose one copy is the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, kept: Tensor, temperature: float) -> Tensor:
        rest = (logits / temperature).scatter_(1, kept, -torch.inf)
        largest = rest.amax(1, keepdim=True)
        weight = rest.sub_(largest).exp_().sum(1, keepdim=True)
        together = temperature * weight.log_().add_(largest)
        ctx.save_for_backward(logits, kept, together)
        ctx.temperature = temperature
        return torch.cat([logits.gather(1, kept), together], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, kept, together = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is differentiated once more
            shares = ((logits - together) / ctx.temperature).exp()
            return (shares * gradient[:, -1:]).scatter(1, kept, gradient[:, :-1]), None, None
        shares = (logits - together).div_(ctx.temperature).exp_()
        whole = shares.mul_(gradient[:, -1:]).scatter_(1, kept, gradient[:, :-1])
        return whole, None, None


def reduced(rows: Tensor, reduction: Reduction) -> Tensor:
    """The mean of row losses (B,), or the rows."""
    return rows.mean() if reduction == "mean" else rows


def kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(softmax(z_t) || softmax(z_s)) of every row: float32 (B,)."""
    student = F.log_softmax(student_logits, dim=1)
    teacher = F.log_softmax(teacher_logits, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def binary_kl(teacher_log: tuple[Tensor, Tensor], student_log: tuple[Tensor, Tensor]) -> Tensor:
    """KL between two-way distributions, given the logs of both parts, each (B,): float32 (B,)."""
    (t_one, t_rest), (s_one, s_rest) = teacher_log, student_log
    return t_one.exp() * (t_one - s_one) + t_rest.exp() * (t_rest - s_rest)


def one_and_rest(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """log p(c) and log(1 - p(c)) for one class c of each row, neither through 1 - p: (B,) each."""
    log_p = F.log_softmax(logits, dim=1)
    rest = log_p.scatter(1, classes[:, None], -torch.inf)
    return log_p.gather(1, classes[:, None]).squeeze(1), rest.logsumexp(1)


def without(logits: Tensor, excluded: Tensor) -> Tensor:
    """Logits that leave nothing to the excluded classes (bool (B, C)); a row without any other
    class is uniform, so that a divergence of two such rows is 0 and not NaN.
    """
    return logits.masked_fill(excluded, -1e9)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """bool (B, C), true at the label."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)
