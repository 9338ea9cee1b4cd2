"""Epochs of a cache for a training loop of one's own: pixels, labels and the teacher's logits.

    epochs = CachedEpochs("digits.zarr", "digits", batch_size=128)
    for epoch in range(20):
        for batch in epochs.epoch(epoch):
            loss = kd(student(batch.images), batch.teacher_logits, batch.labels, temperature=4)

Views and samples come in the order in which `pipeline train-student` shows them with the same seed,
and the images are checked against what the teacher saw before anything is shown. The targets of one
view are held at a time; what is larger than memory needs `train-student --slab-memory`.
`examples/` has this in plain PyTorch, in Lightning, and with timm.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import check_temperature
from stages.data import cached_policy, check_dataset, held_out, load_data, skips_of, usable_views
from stages.device import choose_device
from stages.inputs.datasets import Statistics
from stages.inputs.feed import Normalise, ViewFeed, num_batches, plain_view
from stages.reporting import Silent
from stages.training.config import DataSettings
from stages.training.order import sample_order, view_order

Item = TypeVar("Item")


class CachedBatch(NamedTuple):
    """Some samples of a view, and what the teacher says of them. All on one device.

    images: float32 (B, C, H, W), normalised. labels, samples: int64 (B,); samples are dataset
    indices. teacher_logits: float32 (B, classes), rectified where that was asked for. wrong: bool
    (B,), whether the teacher's answer is not the label. Where views mix two samples,
    partner_labels: int64 (B,) and shares: float32 (B,), how much of an image is the sample's own.
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor
    wrong: Tensor
    samples: Tensor
    partner_labels: Tensor | None = None
    shares: Tensor | None = None


@dataclass(frozen=True)
class Batches(Generic[Item]):
    """Some batches in order, as a dataloader gives them: any number of times, always the same."""

    count: int
    begin: Callable[[], Iterator[Item]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        return self.begin()


class CachedEpochs:
    """A cache and the images it was made from. `samples`: int64, those that are trained on."""

    def __init__(
        self,
        cache: str | Path,
        data: str | DataSettings,
        batch_size: int = 128,
        rectified: str | None = None,
        temperature: float = 4.0,
        seed: int = 0,
        device: str = "auto",
        views: int | None = None,
        channels: int | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """data: a dataset's name, or all about it. rectified: name of a rectification.
        temperature: of the loss. seed: of the order. views: only the first so many. channels: what
        the student's input takes, if not the images' own. statistics: mean and standard deviation
        of its normalisation, the dataset's if None.

        Raises IdentityError if the dataset is not the one the cache was made from, CacheError if
        views or the rectification are missing, or not known at this temperature.
        """
        self.cache, self.batch_size = LogitCache.open(cache), batch_size
        data = DataSettings(dataset=data) if isinstance(data, str) else data
        self._rectified, self._temperature, self._seed = rectified, temperature, seed
        check_temperature(self.cache.encoding, temperature)
        if rectified is not None:
            self.cache.rectification(rectified).check_temperature(temperature)
        self._views = usable_views(self.cache, views, rectified)

        self.splits, policy = (
            load_data(data, skips_of([self.cache.skips])),
            cached_policy(self.cache),
        )
        check_dataset(self.cache, self.splits, policy, False, Silent())
        train, test = self.splits.train, self.splits.test
        self.samples, _ = held_out(len(train), data.val_fraction, seed, train.skipped)
        self.device = choose_device(device)
        self.labels = train.labels.to(self.device)
        self.channels = channels or train.shape[0]
        mean, std = statistics or train.statistics()
        self.normalise = Normalise(mean, std, self.channels, self.device)
        size = data.image_size or self.cache.identity.teacher.image_size
        self._feed = ViewFeed(train, policy, self.device, size, data.workers)
        clean = plain_view(size, data.resize)
        self._test_feed = ViewFeed(test, clean, self.device, size, data.workers)

    @property
    def num_classes(self) -> int:
        return self.cache.num_classes

    def epoch(self, index: int) -> Batches[CachedBatch]:
        """Epoch 0, 1, ...: every cached view once, in a fresh order each time round."""
        count = num_batches(len(self.samples), self.batch_size)
        return Batches(count, lambda: self._shown(index))

    def test(self) -> Batches[tuple[Tensor, Tensor]]:
        """The clean test split: images float32 (B, C, H, W), normalised, and labels int64 (B,)."""
        count = num_batches(len(self.splits.test), self.batch_size)
        return Batches(count, self._shown_test)

    def close(self) -> None:
        """Let go the processes that decode images, where there are any."""
        self._feed.close()
        self._test_feed.close()

    def _shown(self, epoch: int) -> Iterator[CachedBatch]:
        view = self._views[view_order(self._seed, epoch, len(self._views))]
        targets = self.cache.read_view(view, self._rectified).to(self.device)
        read = targets.rows if self._rectified is None else targets.rectified_rows
        order = sample_order(self.samples, self._seed, epoch)
        for batch in self._feed.batches(order, view, self.batch_size):
            labels, partner_labels, shares = batch.hard_labels(self.labels)
            yield CachedBatch(
                self.normalise(batch.pixels),
                labels,
                read(batch.samples, self._temperature),
                targets.wrong(batch.samples),
                batch.samples,
                partner_labels,
                shares,
            )

    def _shown_test(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = self.splits.test.labels.to(self.device)
        for batch in self._test_feed.batches(torch.arange(len(labels)), 0, self.batch_size):
            yield self.normalise(batch.pixels), labels[batch.samples]
