"""Several teachers at once: caches of the same views, their probabilities averaged.

    pipeline train-student one.zarr --also two.zarr --also three.zarr ...

The target is the mean of the members' probabilities at the loss's temperature, written as logits
for which softmax(z / T) is that mean:

    z = T log(mean_k softmax(z_k / T))

up to the constant that softmax ignores. A row of the ensemble is wrong where the class with the
largest mean probability at T = 1, which is what the ensemble would answer, is not the label. Both
are taken from the decoded rows: members may be encoded differently and lie in different orders.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.identity import differences
from stages.cache.targets import TargetRows, Targets, ViewTargets
from stages.errors import CacheError, ConfigError, IdentityError


@dataclass(frozen=True)
class EnsembleTargets(Targets):
    """The targets of one view from several caches. labels: int64 (N,), in dataset order."""

    members: Sequence[ViewTargets]
    labels: Tensor

    def of(
        self, samples: Tensor, rectified: bool = False, calibrated: bool = False
    ) -> "EnsembleRows":
        """See `Targets.of`. Raises ConfigError for rectified ones: there are none."""
        if rectified:
            raise ConfigError(*NOT_RECTIFIED)
        asked = [member.of(samples, calibrated=calibrated) for member in self.members]
        return EnsembleRows(asked, self.labels[samples])


@dataclass(frozen=True)
class EnsembleRows:
    """The targets of some samples, see `TargetRows`. labels: int64 (n,), theirs."""

    members: Sequence[TargetRows]
    labels: Tensor
    tempered = True

    def at(self, temperature: float = 1.0) -> Tensor:
        """Logits whose softmax at `temperature` is the members' mean: float32 (n, C). Where a
        member keeps only part of a row, the rest is spread evenly.
        """
        return mean_logits([member.at(temperature) for member in self.members], temperature)

    def wrong(self) -> Tensor:
        """bool (n,): whether the ensemble's answer at T = 1 differs from the label."""
        return self.at().argmax(1) != self.labels

    def kept(self) -> None:
        """Every class: what is lost of one member is known of another, or spread evenly."""


def mean_logits(members: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Logits whose softmax at `temperature` is the members' mean: float (n, C), as each of them."""
    logs = torch.stack([torch.log_softmax(z / temperature, dim=1) for z in members])  # (K, n, C)
    return temperature * (logs.logsumexp(0) - math.log(len(members)))


def teacher_top1(caches: Sequence[LogitCache]) -> float:
    """Accuracy on the test split, in [0, 1]; of several teachers that of their mean probabilities.

    Raises CacheError where a cache has no logits of the test split.
    """
    if len(caches) == 1:
        return caches[0].eval_top1()
    logits, labels = zip(*(cache.eval_logits() for cache in caches), strict=True)
    right = mean_logits(logits).argmax(1) == labels[0]
    shown = [cache.eval_shown for cache in caches]
    seen = torch.stack([torch.zeros_like(right).index_fill(0, s, True) for s in shown]).all(0)
    return float(right[seen].double().mean())


NOT_RECTIFIED = (
    "a rectification belongs to one cache, not to several",
    "Leave --also out, or use --bias eliminate, which takes the mistakes of all together.",
)


def check_members(caches: Sequence[LogitCache], temperatures: Sequence[float]) -> None:
    """Raise IdentityError unless caches hold the same views of the same dataset, CacheError where
    rows of several are not known at the losses' temperatures and 1.
    """
    cache, *others = caches
    for member in others:
        differing = [
            f"{part}.{line}"
            for part in ("dataset", "views")
            for line in differences(getattr(member.identity, part), getattr(cache.identity, part))
        ]
        if differing:
            raise IdentityError(
                f"{member.path} and {cache.path} are not of the same views: "
                f"{'; '.join(differing[:3])}",
                "Averaged teachers must have looked at the same pixels: cache this one anew.",
            )
    for member in caches if others else []:
        for needed in (*temperatures, 1.0):
            if not member.encoding.holds(needed):
                raise CacheError(
                    f"{member.path} keeps part of each row, without its rest at T = {needed:g}",
                    "Several teachers are averaged there and at 1: use another --encoding.",
                )
