"""Whether a teacher fits its dataset, judged from the first rows, before hours of work.

It finds a wrong normalisation, weights that were not loaded, and classes in another order.
"""

import math
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[attr-defined]
from torch import Tensor

_FEWEST_ROWS = 50
_MOST_CLASSES = 5_000
"""The assignment of classes takes the cube of their number."""
_CONSTANT = 0.995


def teacher_warnings(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> list[str]:
    """What is suspicious about a teacher's rows, a sentence each; nothing if all seems well.

    logits: float32 (n, C). labels: int64 (n,), -1 where there are none. Looked for: one answer to
    everything, accuracy near chance, and an order of the classes in which it would be right far
    more often.
    """
    predictions, rows = logits.argmax(1), len(labels)
    labelled = bool((labels >= 0).all())
    if rows < _FEWEST_ROWS or (labelled and len(labels.unique()) < 2):
        return []
    counts = torch.bincount(predictions, minlength=len(class_names))
    commonest = int(counts.argmax())
    if int(counts[commonest]) >= _CONSTANT * rows:
        return [
            f"the teacher takes {int(counts[commonest]) / rows:.1%} of {rows:,} training images "
            f"for {class_names[commonest]!r}: check its weights and its normalisation"
        ]
    if not labelled:
        return []
    top1 = float((predictions == labels).double().mean())
    if better := _better_order(predictions, labels, class_names):
        order, found, now = better
        return [
            f"the teacher is right on {now:.1%} of the training images, and would be on "
            f"{found:.1%} if its outputs were in another order ({order}): give --class-order with "
            "the names of its classes"
        ]
    chance = float(torch.bincount(labels).max()) / rows
    if top1 < _near(chance, rows):
        return [
            f"the teacher is right on {top1:.1%} of {rows:,} training images, chance is "
            f"{chance:.1%}: check its weights, its normalisation and the order of its classes"
        ]
    return []


def _near(chance: float, rows: int) -> float:
    """Below this accuracy a teacher knows next to nothing: twice chance, or for few classes a tenth
    of the way from chance to 1; and what so few rows may vary by.
    """
    noise = 3 * math.sqrt(chance * (1 - chance) / rows)
    return min(2 * chance, chance + (1 - chance) / 10) + noise


def _better_order(
    predictions: Tensor, labels: Tensor, class_names: Sequence[str]
) -> tuple[str, float, float] | None:
    """An order of the outputs with far higher accuracy: in words, its accuracy, and today's.

    It is fitted to half of the rows and judged by the others: any order fits noise.
    """
    classes, half = len(class_names), len(labels) // 2
    if classes > _MOST_CLASSES:
        return None
    pairs = labels[:half] * classes + predictions[:half]
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    label_of_output = torch.empty(classes, dtype=torch.int64)
    rows, columns = linear_sum_assignment(confusion.numpy(), maximize=True)
    label_of_output[torch.from_numpy(columns)] = torch.from_numpy(rows)
    answers, right = predictions[half:], labels[half:]
    now = float((answers == right).double().mean())
    found = float((label_of_output[answers] == right).double().mean())
    noise = 5 * (0.25 / len(right)) ** 0.5
    if found - now < max(0.05, noise):
        return None
    seen = [o for o in answers.unique().tolist() if int(label_of_output[o]) != o]
    shown = [f"output {o} fits {class_names[int(label_of_output[o])]!r}" for o in seen[:3]]
    return ", ".join(shown), found, now
