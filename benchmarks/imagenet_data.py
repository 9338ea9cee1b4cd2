"""Images and logits of ImageNet-1k's shape, made from numbers: synthetic, and stated as such.

A linear classifier on features that scatter about their class: row i of class y has

    z = (g_i W[y] + s e_i) W',     g_i ~ N(17, 5) clipped at 1, e_i ~ N(0, 1) in 1,000 dimensions

with s = 3.3. Rows of W (unit length) are sums of random vectors along a random tree that cuts the
classes in uneven halves until each stands alone, deeper levels 1.1 times longer: classes of one
branch are alike, and confused. The numbers were chosen so that a teacher of 75 to 80 % comes out,
not fitted to one: what sizes and times depend on (rank, decay of the sorted logits, confidence) is
like a real classifier's, and no statement about a real one follows from them.
"""

import torch
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache.encoding import Encoding
from stages.cache.identity import Identity, TeacherIdentity, ViewsIdentity
from stages.cache.metadata import NewCache
from stages.data import Splits, dataset_identity
from stages.inputs.counter_hash import counter_hash, permute
from stages.inputs.datasets.dataset import ImageDataset
from stages.inputs.probes import pixel_probes
from stages.inputs.views import ViewPolicy, view_policy

SAMPLES, CLASSES, TEST_SAMPLES = 1_281_167, 1000, 5000
_IMAGE = (3, 8, 8)
_GAIN, _SPREAD, _SCATTER, _DEEPER = 17.0, 5.0, 3.3, 1.1
_TREE, _ROWS, _PIXELS, _ORDER = range(4)  # streams of the seed


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(counter_hash(*key)))


def class_vectors(classes: int = CLASSES, dimensions: int = CLASSES) -> Tensor:
    """W: float32 (classes, dimensions), rows of unit length, from a random tree of classes."""
    generator = _generator(0, _TREE)
    cuts = torch.randperm(classes - 1, generator=generator) + 1
    vectors, groups, length = torch.zeros(classes, dimensions), 1, 1.0
    while groups < classes:
        groups, length = min(2 * groups, classes), length * _DEEPER
        branch = torch.bucketize(
            torch.arange(classes), cuts[: groups - 1].sort().values, right=True
        )
        vectors += length * torch.randn(groups, dimensions, generator=generator)[branch]
    return nn.functional.normalize(vectors - vectors.mean(0), dim=1)


class SyntheticTeacher:
    """Logits by block: a pure function of (view, block) and of the labels there."""

    def __init__(self, classes: int = CLASSES) -> None:
        self._vectors = class_vectors(classes, min(classes, CLASSES))

    def block(self, view: int, block: int, labels: Tensor) -> Tensor:
        """labels: int64 (n,). Returns float32 (n, classes)."""
        generator = _generator(0, _ROWS, view, block)
        features = torch.randn(len(labels), self._vectors.shape[1], generator=generator)
        gains = _GAIN + _SPREAD * torch.randn(len(labels), 1, generator=generator)
        features.mul_(_SCATTER).addcmul_(gains.clamp(min=1), self._vectors[labels])
        return features @ self._vectors.T


def synthetic_splits(samples: int, classes: int = CLASSES) -> Splits:
    """Tiny random images, sorted by class as ImageNet's folders are: 192 bytes each."""

    def split(name: str, size: int) -> ImageDataset:
        shape, generator = (size, *_IMAGE), _generator(0, _PIXELS, size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return ImageDataset(
            name="synthetic",
            split="train" if name == "train" else "test",
            class_names=tuple(f"class {i}" for i in range(classes)),
            labels=torch.arange(size) * classes // size,
            load=images.__getitem__,
            images=images,
            images_digest=f"synthetic-{size}",
        )

    return Splits(split("train", samples), split("test", TEST_SAMPLES))


def policy() -> ViewPolicy:
    """What the synthetic images are shown with: 18 distinct views."""
    return view_policy("pad-crop-flip:pad=1", 0)


def row_order(samples: int) -> Tensor:
    """int64 (samples,): the sample of each row, a keyed permutation."""
    return permute(torch.arange(samples), samples, 0, _ORDER)


def new_cache(path: str, coding: Encoding, splits: Splits) -> LogitCache:
    """A cache of one view of these images, without any block."""
    train, views = splits.train, policy()
    return LogitCache.create(
        path,
        NewCache(
            Identity(
                TeacherIdentity("synthetic", "synthetic", (0.5,), (0.5,), None),
                dataset_identity(train),
                ViewsIdentity(views.name, views.parameters, views.version, views.seed),
                "float32",
            ),
            coding,
            1,
            row_order(len(train)),
            train.labels,
            splits.test.labels,
            pixel_probes(train, views, None),
            {"teacher": "synthetic logits, see benchmarks/imagenet_data.py"},
        ),
    )


class TinyStudent(nn.Sequential):
    """One linear layer on the pixels: as little student as there can be."""

    def __init__(self, num_classes: int) -> None:
        pixels = _IMAGE[0] * _IMAGE[1] * _IMAGE[2]
        super().__init__(nn.Flatten(), nn.Linear(pixels, num_classes))
