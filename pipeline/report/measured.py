"""What a cache says about its teacher: how often it is wrong, where, and how confident it is.

Counts come from the stored predictions (the teacher's argmax before any encoding), everything else
from decoded rows. Rows lie in random order, so that a run of rows is a fair draw: a large cache is
measured on as many as fit a budget, and `Draw` says how many that were.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.calibrate import fair_draw
from stages.scores import Calibration, calibration

MAX_ROWS = 50_000
MAX_VALUES = 2**24
"""Of decoded logits: 64 MB as float32."""
MAX_PREDICTIONS = 2**25
MAX_VIEWS = 16
"""How many views rows are decoded of, where not all fit."""


@dataclass(frozen=True)
class Draw:
    """Rows that were decoded. All tensors have the same order.

    views, samples, labels, predictions: int64 (n,). logits: float32 (n, C). wrong: bool (n,).
    before, after: float32 (m, C), logits of the m wrong rows as a loss at `temperature` reads them,
    as cached and rectified; `after` is None where there is no rectification.
    """

    views: Tensor
    samples: Tensor
    labels: Tensor
    predictions: Tensor
    logits: Tensor
    before: Tensor
    after: Tensor | None
    temperature: float
    total: int

    @property
    def wrong(self) -> Tensor:
        """bool (n,): whether the teacher's argmax differs from the label."""
        return self.predictions != self.labels

    @property
    def complete(self) -> bool:
        """Whether these are all rows that there are."""
        return len(self.labels) == self.total


def chosen_rectification(cache: LogitCache, views: Sequence[int]) -> str | None:
    """The first rectification that covers these views."""
    for name in sorted(cache.rectifications):
        commits = cache.rectification(name).commits
        if all(commits.is_complete(view) for view in views):
            return name
    return None


def draw_rows(
    cache: LogitCache, rectified: str | None, max_rows: int = MAX_ROWS, max_views: int = MAX_VIEWS
) -> Draw:
    """Decode all rows of the complete views, or a fair draw of so many."""
    total = len(cache.complete_views) * (cache.num_samples - len(cache.skipped()))
    temperature = 1.0
    if rectified is not None:
        temperature = cache.rectification(rectified).settings.temperature
    parts = []
    for view, run in fair_draw(cache, max_rows, MAX_VALUES, max_views):
        targets = cache.read_view(view, rectified, [run])
        samples = cache.dataset_index[run]
        seen = ~torch.isin(samples, cache.skipped())
        samples = samples[seen]
        wrong = samples[targets.wrong(samples)]
        before = targets.rows(wrong, temperature)
        after = before if rectified is None else targets.rectified_rows(wrong, temperature)
        parts.append(
            (
                torch.full_like(samples, view),
                samples,
                targets.labels[seen],
                targets.predictions[seen],
                targets.rows(samples),
                before,
                after,
            )
        )
    views_of, samples, labels, predictions, logits, before, after = (
        torch.cat(tensors) for tensors in zip(*parts, strict=True)
    )
    return Draw(
        views_of,
        samples,
        labels,
        predictions,
        logits,
        before,
        None if rectified is None else after,
        temperature,
        total,
    )


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats: float32 (n, C) -> float32 (n,)."""
    log_p = torch.log_softmax(logits / temperature, dim=1)
    return -(log_p.exp() * log_p).sum(1)


def calibration_of(logits: Tensor, right: Tensor) -> Calibration:
    """Of rows at T=1. logits: float32 (n, C), n > 0. right: bool (n,)."""
    return calibration(torch.softmax(logits, dim=1).amax(1), right)


@dataclass(frozen=True)
class Mistakes:
    """Counts over predictions. rows, wrong: int64 (C,) by label. confused: (label, predicted,
    count), the most frequent first. used, total: how many predictions were counted, of how many.
    """

    rows: Tensor
    wrong: Tensor
    confused: list[tuple[int, int, int]]
    used: int
    total: int

    @property
    def rate(self) -> float:
        """The share of wrong predictions, in [0, 1]."""
        return int(self.wrong.sum()) / self.used


def count_mistakes(cache: LogitCache, max_predictions: int = MAX_PREDICTIONS) -> Mistakes:
    """Which classes the teacher has wrong, and what it takes them for, over all complete views."""
    views, classes = cache.complete_views, cache.num_classes
    each = max(1, min(cache.num_samples, max_predictions // len(views)))
    run = slice(0, each)
    seen = ~torch.isin(cache.dataset_index[run], cache.skipped())
    labels = cache.row_labels[run][seen]
    wrong, pairs = torch.zeros(classes, dtype=torch.int64), Counter[int]()
    for view in views:
        predictions = cache.predictions(view, run)[seen]
        missed = predictions != labels
        wrong += torch.bincount(labels[missed], minlength=classes)
        codes = (labels[missed] * classes + predictions[missed]).unique(return_counts=True)
        pairs.update(dict(zip(*(part.tolist() for part in codes), strict=True)))
    ranked = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    return Mistakes(
        rows=torch.bincount(labels, minlength=classes) * len(views),
        wrong=wrong,
        confused=[(code // classes, code % classes, count) for code, count in ranked],
        used=len(labels) * len(views),
        total=(cache.num_samples - len(cache.skipped())) * len(views),
    )


@dataclass(frozen=True)
class Statistics:
    """How confident the teacher of a cache is, and how often right. folds: 0 where there is one
    teacher. confidence: float32 (n,), the largest probability of each row that was drawn, at T=1.
    nll: mean negative log-likelihood of the label in nats. temperature: the calibrated one, None
    where there is none.
    """

    name: str
    architecture: str
    folds: int
    confidence: Tensor
    wrong_rate: float
    ece: float
    overconfidence: float
    nll: float
    temperature: float | None


def statistics_of(cache: LogitCache, draw: Draw, mistakes: Mistakes) -> Statistics:
    """Of rows that were drawn; mistakes are counted over more of them."""
    teacher, found = cache.identity.teacher, calibration_of(draw.logits, ~draw.wrong)
    log_p = torch.log_softmax(draw.logits, dim=1)
    return Statistics(
        name=PurePosixPath(str(cache.path)).name,
        architecture=teacher.architecture,
        folds=0 if teacher.folds is None else teacher.folds.count,
        confidence=log_p.amax(1).exp(),
        wrong_rate=mistakes.rate,
        ece=found.ece,
        overconfidence=found.overconfidence,
        nll=-float(log_p.gather(1, draw.labels[:, None]).double().mean()),
        temperature=None if cache.calibrated is None else cache.calibrated.temperature,
    )
