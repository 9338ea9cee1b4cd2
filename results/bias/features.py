"""CIFAR-100 as features of a pretrained network: a dataset on which a student takes seconds.

    python features.py --images cifar100 --out features.npz

EfficientNet-Lite0 (examples/efficientnet_lite0.py: network and weights come from packages) is asked
about every image, enlarged, and of the 1,280 numbers that its head reads, the 400 that vary most
over the `others` are kept, in 8 bits. Of each class the first 140 training images are the samples
of the study, the next 140 are the `others`, for teachers that were trained on other data. Of the
100 test images of each class, settings are chosen on the first half and students scored on the
second: no teacher has seen any of them.

With $FEATURES naming the file (features.npz here if unset) the datasets are

    --dataset features:clean     the samples with their labels
    --dataset features:noisy     the share $NOISE of the training labels wrong, see noisy.py
    --dataset features:others    other samples of the same classes, with their labels
    --eval-dataset features:choosing    the half of the test images that settings are chosen on

and the networks, on features instead of pixels: `features:teacher`, `features:student`, and
`features:prototypes`, which was never trained: the cosine to each class's mean feature over five of
the `others`, times 100, as CLIP compares an image with a class's text.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from noisy import noisy_labels
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

ROOT = Path(__file__).parents[2]
EACH, BATCH, SIDE = 140, 32, 20
"""Samples of a class; images at once; side of the square of an image's features."""
MOST = 3.0
"""What 255 stands for: of the features kept, a tenth is larger and counts as that."""
SHOTS, SCALE = 5, 100.0


class Features(torch.utils.data.Dataset[Any]):
    """Features as grey images of `SIDE` x `SIDE`, uint8."""

    def __init__(self, rows: np.ndarray, labels: Tensor, classes: list[str]) -> None:
        self.images, self.targets = rows.reshape(-1, SIDE, SIDE), labels.tolist()
        self.classes = classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], self.targets[index]


def _read(part: str, share: float = 0.0, choosing: bool = False) -> Features:
    with np.load(os.environ.get("FEATURES", Path(__file__).with_name("features.npz"))) as file:
        labels, classes = torch.from_numpy(file[f"{part}_labels"]).long(), file["classes"].tolist()
        rows = file[part]
    if part == "test":  # class by class, each in two halves
        halves = torch.arange(len(labels)).view(len(classes), 2, -1)
        own = halves[:, 0 if choosing else 1].flatten()
        rows, labels = rows[own.numpy()], labels[own]
    return Features(rows, noisy_labels(labels, len(classes), share), classes)


def clean(split: str) -> Features:
    """split: train or test."""
    return _read(split)


def noisy(split: str) -> Features:
    """split: train or test. Test labels stay as they are."""
    return _read(split, float(os.environ.get("NOISE", "0.3")) if split == "train" else 0.0)


def others(split: str) -> Features:
    """split: train or test."""
    return _read("others" if split == "train" else split)


def choosing(split: str) -> Features:
    """split: train or test."""
    return _read(split, choosing=True)


class Perceptron(nn.Module):
    """One hidden layer on the features. Input float32 (B, 3, SIDE, SIDE), all channels the same."""

    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(SIDE * SIDE, hidden), nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.head(torch.relu(self.hidden(images[:, 0].flatten(1))))
        return rows


def teacher(num_classes: int) -> Perceptron:
    return Perceptron(num_classes, 512)


def student(num_classes: int) -> Perceptron:
    return Perceptron(num_classes, 32)


class Prototypes(nn.Module):
    """Cosines to a mean feature of each class, times `SCALE`."""

    def __init__(self) -> None:
        super().__init__()
        known = others("train")
        rows = torch.from_numpy(known.images).flatten(1).float() / 255
        labels = torch.tensor(known.targets)
        means = [rows[labels == c][:SHOTS].mean(0) for c in range(len(known.classes))]
        self.register_buffer("means", nn.functional.normalize(torch.stack(means)))

    def forward(self, images: Tensor) -> Tensor:
        return SCALE * nn.functional.normalize(images[:, 0].flatten(1)) @ self.means.T


def prototypes() -> Prototypes:
    return Prototypes()


def features_of(paths: list[Path], network: nn.Module, head: nn.Linear, side: int) -> np.ndarray:
    """uint8 (N, 1280): what the head reads of each image."""
    found: list[np.ndarray] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append((given[0] / MOST * 255).round().clamp(0, 255).byte().numpy())

    handle = head.register_forward_pre_hook(keep)
    for start in range(0, len(paths), BATCH):
        some = [np.array(Image.open(path).convert("RGB")) for path in paths[start : start + BATCH]]
        images = torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2)
        larger = tv.resize(images, [side, side], tv.InterpolationMode.BICUBIC, antialias=True)
        network(((larger.float() - 127) / 128).contiguous(memory_format=torch.channels_last))
        print(f"\r{start} of {len(paths)}", end="", flush=True)
    handle.remove()
    return np.concatenate(found)


@click.command()
@click.option(
    "--images", required=True, type=Path, help="CIFAR-100: DIR/train/CLASS, DIR/test/CLASS."
)
@click.option("--out", required=True, help="The npz file.")
@click.option("--side", default=96, show_default=True, help="Pixels that images are enlarged to.")
@torch.inference_mode()
def main(images: Path, out: str, side: int) -> None:
    """Compute and write the features."""
    sys.path.insert(0, str(ROOT / "examples"))
    import efficientnet_lite0

    torch.set_num_threads(1)
    network = efficientnet_lite0.teacher().eval().to(memory_format=torch.channels_last)
    (head,) = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    classes = sorted(folder.name for folder in (images / "train").iterdir())
    listed = {
        split: [sorted((images / split / name).iterdir()) for name in classes]
        for split in ("train", "test")
    }
    parts = {
        "train": [files[:EACH] for files in listed["train"]],
        "others": [files[EACH : 2 * EACH] for files in listed["train"]],
        "test": listed["test"],
    }
    arrays: dict[str, Any] = {"classes": np.array(classes)}
    for part, files in parts.items():
        paths = [path for of_class in files for path in of_class]
        arrays[part] = features_of(paths, network, head, side)
        labels = [label for label, of_class in enumerate(files) for _ in of_class]
        arrays[f"{part}_labels"] = np.array(labels, np.uint8)
    kept = np.argsort(-arrays["others"].astype(np.float64).var(0), kind="stable")[: SIDE * SIDE]
    for part in parts:
        arrays[part] = arrays[part][:, kept]
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    main()
