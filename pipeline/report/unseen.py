"""What a teacher says of samples that it has not seen, beside one that may have; labels it doubts.

A teacher that is asked about its own training images is right by memory. Of a cache of folds every
row is of a teacher that was trained without the sample, so that its confidence and its mistakes are
those on new images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from pipeline.console import percent
from pipeline.report.figures import confidence_of_caches
from pipeline.report.gallery import Sample
from pipeline.report.measured import MAX_VIEWS, Draw, Mistakes, calibration_of
from pipeline.report.tables import Cell, Row, Table
from stages.cache import LogitCache
from stages.suspects import suspected_labels

MOST_BESIDE = 5
"""Caches of one teacher that a cache of folds is compared with."""
MOST_SUSPECTS = 12


@dataclass(frozen=True)
class Certainty:
    """How sure the teacher of a cache is. folds: 0 where one teacher was asked. confidence: float32
    (n,), the largest probability of each row that was drawn, at T=1. nll: mean negative
    log-likelihood of the label in nats. temperature: the calibrated one, None where there is none.
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


def certainty_of(cache: LogitCache, draw: Draw, mistakes: Mistakes) -> Certainty:
    """Of rows that were drawn; mistakes are counted over more of them."""
    teacher, found = cache.identity.teacher, calibration_of(draw.logits, ~draw.wrong)
    log_p = torch.log_softmax(draw.logits, dim=1)
    return Certainty(
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


def beside_others(key: str, own: Certainty, every: Sequence[Certainty]) -> dict[str, Any] | None:
    """What the page shows of a cache of folds: its certainty beside that of caches of one teacher
    of the same dataset, those of the same architecture first. None for another cache.
    """
    if not own.folds:
        return None
    single = [other for other in every if not other.folds]
    single.sort(key=lambda other: other.architecture != own.architecture)
    shown = [own, *single[:MOST_BESIDE]]
    note = (
        "One teacher was asked about its own training images, unless it was trained on others. Of "
        "these it is right, and sure, from memory."
        if single
        else "Give a cache of one teacher as well, to see how much surer that is of images that it "
        "was trained on."
    )
    columns = (
        *("teacher", "cache", "rows of", "mean confidence", "wrong rows", "overconfident by"),
        *("ECE", "NLL, nats", "calibrated T"),
    )
    caption = "Samples that the teacher has not seen"
    table = Table(caption, columns, [_row(each) for each in shown], words=3, note=note)
    return {"table": table, "figure": confidence_of_caches(f"{key}-unseen", shown)}


def _row(of: Certainty) -> Row:
    sure, over = float(of.confidence.double().mean()), of.overconfidence
    return Row(
        [
            of.architecture,
            of.name,
            f"{of.folds} teachers, out of fold" if of.folds else "one teacher",
            Cell(percent(sure), sure, "unseen_confidence"),
            Cell(percent(of.wrong_rate), of.wrong_rate, "unseen_wrong_rate"),
            Cell(f"{100 * over:+.2f} points", over, "unseen_overconfidence"),
            Cell(percent(of.ece), of.ece, "unseen_ece"),
            Cell(f"{of.nll:.3f}", of.nll, "unseen_nll"),
            "" if of.temperature is None else Cell(f"{of.temperature:.3g}", of.temperature),
        ]
    )


# ---- labels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubts:
    """Labels that may be wrong, by the rectification `rule`. samples: those that are shown, with a
    note for each. views: on how many they were looked for.
    """

    rule: str
    total: int
    views: int
    samples: Sequence[Sample]
    notes: Sequence[str]


def doubts_of(cache: LogitCache) -> Doubts | None:
    """The labels that a rectification with `--wrong confidence:X` doubts, those of the most views
    first; None where there is no such rectification of all complete views.
    """
    complete = cache.complete_views
    views = complete[:: -(-len(complete) // MAX_VIEWS)]
    for name in sorted(cache.rectifications):
        rectification = cache.rectification(name)
        if rectification.settings.trusted_above is None:
            continue
        if not all(rectification.commits.is_complete(view) for view in complete):
            continue
        found = suspected_labels(cache, name, views)
        shown = [
            _sample(cache, s.sample, s.view, s.label, s.predicted) for s in found[:MOST_SUSPECTS]
        ]
        notes = [f"sure on {s.views} of {len(views)} views" for s in found[:MOST_SUSPECTS]]
        return Doubts(name, len(found), len(views), shown, notes)
    return None


def _sample(cache: LogitCache, sample: int, view: int, label: int, predicted: int) -> Sample:
    """A row as the gallery shows it, at T=1."""
    row = int(cache.row_of[sample])
    targets = cache.read_view(view, None, [slice(row, row + 1)])
    p = targets.rows(torch.tensor([sample]))[0].softmax(0)
    return Sample("doubted", sample, view, label, predicted, float(p[predicted]), p, None)
