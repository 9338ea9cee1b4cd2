"""How good logits are, and how two models differ on the same samples: pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
"""Of the calibration error, as Guo et al. 2017 report it."""


class Scores(msgspec.Struct, frozen=True):
    """top1, top5: in [0, 1]; top5 of all classes where there are fewer than five. nll: mean
    negative log-likelihood of the label in nats. ece: that of `calibration`.
    """

    top1: float
    top5: float
    nll: float
    ece: float


class ClassScore(msgspec.Struct, frozen=True):
    """One class: how many test samples it has and on what share of them the run is right, and the
    teacher where it was compared; None where there are no samples.
    """

    name: str
    samples: int
    top1: float | None
    teacher_top1: float | None = None

    @property
    def gain(self) -> float:
        """Student minus teacher, 0 where either is unknown."""
        known = self.top1 is not None and self.teacher_top1 is not None
        return (self.top1 or 0.0) - (self.teacher_top1 or 0.0) if known else 0.0


class Comparison(msgspec.Struct, frozen=True):
    """A student beside the teacher whose logits lie in `caches`.

    agreement: share of the test samples with the same argmax. kl: mean KL(teacher || student) at
    T=1, in nats. The other four count test samples by who is right, and add up to all of them.
    """

    caches: tuple[str, ...]
    teacher: Scores
    agreement: float
    kl: float
    both_right: int
    only_teacher: int
    only_student: int
    both_wrong: int


def score(logits: Tensor, labels: Tensor, predictions: Tensor | None = None) -> Scores:
    """All scores of logits, float (N, C), against labels, int64 (N,).

    predictions: int64 (N,), the argmax of exact rows where the logits are rounded.
    """
    logs = torch.log_softmax(logits.float(), dim=1)
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, up to 5)
    confidence, predicted = logs.max(1)
    if predictions is None:
        predictions = predicted
    return Scores(
        top1=_mean(predictions == labels),
        top5=_mean(best.any(1)),
        nll=-_mean(logs.gather(1, labels[:, None])),
        ece=calibration(confidence.double().exp(), predictions == labels).ece,
    )


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, by bins of confidence.

    rows, confidence, accuracy: float64 (bins,), the number of rows and means over them; those of an
    empty bin are 0. ece: expected calibration error. overconfidence: mean confidence minus
    accuracy.
    """

    rows: Tensor
    confidence: Tensor
    accuracy: Tensor
    ece: float
    overconfidence: float


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> Calibration:
    """Expected calibration error with bins of equal width: Guo et al. 2017, "On Calibration of
    Modern Neural Networks", equation 3, arXiv 1706.04599.

        ECE = sum_m |B_m| / N * |accuracy(B_m) - confidence(B_m)|

    B_m: the rows with a confidence in ((m-1)/M, m/M]. confidence: float (N,), N > 0, the largest
    probability of each row. right: bool (N,).
    """
    confidence, hits = confidence.double(), right.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    which = torch.bucketize(confidence, edges[1:-1])  # upper edges belong to their bin
    rows = which.bincount(minlength=bins).double()
    summed, hit = (which.bincount(values, minlength=bins) for values in (confidence, hits))
    return Calibration(
        rows=rows,
        confidence=summed / rows.clamp(min=1),
        accuracy=hit / rows.clamp(min=1),
        ece=float((hit - summed).abs().sum() / len(confidence)),
        overconfidence=float(confidence.mean() - hits.mean()),
    )


def class_scores(
    names: Sequence[str], labels: Tensor, predictions: Tensor, teacher: Tensor | None = None
) -> tuple[ClassScore, ...]:
    """The accuracy on each class. labels, predictions, teacher (its predictions): int64 (N,)."""
    counts = labels.bincount(minlength=len(names))

    def shares(answers: Tensor) -> list[float | None]:
        hits = labels[answers == labels].bincount(minlength=len(names))
        return [h / n if n else None for h, n in zip(hits.tolist(), counts.tolist(), strict=True)]

    theirs = [None] * len(names) if teacher is None else shares(teacher)
    columns = zip(names, counts.tolist(), shares(predictions), theirs, strict=True)
    return tuple(ClassScore(*column) for column in columns)


def compare(
    student: Tensor, teacher: tuple[Tensor, Tensor], labels: Tensor, caches: Sequence[str]
) -> Comparison:
    """Student and teacher on the same samples: logits float (N, C), labels int64 (N,).

    teacher: its logits and its predictions, int64 (N,).
    """
    rows, theirs = teacher
    ours = student.argmax(1)
    right, taught = ours == labels, theirs == labels
    log_student, log_teacher = (torch.log_softmax(z.float(), dim=1) for z in (student, rows))
    kl = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1).clamp(min=0)
    return Comparison(
        caches=tuple(caches),
        teacher=score(rows, labels, theirs),
        agreement=_mean(ours == theirs),
        kl=_mean(kl),
        both_right=int((right & taught).sum()),
        only_teacher=int((~right & taught).sum()),
        only_student=int((right & ~taught).sum()),
        both_wrong=int((~right & ~taught).sum()),
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
