"""Which fold each sample is in: a pure function of the labels, a seed and the number of folds.

Cross-fitting: the teacher of fold k is trained on the samples of all other folds and answers for
those of fold k. Folds are stratified: samples go through a keyed permutation, are sorted by label
in that order, and are dealt out in turn. So any two folds differ by at most one sample, in all and
of each class.
"""

import hashlib

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.identity import FoldsIdentity
from stages.errors import ConfigError
from stages.inputs.counter_hash import class_by_class
from stages.order import Stream


def fold_map(labels: Tensor, folds: int, seed: int) -> Tensor:
    """The fold of every sample, in [0, folds): int64 (N,), in dataset order.

    labels: int64 (N,), of the training split. Raises ConfigError where there are fewer samples than
    folds, or fewer than two folds.
    """
    samples = len(labels)
    if not 2 <= folds <= samples:
        raise ConfigError(
            f"{samples} samples cannot be divided into {folds} folds",
            "Give --folds 2 or more, and no more than there are samples.",
        )
    dealt = class_by_class(labels, seed, Stream.FOLDS)
    found = torch.empty_like(dealt)
    found[dealt] = torch.arange(samples) % folds
    return found


def map_digest(fold_of: Tensor) -> str:
    """Digest of a fold map: 32 hex digits of the sha256 of its int32 little-endian bytes."""
    return hashlib.sha256(fold_of.numpy().astype("<i4").tobytes()).hexdigest()[:32]


def fold_faults(cache: LogitCache) -> list[str]:
    """What is wrong with the folds that a cache states: their map must be the one that its labels
    and its seed give, and there must be a teacher for each.
    """
    folds: FoldsIdentity | None = cache.identity.teacher.folds
    if folds is None:
        return []
    if len(folds.weights) != folds.count:
        return [f"states {folds.count} folds and the weights of {len(folds.weights)} teachers"]
    try:
        found = fold_map(cache.labels, folds.count, folds.seed)
    except ConfigError as error:
        return [error.cause]
    if map_digest(found) != folds.map:
        return ["the labels and the seed give other folds than those that were stated"]
    return []
