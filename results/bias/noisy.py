"""CIFAR-100 with wrong training labels, for `--dataset noisy:cifar100` (run from this folder).

`$CIFAR100` is a folder of images as `--dataset folder:DIR` takes it. The share `$NOISE` (.3 if
unset) of the training labels is replaced by one of the other classes, each as likely as the others:
which, and by what, is a keyed draw. Test labels stay as they are.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder

from stages.inputs.counter_hash import bounded, counter_hash

KEY = 20_412
"""Of these draws, apart from those of training."""


def noisy_labels(labels: Tensor, classes: int, share: float) -> Tensor:
    """labels: int64 (N,). Returns int64 (N,), about `share` of them another class."""
    samples = torch.arange(len(labels))
    drawn = bounded(counter_hash(KEY, 0, samples), 2**30).double() / 2**30
    other = (labels + 1 + bounded(counter_hash(KEY, 1, samples), classes - 1)) % classes
    return torch.where(drawn < share, other, labels)


class Relabelled(torch.utils.data.Dataset[Any]):
    """The images of a folder, with other labels."""

    def __init__(self, images: ImageFolder, labels: Tensor) -> None:
        self.images, self.targets, self.classes = images, labels.tolist(), images.classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index][0], self.targets[index]


def relabelled(images: ImageFolder, labels: Sequence[int], split: str) -> Relabelled:
    """The split with its labels as the environment asks for them."""
    share = float(os.environ.get("NOISE", "0.3")) if split == "train" else 0.0
    given = torch.tensor(labels)
    return Relabelled(images, noisy_labels(given, len(images.classes), share))


def cifar100(split: str) -> Relabelled:
    """split: train or test."""
    images = ImageFolder(os.path.join(os.environ["CIFAR100"], split))
    return relabelled(images, images.targets, split)
