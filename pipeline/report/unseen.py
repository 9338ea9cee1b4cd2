"""The statistics of a cache of folds beside those of caches of one teacher.

Every row of a cache of folds is of a teacher that was trained without the sample, so that its
confidence and its mistakes are those on new images. On its own training images a teacher is more
confident, and more often right.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.console import percent
from pipeline.report.figures import confidence_of_caches
from pipeline.report.measured import Statistics
from pipeline.report.tables import Cell, Row, Table

MOST_BESIDE = 5
"""Caches of one teacher that a cache of folds is compared with."""


def beside_others(key: str, own: Statistics, every: Sequence[Statistics]) -> dict[str, Any] | None:
    """What the page shows of a cache of folds: its statistics beside those of caches of one
    teacher of the same dataset, those of the same architecture first. None for another cache.
    """
    if not own.folds:
        return None
    single = [other for other in every if not other.folds]
    single.sort(key=lambda other: other.architecture != own.architecture)
    shown = [own, *single[:MOST_BESIDE]]
    note = (
        "The rows of one teacher are of its own training images, unless it was trained on others. "
        "On those it is more accurate and more confident than on new images."
        if single
        else "Give a cache of one teacher as well, to compare its confidence on images that it was "
        "trained on."
    )
    columns = (
        *("teacher", "cache", "rows of", "mean confidence", "wrong rows", "overconfident by"),
        *("ECE", "NLL, nats", "calibrated T"),
    )
    caption = "Samples that the teacher was not trained on"
    table = Table(caption, columns, [_row(each) for each in shown], words=3, note=note)
    return {"table": table, "figure": confidence_of_caches(f"{key}-unseen", shown)}


def _row(of: Statistics) -> Row:
    mean, over = float(of.confidence.double().mean()), of.overconfidence
    return Row(
        [
            of.architecture,
            of.name,
            f"{of.folds} teachers, out of fold" if of.folds else "one teacher",
            Cell(percent(mean), mean, "unseen_confidence"),
            Cell(percent(of.wrong_rate), of.wrong_rate, "unseen_wrong_rate"),
            Cell(f"{100 * over:+.2f} points", over, "unseen_overconfidence"),
            Cell(percent(of.ece), of.ece, "unseen_ece"),
            Cell(f"{of.nll:.3f}", of.nll, "unseen_nll"),
            "" if of.temperature is None else Cell(f"{of.temperature:.3g}", of.temperature),
        ]
    )
