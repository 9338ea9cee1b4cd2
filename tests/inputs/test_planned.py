"""Batches in one place show what a feed shows, and making one asks nothing of the host."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.data import Splits
from stages.inputs.feed import Batch, ViewFeed
from stages.inputs.planned import planned_batches
from stages.inputs.views import view_policy
from stages.training.graphs import NoWaits

CPU, SIZE = torch.device("cpu"), 32
POLICIES = (
    "none",
    "pad-crop-flip",
    "pad-crop:pad=2+erasing:p=0.5",
    "pad-crop+mixup:alpha=0.8",
    "pad-crop+cutmix:alpha=1",
)


def copied(batch: Batch) -> Any:
    values = [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


@pytest.mark.parametrize("name", POLICIES)
def test_they_are_the_batches_of_the_feed(name: str, digits: Splits) -> None:
    """Of two epochs, the second one from its third batch on; the last one is smaller."""
    feed = ViewFeed(digits.train, view_policy(name, seed=1), CPU, workers=0)
    planned = planned_batches(feed, SIZE)
    assert not isinstance(planned, str)
    count = feed.policy.count
    for epoch, (view, skip) in enumerate([(0, 0), (1 if count is None else count - 1, 2)]):
        order = torch.randperm(150, generator=torch.Generator().manual_seed(epoch))
        *whole, last = map(copied, feed.batches(order, view, SIZE, skip))
        planned.start(order, view, skip * SIZE)
        places = set()
        for expected in whole:
            with NoWaits():
                planned.next()
            assert planned.batch is not None
            places.add(planned.batch.pixels.data_ptr())
            for mine, theirs in zip(copied(planned.batch), expected, strict=True):
                assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
        assert len(places) == 1
        for mine, theirs in zip(copied(planned.last(128)), last, strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("resized-crop-flip", "images are streamed"),
        ("pad-crop|pad-crop+erasing:p=0.5", "not all cut out in the same way"),
    ],
)
def test_why_there_are_none(name: str, why: str, digits: Splits) -> None:
    found = planned_batches(ViewFeed(digits.train, view_policy(name), CPU, workers=0), SIZE)
    assert isinstance(found, str)
    assert why in found
