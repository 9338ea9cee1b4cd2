"""Targets that stay in one place: those of every epoch are copied there, for recorded steps."""

import torch
from torch import Tensor

from stages.cache.targets import Targets, ViewTargets
from stages.targets.ensemble import EnsembleTargets


def kept_in_place(targets: Targets) -> Targets | None:
    """A copy in memory of its own, which `take` changes; None for targets that the host chooses
    from, as those in groups of chunks, or that are of several views.
    """
    if isinstance(targets, ViewTargets):
        return targets.moved(torch.clone, targets.shared)
    if isinstance(targets, EnsembleTargets):
        members = [member.moved(torch.clone, member.shared) for member in targets.members]
        return EnsembleTargets(members, targets.labels)
    return None


def take(kept: Targets, targets: Targets) -> None:
    """Let the copy be of another view of the same caches, in the same memory."""
    for mine, theirs in zip(_of_a_view(kept), _of_a_view(targets), strict=True):
        mine.copy_(theirs)


def _of_a_view(targets: Targets) -> list[Tensor]:
    """All tensors but those that the views of a cache share."""
    if isinstance(targets, EnsembleTargets):
        return [tensor for member in targets.members for tensor in _of_a_view(member)]
    assert isinstance(targets, ViewTargets)
    values = targets.rectified
    pair = [] if values is None else [values.label_logit, values.predicted_logit]
    return [*targets.arrays.values(), targets.predictions, targets.mistakes, *pair]
