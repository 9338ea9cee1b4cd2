"""What all models of a process are shown: batches to train on, and sets to be measured on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.data import Splits, held_out
from stages.distributed import ALONE, Ranks, device_of_rank
from stages.errors import ConfigError
from stages.inputs.feed import Batch, ViewFeed, joined, num_batches, plain_view
from stages.inputs.planned import PlannedBatches, planned_batches
from stages.inputs.views import ViewPolicy
from stages.order import SampleOrder, sample_order
from stages.settings import RunConfig
from stages.training.graphs import Graph

_LEAST_EVALUATED = 256
"""Samples of a batch of an evaluation, at the least."""


@dataclass(frozen=True)
class Evaluation:
    """A set of samples that a model is measured on, on the clean view: dataset indices and the
    labels of the whole split, int64.
    """

    feed: ViewFeed
    samples: Tensor
    labels: Tensor

    @torch.inference_mode()
    def hits(self, predict: Callable[[Tensor], Tensor], samples: Tensor, batch_size: int) -> Tensor:
        """How many of some samples are right, and how many have their label among the best five:
        int64 (2,). predict: uint8 pixels (B, C, H, W) -> logits (B, classes).
        """
        labels = self.labels.to(self.feed.device)
        hits = torch.zeros(2, dtype=torch.int64, device=labels.device)
        for batch in self.feed.batches(samples, 0, max(_LEAST_EVALUATED, batch_size)):
            logits = predict(batch.pixels)
            best = logits.topk(min(5, logits.shape[1])).indices == labels[batch.samples, None]
            hits += torch.stack([best[:, 0].sum(), best.any(1).sum()])
        return hits


@dataclass
class BatchStream:
    """Batches of views, one stream for all models that are trained together.

    samples: int64, the training samples (all, or without the held-out ones). batch_size: of all
    ranks together. order: of the samples in an epoch; as many of them in every epoch.
    """

    feed: ViewFeed
    samples: Tensor
    evaluations: dict[str, Evaluation]
    seed: int
    batch_size: int
    order: SampleOrder = sample_order
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self._feeds = [self.feed]
        self._planned: PlannedBatches | None = None
        self._next: Graph | None = None
        self._shown = 0

    @property
    def device(self) -> torch.device:
        return self.feed.device

    @cached_property
    def labels(self) -> Tensor:
        """int64 (N,), of the whole training split, on the device."""
        return self.feed.dataset.labels.to(self.device)

    @cached_property
    def steps(self) -> int:
        """How many batches an epoch has; of several ranks each has its part of every batch."""
        return num_batches(len(self.epoch_order(0)), self._own_size)

    @property
    def _own_size(self) -> int:
        return self.batch_size // self.ranks.world

    def epoch_order(self, epoch: int) -> Tensor:
        """The samples that an epoch shows to this rank, in order: int64."""
        return self.order(self.samples, self.seed, epoch)

    def batches(self, order: Tensor, views: tuple[int, ...], skip: int) -> Iterator[Batch]:
        """Views of the samples in `order`, joined view after view in each batch, without the first
        `skip` batches.
        """
        if self._planned is not None and len(views) == 1:
            return self._batches_in_place(self._planned, order, views[0], skip)
        while len(self._feeds) < len(views):
            self._feeds.append(self.feed.another())
        shown = [
            feed.batches(order, view, self._own_size, skip)
            for feed, view in zip(self._feeds[: len(views)], views, strict=True)
        ]
        return map(joined, zip(*shown, strict=True))

    def keep_in_place(self, views: int) -> str | None:
        """From now on whole batches are made in one place, each where the one before was. Returns
        why they cannot be, as a sentence without its end. views: of a sample at once.
        """
        if self._planned is None:
            if views > 1:
                return "several views of a sample are seen at once"
            planned = planned_batches(self.feed, self._own_size)
            if isinstance(planned, str):
                return planned
            self._planned = planned
        return None

    @property
    def batch_in_place(self) -> Batch | None:
        """The batch at hand, where it is whole and made in one place."""
        return None if self._planned is None else self._planned.batch

    def _batches_in_place(
        self, planned: PlannedBatches, order: Tensor, view: int, skip: int
    ) -> Iterator[Batch]:
        size, steps = self._own_size, num_batches(len(order), self._own_size)
        planned.start(order, view, skip * size)
        whole = steps - (len(order) != steps * size)
        if self._next is None or self._shown != len(order):
            self._next = Graph(planned.next, planned.changed, self.device)
            self._shown = len(order)
        for _ in range(skip, whole):
            self._next()
            assert planned.batch is not None
            yield planned.batch
        if skip < steps and whole < steps:
            yield planned.last(whole * size)

    def close(self) -> None:
        """Let the processes go that decode images."""
        for feed in (*self._feeds, *(each.feed for each in self.evaluations.values())):
            feed.close()


def open_stream(
    config: RunConfig,
    splits: Splits,
    policy: ViewPolicy,
    image_size: int | None,
    order: SampleOrder = sample_order,
    ranks: Ranks = ALONE,
    left_out: Tensor | None = None,
) -> BatchStream:
    """The stream of a run. left_out: int64, samples that it does not show, beside those skipped.

    Raises ConfigError where samples cannot be held out, or left out.
    """
    data, train = config.data, splits.train
    device = device_of_rank(ranks, config.device)
    feed = ViewFeed(train, policy, device, image_size, data.workers)
    absent = train.skipped if left_out is None else torch.cat([train.skipped, left_out]).unique()
    samples, validation = held_out(len(train), data.val_fraction, config.seed.data, absent)
    if policy.mixes and (len(validation) or left_out is not None):
        holder = "--val-fraction" if left_out is None else "--folds"
        raise ConfigError(
            f"{holder} holds samples out, and '{policy.name}' shows them as partners",
            f"Leave {holder} out, or train without mixup and cutmix.",
        )
    plain = plain_view(image_size, data.resize)
    test = ViewFeed(splits.test, plain, device, image_size, data.workers)
    evaluations = {}
    if splits.tested:
        evaluations["test"] = Evaluation(test, splits.test.shown, splits.test.labels)
    if len(validation):
        clean = ViewFeed(train, plain, device, image_size, data.workers)
        evaluations["val"] = Evaluation(clean, validation, train.labels)
    return BatchStream(
        feed, samples, evaluations, config.seed.data, config.train.batch_size, order, ranks
    )
