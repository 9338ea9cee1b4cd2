"""Targets that stay in one place: those of every epoch are copied there, for recorded steps.

Where whole rows are kept and fit, they are decoded there once a view: a step looks them up by one
operation, where decoding takes up to some forty.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from stages.cache.encoding.floats import Float32
from stages.cache.targets import Targets, ViewTargets
from stages.targets.ensemble import EnsembleTargets

DECODED_BYTES = 2**30
"""Rows of a view that take more in float32 stay encoded."""


def kept_in_place(targets: Targets) -> Targets | None:
    """A copy in memory of its own, which `take` changes; None for targets that the host chooses
    from, as those in groups of chunks, or that are of several views, and for encoded ones whose
    arrays are not the same in every view.
    """
    if isinstance(targets, ViewTargets):
        return _kept(targets)
    if isinstance(targets, EnsembleTargets):
        members = [kept for member in targets.members if (kept := _kept(member)) is not None]
        whole = len(members) == len(targets.members)
        return EnsembleTargets(members, targets.labels) if whole else None
    return None


def _kept(view: ViewTargets) -> ViewTargets | None:
    decoded = _decoded(view)
    if decoded.encoding.of_anchor:
        return None
    return decoded.moved(torch.clone, decoded.shared)


def _decoded(view: ViewTargets) -> ViewTargets:
    """The same view with its rows in float32, where all of a row is known and they fit."""
    if not view.encoding.keeps_all:
        return view
    first = view.encoding.decode({name: array[:1] for name, array in view.encoded.items()})
    if len(view.labels) * first.nbytes > DECODED_BYTES:
        return view
    arrays = {"logits": view.encoding.decode(view.encoded)}
    return dataclasses.replace(view, encoding=Float32(), arrays=arrays, anchor={})


def take(kept: Targets, targets: Targets) -> None:
    """Let the copy be of another view of the same caches, in the same memory."""
    for mine, theirs in zip(_of_teachers(kept), _of_teachers(targets), strict=True):
        for place, values in zip(_own_tensors(mine), _own_tensors(_decoded(theirs)), strict=True):
            place.copy_(values)


def _of_teachers(targets: Targets) -> Sequence[ViewTargets]:
    """Those of each teacher."""
    if isinstance(targets, EnsembleTargets):
        return targets.members
    assert isinstance(targets, ViewTargets)
    return (targets,)


def _own_tensors(view: ViewTargets) -> list[Tensor]:
    """All tensors but those that the views of a cache share."""
    values = view.rectified
    pair = [] if values is None else [values.label_logit, values.predicted_logit]
    return [*view.arrays.values(), view.predictions, view.mistakes, *pair]
