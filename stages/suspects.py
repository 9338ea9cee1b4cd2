"""Suspected label errors: where a teacher that was not trained on a sample is confident of another.

Confident learning (Northcutt, Jiang, Chuang 2021, arXiv 1911.00068) counts confident disagreement
of out-of-fold predictions and labels. Here a threshold is given (`rectify --wrong confidence:X`),
and a sample is suspected where the teacher reaches it on at least half of the sample's views.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from stages.cache import LogitCache


@dataclass(frozen=True)
class Suspect:
    """A sample that may have the wrong label. label, predicted: class indices; predicted is what
    the teacher is confident of on the most views. views: on how many it is confident of a class
    that is not the label. view: the first on which that class is `predicted`.
    """

    sample: int
    label: int
    predicted: int
    views: int
    view: int = field(default=0, compare=False)


def suspected_labels(
    cache: LogitCache, rectified: str, views: Sequence[int] | None = None
) -> list[Suspect]:
    """The suspects by a rectification with the rule `confidence`, those of the most views first,
    then in dataset order. views: that are looked at; None for all that are rectified.

    Raises CacheError where there is no such rectification.
    """
    rectification = cache.rectification(rectified)
    if views is None:
        views = [v for v in cache.complete_views if rectification.commits.is_complete(v)]
    samples, classes = torch.arange(cache.num_samples), cache.num_classes
    found = []
    for view in views:
        targets = cache.read_view(view, rectified)
        answers = targets.predictions[targets.row_of[samples]].long()
        differs = targets.of(samples).wrong()
        trusted = differs & ~targets.of(samples, rectified=True).wrong()
        found.append((samples * classes + answers)[trusted])
    every = torch.cat([*found, samples[:0]])
    seen_on = torch.cat([*map(torch.full_like, found, views), samples[:0]])
    pairs, which, counts = every.unique(return_inverse=True, return_counts=True)
    earliest = torch.zeros_like(pairs).scatter_reduce_(
        0, which, seen_on, "amin", include_self=False
    )
    whose = pairs // classes
    total = torch.zeros_like(samples).index_add_(0, whose, counts)
    most = torch.zeros_like(samples).scatter_reduce_(0, whose, counts, "amax")
    best = {
        sample: (answer, view)
        for sample, answer, view, tops in zip(
            whose.tolist(),
            (pairs % classes).tolist(),
            earliest.tolist(),
            (counts == most[whose]).tolist(),
            strict=True,
        )
        if tops
    }
    suspects = [
        Suspect(sample, int(cache.labels[sample]), answer, int(total[sample]), view)
        for sample, (answer, view) in best.items()
        if 2 * int(total[sample]) >= len(views)
    ]
    return sorted(suspects, key=lambda suspect: (-suspect.views, suspect.sample))
