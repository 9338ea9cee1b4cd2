"""A dataset object of the user's, in the place of the named dataset that a cache was made from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stages.errors import DatasetError, IdentityError
from stages.inputs.datasets.callables import (
    READ_TWICE,
    MapStyle,
    asked,
    identifying,
    item_of,
    labels_of,
    steady,
)
from stages.inputs.datasets.dataset import (
    DIGESTED_WHOLE,
    ImageDataset,
    Skip,
    digest,
    fixed_sample,
    in_memory,
    samples_of,
    shape_and_bytes,
    without,
)
from stages.inputs.datasets.skipping import blackened
from stages.user_code import names_code

_LABELS_COMPARED = 256
"""Labels that are read item by item where the dataset has no `targets`."""


def own_images(
    source: Any,
    name: str,
    class_names: Sequence[str],
    labels: Tensor,
    images_digest: str,
    skips: Iterable[Skip],
) -> ImageDataset:
    """The training images that `source` holds, as the dataset `name`.

    source: map-style; its items are images or begin with (image, label). An image is a PIL image,
    an array (H, W[, C]) or a tensor (C, H, W), of uint8 pixels without any augmentation. labels:
    int64 (N,), in the cache's order; -1 where it has none, and none are compared. images_digest:
    taken over where it cannot be computed, as for folders, where it covers paths and sizes of
    files. skips: samples that are left out.

    Raises DatasetError for items that cannot be read or change from one reading to the next,
    IdentityError for another number of samples or other labels.
    """
    what = f"the {type(source).__name__} given as images"
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise DatasetError(f"{what} has no length or no items", "Give a map-style dataset.")
    size = asked(f"len() of {what}", lambda: len(source))
    if size != len(labels):
        raise IdentityError(
            f"{what} has {size} samples, the cache has {len(labels)}",
            "Give the training split that the teacher saw, in its order.",
        )
    pairs, skipped = _Pairs(source), list(skips)
    sampled = fixed_sample(size)
    shown = without(torch.tensor(sampled, dtype=torch.int64), samples_of(skipped)).tolist()
    labelled = bool((labels >= 0).all())
    if not labelled:
        pass  # the cache has none to compare with
    elif getattr(source, "targets", None) is not None:
        labels = labels_of(source, size, what)
    else:
        _compare_labels(pairs, shown[:_LABELS_COMPARED], labels, what)
    read = MapStyle(pairs, what)
    read = replace(read, channels=steady(read, shown[:READ_TWICE]))
    load = blackened(read, skipped, size)
    images = in_memory(load, size, "auto")
    if name in DIGESTED_WHOLE and images is not None and not skipped:
        images_digest = digest(shape_and_bytes(images))
    elif names_code(name):
        images_digest = digest(part for i in sampled for part in identifying(read, i))
    return ImageDataset(
        name,
        "train",
        tuple(class_names),
        labels,
        load,
        images,
        images_digest,
        skips=tuple(skipped),
        labelled=labelled,
    )


# ---- details --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairs:
    """(image, label, ...) of every item; the label is None where an item is an image alone."""

    source: Any

    def __getitem__(self, index: int) -> Any:
        item = self.source[index]
        return item if isinstance(item, tuple | list) else (item, None)


def _compare_labels(pairs: _Pairs, samples: Iterable[int], labels: Tensor, what: str) -> None:
    """Raise IdentityError where the label of an item is another than the cache's."""
    for sample in samples:
        label = item_of(pairs, sample, what)[1]
        if label is not None and (found := _class_number(label, sample, what)) != labels[sample]:
            raise IdentityError(
                f"sample {sample} of {what} has label {found}, in the cache it has "
                f"{int(labels[sample])}",
                "Give the training split that the teacher saw, in its order.",
            )


def _class_number(label: Any, sample: int, what: str) -> int:
    return asked(f"the label of sample {sample} of {what}", lambda: int(label))
