"""Epochs of a cache on one device: the fast path for images that fit in memory.

    epochs = CachedEpochs(CachedDataset("digits.zarr"), batch_size=128)
    for epoch in range(20):
        for batch in epochs.epoch(epoch):
            loss = kd(student(batch.images), batch.teacher_logits, batch.labels, temperature=4)

Images are cropped a whole batch at a time where they lie, and targets are decoded on the device:
no `DataLoader`, no copy a sample. `CachedDataset` is for what needs a `DataLoader`. The targets of
one view are held at a time; what is larger than memory needs `train-student --slab-memory`.
`examples/` has programs in plain PyTorch, in Lightning, and with timm.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from stages.cached_dataset import CachedBatch, CachedDataset, known_wrong
from stages.device import choose_device
from stages.epoch_sampler import EpochSampler
from stages.errors import ConfigError
from stages.inputs.datasets import Statistics
from stages.inputs.feed import Normalise, ViewFeed, num_batches, plain_view

__all__ = ["Batches", "CachedBatch", "CachedEpochs"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batches(Generic[Item]):
    """Some batches in order, as a DataLoader gives them: any number of times, always the same."""

    count: int
    begin: Callable[[], Iterator[Item]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        return self.begin()


class CachedEpochs:
    """The epochs of a cache and its images, in the order of `train-student`.

    Under several processes (`torch.distributed`) each is shown its own samples; see
    `EpochSampler`.

    Parameters
    ----------
    dataset : CachedDataset
        The cached views, of images by their name or their settings, whose `val_fraction` holds
        samples out. Its `transform` is not used.
    batch_size : int
        Of every process.
    seed : int
        Of the order, `seed.data` of `train-student`.
    device : str
        As `--device`: `auto` is a GPU if there is one.
    channels : int, optional
        What the student's input takes, if not the images' own: grey is repeated.
    statistics : tuple, optional
        Mean and standard deviation of each channel for the student's normalisation, on the scale of
        0 to 1; the dataset's if None.

    Attributes
    ----------
    num_classes, channels : int
    device : torch.device
    labels : Tensor
        int64 (N,) on the device, of all training samples.
    samples : Tensor
        int64: the samples that are trained on.
    normalise : callable
        uint8 (B, C, H, W) -> float32 on the device.

    Raises
    ------
    ConfigError
        If the dataset was made from a dataset object, or there is no such device.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        batch_size: int = 128,
        seed: int = 0,
        device: str = "auto",
        channels: int | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        settings, train, test = dataset.settings, dataset.images, dataset.test_images
        if settings is None or test is None:
            raise ConfigError(
                "CachedEpochs needs images by the name of their dataset",
                "Give a DataLoader what was made from a dataset object.",
            )
        self.cache, self._test = dataset.cache, test
        self.sampler = EpochSampler(dataset, seed, val_fraction=settings.val_fraction)
        self.samples = self.sampler.samples
        self.device = choose_device(device)
        self.labels = train.labels.to(self.device)
        self.channels = channels or train.shape[0]
        mean, std = statistics or train.statistics()
        self.normalise = Normalise(mean, std, self.channels, self.device)
        size, policy = dataset.image_size, dataset.policy
        self._feed = ViewFeed(train, policy, self.device, size, settings.workers)
        clean = plain_view(size, settings.resize)
        self._test_feed = ViewFeed(test, clean, self.device, size, settings.workers)

    @property
    def num_classes(self) -> int:
        """C, the classes of the dataset."""
        return self.cache.num_classes

    def epoch(self, index: int) -> Batches[CachedBatch]:
        """Epoch 0, 1, ...: one view of every sample; the views take turns.

        Returns
        -------
        Batches of CachedBatch
            On the device. A last batch of a single sample is joined to the one before it.
        """
        count = num_batches(len(self.sampler), self.batch_size)
        return Batches(count, lambda: self._shown(index))

    def test(self) -> Batches[tuple[Tensor, Tensor]]:
        """The clean test split: images float32 (B, C, H, W), normalised, and labels int64 (B,)."""
        count = num_batches(len(self._test), self.batch_size)
        return Batches(count, self._shown_test)

    def close(self) -> None:
        """End the processes that decode images, where there are any."""
        self._feed.close()
        self._test_feed.close()

    def _shown(self, epoch: int) -> Iterator[CachedBatch]:
        view, order = self.sampler.view(epoch), self.sampler.order(epoch)
        runs = self.sampler.runs(epoch)
        targets = self.cache.read_view(view, self.dataset.rectified, runs).to(self.device)
        for batch in self._feed.batches(order, view, self.batch_size):
            labels, partner_labels, shares = batch.hard_labels(self.labels)
            yield CachedBatch(
                self.normalise(batch.pixels),
                labels,
                self.dataset.logits(targets, batch.samples),
                known_wrong(targets, batch.samples),
                batch.samples,
                partner_labels,
                shares,
            )

    def _shown_test(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = self._test.labels.to(self.device)
        for batch in self._test_feed.batches(torch.arange(len(labels)), 0, self.batch_size):
            yield self.normalise(batch.pixels), labels[batch.samples]
