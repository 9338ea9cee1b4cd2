"""Cached views for a DataLoader, against the batches of CachedEpochs and the cache itself."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DIGITS, cache_of
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from stages import CachedDataset, CachedEpochs, EpochSampler, LogitCache
from stages.cache.identity import SkippedSample
from stages.cached_dataset import CachedBatch
from stages.data import Splits
from stages.errors import ConfigError, DatasetError, IdentityError, PipelineError
from stages.settings import DataSettings
from stages.user_code import trusting

FEW = DataSettings(dataset="test_cached_dataset:few", workers=0)


@pytest.fixture(scope="module")
def my_dataset(finished_cache: Path) -> CachedDataset:
    """1,000 samples and 3 views."""
    return CachedDataset(finished_cache)


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path, digits: Splits) -> Path:
    """One weak view, and a strong one that mixes."""
    path = tmp_path_factory.mktemp("paired") / "digits.zarr"
    return cache_of(teacher_run, path, digits, augment="pad-crop:pad=2|pad-crop:pad=2+mixup")


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_gives_the_batches_of_cached_epochs(
    finished_cache: Path, workers: int
) -> None:
    dataset = CachedDataset(finished_cache)
    sampler = EpochSampler(dataset, seed=3)
    loader = DataLoader(
        dataset,
        batch_size=128,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )
    epochs = CachedEpochs(CachedDataset(finished_cache, DIGITS), 128, seed=3, device="cpu")
    views = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        views.add(sampler.view(epoch))
        for ours, theirs in zip(loader, epochs.epoch(epoch), strict=True):
            assert isinstance(ours, CachedBatch)
            assert all(map(same, ours[:5], theirs[:5]))
            assert same(ours.partner_labels, ours.labels)
            assert same(ours.shares, torch.ones(len(ours.labels)))
    assert views == {0, 1, 2}


def test_an_item_is_a_view_of_a_sample(my_dataset: CachedDataset) -> None:
    cache = my_dataset.cache
    assert len(my_dataset) == 3 * 1000
    for view, sample in ((0, 7), (2, 999)):
        item = my_dataset[view * 1000 + sample]
        assert item.images.shape == (1, 8, 8)
        assert item.images.dtype == torch.float32
        assert (int(item.samples), int(item.labels)) == (sample, int(cache.labels[sample]))
        rows = cache.read_view(view).rows(torch.tensor([sample]), 4.0)
        assert torch.equal(item.teacher_logits, rows[0])
        pickled = pickle.loads(pickle.dumps(my_dataset))  # as a spawned worker is given it
        assert all(map(same, pickled[view * 1000 + sample], item))
    for outside in (-1, 3000):
        with pytest.raises(IndexError):
            my_dataset[outside]


def test_rectified_rows(rectified_cache: Path) -> None:
    dataset = CachedDataset(rectified_cache, DIGITS, rectified="pairwise-T4")
    targets = LogitCache.open(rectified_cache).read_view(1, "pairwise-T4")
    batch, every = dataset.read(1, torch.arange(1000)), torch.arange(1000)
    assert torch.equal(batch.teacher_logits, targets.rectified_rows(every, 4.0))
    assert torch.equal(batch.wrong, targets.wrong(every))
    assert 0 < int(batch.wrong.sum()) < 1000
    for fast in CachedEpochs(dataset, 250, device="cpu").epoch(0):
        plain = dataset.read(EpochSampler(dataset).view(0), fast.samples)
        assert all(map(same, fast[:5], plain[:5]))


def test_a_transform_takes_the_pixels(finished_cache: Path) -> None:
    raw = CachedDataset(finished_cache, transform=torch.nn.Identity())
    pixels = raw.read(0, torch.arange(1000)).images
    assert pixels.dtype == torch.uint8
    normalised = CachedDataset(finished_cache).read(0, torch.arange(1000)).images
    assert torch.equal(raw.normalise()(pixels), normalised)
    raw.transform = raw.normalise(channels=3)
    assert raw[0].images.shape == (3, 8, 8)


def test_the_test_split_is_that_of_cached_epochs(
    my_dataset: CachedDataset, finished_cache: Path, digits: Splits
) -> None:
    epochs = CachedEpochs(CachedDataset(finished_cache, DIGITS), 797, device="cpu")
    theirs = next(iter(epochs.test()))
    ours = next(iter(DataLoader(my_dataset.test, 797)))
    assert all(map(same, ours, theirs))
    given = CachedDataset(finished_cache, Own(*arrays(digits), AS_IS))
    with pytest.raises(ConfigError, match="no test split"):
        _ = given.test
    with pytest.raises(ConfigError):
        CachedEpochs(given, device="cpu")


def test_a_weak_and_a_strong_view_in_one_batch(paired: Path, finished_cache: Path) -> None:
    dataset = CachedDataset(paired)
    wanted = [4, 1000 + 4, 9, 1000 + 9]
    items = dataset.__getitems__(wanted)
    assert [int(item.samples) for item in items] == [4, 4, 9, 9]
    for index, item in zip(wanted, items, strict=True):
        alone = dataset[index]
        assert all(map(same, item, alone))
    assert [float(item.shares) for item in items[::2] if item.shares is not None] == [1, 1]
    mixed = [item for item in items[1::2] if item.shares is not None and float(item.shares) < 1]
    assert mixed
    with pytest.raises(ConfigError, match="EpochSampler"):
        CachedDataset(finished_cache).__getitems__([0, 1000, 2000])


def test_samples_that_are_left_out_are_not_shown(finished_cache: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished_cache, tmp_path / "digits.zarr"))
    LogitCache.open(path, writable=True).add_skips([SkippedSample("train", 17)])
    dataset = CachedDataset(path)
    assert 17 not in [index % 1000 for index in EpochSampler(dataset)]
    with pytest.raises(DatasetError, match="leaves samples out"):
        dataset[17]


class Own:
    """The digits, whatever an item is made to be."""

    def __init__(self, images: Tensor, labels: Tensor, item: Callable[[Tensor, int], Any]) -> None:
        self.images, self.labels, self.item = images, labels, item

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.item(self.images[index], int(self.labels[index]))


def arrays(digits: Splits) -> tuple[Tensor, Tensor]:
    assert digits.train.images is not None
    return digits.train.images, digits.train.labels


def flickering(image: Tensor, label: int) -> tuple[Tensor, int]:
    return torch.randint_like(image, 255), label


ACCEPTED = {
    "tensors": lambda image, label: (image, label),
    "arrays": lambda image, label: (image[0].numpy(), label),
    "pictures": lambda image, label: (Image.fromarray(image[0].numpy()), label, "and more"),
    "images alone": lambda image, _: image,
}


@pytest.mark.parametrize("form", ACCEPTED)
def test_any_dataset_of_raw_images(
    form: str, finished_cache: Path, digits: Splits, my_dataset: CachedDataset
) -> None:
    images, labels = arrays(digits)
    dataset = CachedDataset(finished_cache, Own(images, labels, ACCEPTED[form]))
    assert all(map(same, dataset[1001], my_dataset[1001]))


AS_IS, ALONE = ACCEPTED["tensors"], ACCEPTED["images alone"]
REFUSED: dict[str, tuple[type[PipelineError], Callable[[Tensor, Tensor], Any]]] = {
    "order": (IdentityError, lambda x, y: Own(x.flip(0), y, ALONE)),
    "labels": (IdentityError, lambda x, y: Own(x, (y + 1) % 10, AS_IS)),
    "other pixels": (IdentityError, lambda x, y: Own(255 - x, y, AS_IS)),
    "floats": (DatasetError, lambda x, y: Own(x / 255, y, AS_IS)),
    "augmented": (DatasetError, lambda x, y: Own(x, y, flickering)),
    "items": (DatasetError, lambda x, y: Own(x, y, lambda _, label: {"label": label})),
    "no map": (DatasetError, lambda x, _: iter(x)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_datasets_that_are_refused(name: str, finished_cache: Path, digits: Splits) -> None:
    kind, change = REFUSED[name]
    with pytest.raises(kind) as caught:
        CachedDataset(finished_cache, change(*arrays(digits)))
    assert len(str(caught.value).splitlines()) <= 3


def few(split: str) -> TensorDataset:
    """What `test_cached_dataset:few` names."""
    images = torch.arange(60 * 64, dtype=torch.int64).remainder(251).to(torch.uint8)
    return TensorDataset(images.view(60, 1, 8, 8), torch.arange(60) % 10)


@pytest.fixture(scope="module")
def few_cache(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path) -> Path:
    """Of views that are rendered one by one."""
    path = tmp_path_factory.mktemp("few") / "few.zarr"
    return cache_of(teacher_run, path, data=FEW, augment="pad-crop:pad=2+trivial-augment")


def test_code_that_only_the_cache_names_is_not_run(few_cache: Path) -> None:
    with pytest.raises(ConfigError, match="--trust test_cached_dataset"):
        CachedDataset(few_cache)
    with trusting("test_cached_dataset"):
        named = CachedDataset(few_cache)
    given = CachedDataset(few_cache, few("train"))
    assert all(map(same, named[59], given[59]))


def test_views_that_are_rendered_one_by_one(few_cache: Path) -> None:
    dataset = CachedDataset(few_cache, few("train"))
    loader = DataLoader(dataset, 30, sampler=EpochSampler(dataset), num_workers=1)
    epochs = CachedEpochs(CachedDataset(few_cache, FEW), batch_size=30, device="cpu")
    for ours, theirs in zip(loader, epochs.epoch(0), strict=True):
        assert all(map(same, ours[:5], theirs[:5]))
