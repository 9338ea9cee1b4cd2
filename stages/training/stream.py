"""What all models of a process are shown: batches to train on, and sets to be measured on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.data import Splits
from stages.distributed import ALONE, Ranks, summed
from stages.errors import ConfigError
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Batch, ViewFeed, cut, joined, num_batches, plain_view
from stages.inputs.planned import PlannedBatches, planned_batches
from stages.inputs.views import ViewPolicy
from stages.order import SINGLE, SINGLES, Round, Rounds, SampleOrder, sample_order
from stages.settings import RunConfig
from stages.training.graphs import Graph
from stages.training.history import EpochShown

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

    def accuracy(
        self, predict: Callable[[Tensor], Tensor], ranks: Ranks, batch_size: int
    ) -> tuple[float, float]:
        """Top-1 and top-5 of all samples, of which each of several ranks measures its share."""
        mine = ranks.share(len(self.samples))
        hits = self.hits(predict, self.samples[mine.start : mine.stop], batch_size)
        top1, top5 = (summed(ranks, hits) / len(self.samples)).tolist()
        return top1, top5

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
    ranks together. order: of the samples in an epoch; as many of them in every epoch. rounds: of
    epochs whose views are made of the same decoded images. in_one_batch: the views of an image
    share a batch; else they follow one another, each in a batch with those of other images.
    """

    feed: ViewFeed
    samples: Tensor
    evaluations: dict[str, Evaluation]
    seed: int
    batch_size: int
    order: SampleOrder = sample_order
    ranks: Ranks = ALONE
    rounds: Rounds = SINGLES
    in_one_batch: bool = False

    def __post_init__(self) -> None:
        self._begun: tuple[tuple[Any, ...], Iterator[Batch]] | None = None
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
        """The samples that the round of an epoch shows to this rank, in order: int64."""
        return self.order(self.samples, self.seed, self.rounds.of(epoch).first)

    def batches(
        self, order: Tensor, views: tuple[int, ...], skip: int, within: Round = SINGLE
    ) -> Iterator[Batch]:
        """The batches of an epoch, without the first `skip`. order: the samples of its round.
        views: those of its round, epoch after epoch; those of one epoch are joined in each batch.
        """
        if self._planned is not None and len(views) == 1:
            return self._batches_in_place(self._planned, order, views[0], skip)
        return self._of_round(order, views, skip, within)

    def _of_round(
        self, order: Tensor, views: tuple[int, ...], skip: int, within: Round
    ) -> Iterator[Batch]:
        """As `batches`. What workers have begun for the next epoch of the round is kept for it."""
        _, _, steps = self._parts(order, within)
        begun, begin, self._begun = self._begun, steps.start + skip, None
        if begun is not None and begun[0] == (within.first, views, begin):
            shown = begun[1]
        else:
            shown = self._from(order, views, within, begin)
        for _ in range(begin, steps.stop):
            yield next(shown)
        if within.place + 1 < within.count:
            self._begun = (within.first, views, steps.stop), shown

    def _from(
        self, order: Tensor, views: tuple[int, ...], within: Round, begin: int
    ) -> Iterator[Batch]:
        """All batches of a round from one of its steps on."""
        parts, shared, _ = self._parts(order, within)
        if shared == 1 and within.count > 1:  # first views of pairs, then the second ones
            pair = len(views) // within.count
            views = tuple(view for which in range(pair) for view in views[which::pair])
        size = len(views) // shared
        shown = (
            replace(joined(batches[at : at + size]), views=views[at : at + size])
            for batches in self.feed.views_of(parts[begin // shared :], views)
            for at in range(0, len(views), size)
        )
        return islice(shown, begin % shared, None)

    def showed(self, order: Tensor, views: tuple[int, ...], within: Round) -> EpochShown:
        """What an epoch shows to this rank. As in `batches`."""
        parts, shared, steps = self._parts(order, within)
        images = sum(len(parts[step // shared]) for step in steps) * len(views) // shared
        samples = sum(map(len, parts[steps.start // shared : -(-steps.stop // shared)]))
        return EpochShown(views, within, images, samples)

    def _parts(self, order: Tensor, within: Round) -> tuple[Sequence[Tensor], int, range]:
        """The samples of a round as they are decoded, how many steps share each part, and which
        steps of the round are those of the epoch. All epochs have as many steps as batches of whole
        size need; where the views of an image share a batch, parts are as even as can be.
        """
        batches = cut(order, self._own_size)
        steps = range(within.place * len(batches), (within.place + 1) * len(batches))
        if self.in_one_batch and within.count > 1:
            return order.tensor_split(within.count * len(batches)), 1, steps
        return batches, within.count, steps

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
        self._begun = None
        for feed in (self.feed, *(each.feed for each in self.evaluations.values())):
            feed.close()


class Showing(NamedTuple):
    """Which samples are shown in which order, on which of several ranks, in which rounds of epochs.

    samples: int64, those that are trained on. validation: int64, those held out. The others are in
    `BatchStream`.
    """

    samples: Tensor
    validation: Tensor
    order: SampleOrder = sample_order
    ranks: Ranks = ALONE
    rounds: Rounds = SINGLES


def open_stream(
    config: RunConfig,
    splits: Splits,
    policy: ViewPolicy,
    image_size: int | None,
    showing: Showing,
    device: torch.device,
) -> BatchStream:
    """The stream of a run. Raises ConfigError where samples cannot be held out, or are too few."""
    data, train, (samples, validation, order, ranks, rounds) = config.data, splits.train, showing
    if policy.mixes and len(samples) < len(train.shown):
        folds = len(samples) + len(validation) < len(train.shown)
        holder = "--folds" if folds else "--val-fraction"
        raise ConfigError(
            f"{holder} holds samples out, and '{policy.name}' shows them as partners",
            f"Leave {holder} out, or train without mixup and cutmix.",
        )

    def feed(images: ImageDataset, shown: ViewPolicy) -> ViewFeed:
        return ViewFeed(images, shown, device, image_size, data.workers)

    plain, evaluations = plain_view(image_size, data.resize), {}
    if splits.tested:
        test = splits.test
        evaluations["test"] = Evaluation(feed(test, plain), test.shown, test.labels)
    if len(validation):
        evaluations["val"] = Evaluation(feed(train, plain), validation, train.labels)
    views = feed(train, policy)
    seed, size, in_one = config.seed.data, config.train.batch_size, config.train.views_in_one_batch
    stream = BatchStream(views, samples, evaluations, seed, size, order, ranks, rounds, in_one)
    shown, at_once = len(stream.epoch_order(0)), rounds.per_decode
    if in_one and stream.steps * at_once > shown:
        raise ConfigError(
            f"{at_once} views of an image in one batch leave less than an image for a batch: "
            f"{shown:,} images in {stream.steps * at_once:,} batches",
            "Give a smaller --views-per-decode, or a larger --batch-size.",
        )
    return stream
