"""Epochs for loops of one's own, against the cache, the policy and what train-student trains."""

from pathlib import Path

import pytest
import torch
from helpers import DIGITS, cache_of

from stages import CachedDataset, CachedEpochs
from stages.cache import LogitCache
from stages.data import Splits
from stages.errors import CacheError, DatasetError
from stages.inputs.views import view_policy
from stages.settings import DataSettings


@pytest.fixture(scope="module")
def my_epochs(finished_cache: Path) -> CachedEpochs:
    return CachedEpochs(CachedDataset(finished_cache, DIGITS), batch_size=128, device="cpu")


def test_batches_hold_the_pixels_and_rows_of_one_view(
    my_epochs: CachedEpochs, finished_cache: Path, digits: Splits
) -> None:
    cache, policy = LogitCache.open(finished_cache), view_policy("pad-crop:pad=2")
    mean, std = digits.train.statistics()
    assert digits.train.images is not None
    views = []
    for epoch in range(3):
        batches = list(my_epochs.epoch(epoch))
        assert len(batches) == len(my_epochs.epoch(epoch)) == 8
        samples = torch.cat([batch.samples for batch in batches])
        assert samples.sort().values.tolist() == list(range(1000))
        for view in range(3):  # which of them it is shows in the rows
            targets = cache.read_view(view)
            if torch.equal(targets.rows(batches[0].samples), batches[0].teacher_logits):
                break
        views.append(view)
        for batch in batches:
            pixels = policy.apply(digits.train.images[batch.samples], batch.samples, view)
            expected = (pixels / 255 - mean[0]) / std[0]
            assert torch.allclose(batch.images, expected, atol=1e-6)
            assert torch.equal(batch.teacher_logits, targets.rows(batch.samples))
            assert torch.equal(batch.labels, digits.train.labels[batch.samples])
            assert torch.equal(batch.wrong, targets.wrong(batch.samples))
            assert batch.partner_labels is None
    assert sorted(views) == [0, 1, 2]
    once_more = [batch.samples.tolist() for batch in my_epochs.epoch(2)]
    assert once_more == [batch.samples.tolist() for batch in batches]


def test_the_test_split_is_clean_and_whole(my_epochs: CachedEpochs, digits: Splits) -> None:
    assert digits.test.images is not None
    batches = my_epochs.test()
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert torch.equal(labels, digits.test.labels)
    assert torch.equal(images, my_epochs.normalise(digits.test.images))
    assert len(list(batches)) == len(batches)


def test_mixed_views_have_both_labels(teacher_run: Path, tmp_path: Path) -> None:
    """And samples that are held out are not shown."""
    mixed = cache_of(teacher_run, tmp_path / "m.zarr", views=1, augment="pad-crop:pad=2+mixup")
    held = DataSettings(dataset="digits", workers=0, val_fraction=0.25)
    (batch,) = CachedEpochs(CachedDataset(mixed, held), 750, device="cpu").epoch(0)
    assert len(batch.samples.unique()) == len(batch.samples) == 750
    assert batch.partner_labels is not None
    assert batch.shares is not None
    assert batch.partner_labels.shape == batch.shares.shape == batch.labels.shape
    assert bool((batch.shares >= 0.5).all())


def test_an_unfinished_cache_is_refused_at_once(cache_copy: Path) -> None:
    LogitCache.open(cache_copy, writable=True).grow(5)
    with pytest.raises(CacheError, match="not complete"):
        CachedDataset(cache_copy, "digits")
    with pytest.raises(DatasetError):
        CachedDataset(cache_copy, "digitz", views=3)
    dataset = CachedDataset(cache_copy, "digits", views=3)
    assert len(CachedEpochs(dataset, device="cpu").epoch(0))
