"""Labels that may be wrong, as the page shows them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.report.gallery import Sample
from pipeline.report.measured import MAX_VIEWS
from stages.cache import LogitCache
from stages.suspects import suspected_labels

MOST_SUSPECTS = 12
"""How many are shown."""


@dataclass(frozen=True)
class SuspectedLabels:
    """Labels that may be wrong, by the rectification `rule`. samples: those that are shown, with a
    note for each. views: on how many they were looked for.
    """

    rule: str
    total: int
    views: int
    samples: Sequence[Sample]
    notes: Sequence[str]


def suspected_of(cache: LogitCache) -> SuspectedLabels | None:
    """The labels that a rectification with `--wrong confidence:X` suspects, those of the most
    views first; None where there is no such rectification of all complete views.
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
        notes = [f"confident on {s.views} of {len(views)} views" for s in found[:MOST_SUSPECTS]]
        return SuspectedLabels(name, len(found), len(views), shown, notes)
    return None


def _sample(cache: LogitCache, sample: int, view: int, label: int, predicted: int) -> Sample:
    """A row as the gallery shows it, at T=1."""
    row = int(cache.row_of[sample])
    targets = cache.read_view(view, None, [slice(row, row + 1)])
    p = targets.rows(torch.tensor([sample]))[0].softmax(0)
    return Sample("suspected", sample, view, label, predicted, float(p[predicted]), p, None)
