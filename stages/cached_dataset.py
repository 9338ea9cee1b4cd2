"""A cache as a map-style dataset: images, labels and the teacher's logits for a `DataLoader`.

    dataset = CachedDataset("digits.zarr")
    sampler = EpochSampler(dataset, seed=0)
    loader = DataLoader(dataset, batch_size=128, sampler=sampler, num_workers=4)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = kd(student(batch.images), batch.teacher_logits, batch.labels, temperature=4)

An index is a plain integer, `view * num_samples + sample`: it says which view is meant, so that
workers, persistent ones as well, need not be told of epochs. Each worker opens the cache for itself
and holds the encoded rows of the view that its last batch was of: `cache.row_bytes` for every
sample, 4 bytes a class as `float32` and 1 as `klt`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stages.cache import LogitCache
from stages.cache.encoding import check_temperature
from stages.cache.targets import ViewTargets
from stages.cached_images import (
    MOST_VIEWS,
    CleanImages,
    Pixels,
    Transform,
    given_images,
    named_images,
)
from stages.data import cached_policy, check_dataset, load_data, skips_of, usable_views
from stages.errors import ConfigError, DatasetError
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Normalise, plain_view
from stages.reporting import Silent
from stages.settings import DataSettings


class CachedBatch(NamedTuple):
    """Some samples of a view, and what the teacher says of them. All on one device.

    An item of a `CachedDataset` has the same fields, without the first axis.

    Attributes
    ----------
    images : Tensor
        float32 (B, C, H, W), normalised, or what the dataset's `transform` makes of the pixels.
    labels : Tensor
        int64 (B,); -1 where the images have none.
    teacher_logits : Tensor
        float32 (B, classes), rectified where that was asked for.
    wrong : Tensor
        bool (B,), whether the teacher's argmax on this view differs from the label. (B, 0) where
        the images have no labels.
    samples : Tensor
        int64 (B,), dataset indices.
    partner_labels : Tensor or None
        int64 (B,), the labels of the samples that are mixed in (mixup, cutmix). Where views do not
        mix: None from `CachedEpochs`, the own labels from `CachedDataset`.
    shares : Tensor or None
        float32 (B,), how much of an image is the sample's own. Where views do not mix: None from
        `CachedEpochs`, 1 from `CachedDataset`.
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor
    wrong: Tensor
    samples: Tensor
    partner_labels: Tensor | None = None
    shares: Tensor | None = None


def known_wrong(targets: ViewTargets, samples: Tensor) -> Tensor:
    """bool (n,): which rows are wrong; (n, 0) without labels: nothing is, or is not."""
    if targets.labelled:
        return targets.wrong(samples)
    return torch.empty((len(samples), 0), dtype=torch.bool, device=samples.device)


class CachedDataset(Dataset[CachedBatch]):
    """The cached views of a dataset with the teacher's logits, for any `DataLoader`.

    Item `view * num_samples + sample` is that view of that sample, a `CachedBatch` without its
    first axis; `EpochSampler` gives the indices of an epoch in the order of `train-student`.

    Parameters
    ----------
    cache : str or Path
        Where the cache is: a folder or the URL of an object store.
    images : str, DataSettings, dataset or None
        The images that the cache was made from. A dataset's name as on the command line, or all
        settings of one; None for the dataset that the cache names; or a map-style dataset of the
        training samples in the cache's order, whose items are images or begin with (image, label).
        Such an image is a PIL image, an array (H, W[, C]) or a tensor (C, H, W) of uint8 pixels,
        not augmented and not normalised.
    rectified : str, optional
        The rectification whose logits to give in place of the teacher's own.
    temperature : float
        At which the loss reads the logits. It matters where rows are stored in part (`topk`) and
        is checked against the rectification.
    views : int, optional
        Use the first so many views of the cache; all of them if None.
    transform : callable, optional
        From uint8 pixels (B, C, H, W) to what `images` is to hold, with B first. If None, the
        pixels are normalised with the dataset's mean and standard deviation.

    Attributes
    ----------
    cache : LogitCache
        Opened once in every process.
    images : ImageDataset
        The training split: labels, shape, skipped samples.
    test_images : ImageDataset or None
        The test split; None where `images` was a dataset object.
    num_views, num_samples, num_classes : int
        `len(dataset)` is `num_views * num_samples`.

    Raises
    ------
    IdentityError
        If these are not the images that the teacher saw: other labels, another number of samples,
        another digest of the pixels, or one of 256 pixel checksums differs. A dataset object is
        checked by its labels and checksums, and by the digest where it can be computed from pixels
        (caches of embedded, torchvision's and `module:callable` datasets, not of folders).
    CacheError
        If there is no such cache or rectification, if views are not complete, or if rows are not
        known at this temperature.
    ConfigError
        If the cache has fewer views than `views`, or names code that is not trusted.
    DatasetError
        If images are missing or unreadable.
    """

    def __init__(
        self,
        cache: str | Path,
        images: "str | DataSettings | Dataset[Any] | Sequence[Any] | None" = None,
        rectified: str | None = None,
        temperature: float = 4.0,
        views: int | None = None,
        transform: Transform | None = None,
    ) -> None:
        self._path, self._opened = cache, (os.getpid(), LogitCache.open(cache))
        self.rectified, self.temperature = rectified, temperature
        check_temperature(self.cache.encoding, temperature)
        if rectified is not None:
            self.cache.rectification(rectified).check_temperature(temperature)
        self.num_views = len(usable_views([self.cache], views, [rectified]))
        self.num_samples, self.num_classes = self.cache.num_samples, self.cache.num_classes
        self.policy = cached_policy(self.cache)
        self.image_size = self.cache.identity.teacher.image_size
        if images is None or isinstance(images, str):
            images = named_images(self.cache, images)
        self.settings = images if isinstance(images, DataSettings) else None
        self.test_images: ImageDataset | None = None
        if isinstance(images, DataSettings):
            splits = load_data(images, skips_of([self.cache.skips]))
            splits = splits.with_classes(self.cache.identity.dataset.class_names)
            check_dataset(self.cache, splits, self.policy, False, Silent())
            self.images, self.test_images = splits.train, splits.test
            self.image_size = images.image_size or self.image_size
        else:
            self.images = given_images(self.cache, images, self.policy)
        self._pixels = Pixels(self.images, self.policy, self.image_size)
        self.transform = transform or self.normalise()
        self._held: dict[int, ViewTargets] = {}

    # ---- what a DataLoader asks ---------------------------------------------------------

    def __len__(self) -> int:
        return self.num_views * self.num_samples

    def __getitem__(self, index: int) -> CachedBatch:
        """See `__getitems__`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[CachedBatch]:
        """The items of a batch, read and rendered together.

        Raises
        ------
        IndexError
            If an index is outside of the dataset.
        ConfigError
            If the batch mixes more than two views: each would be read whole.
        DatasetError
            If the cache leaves a sample out, or an image cannot be read.
        """
        where = torch.as_tensor(indices, dtype=torch.int64)
        if not len(where):
            return []
        low, high = where.aminmax()
        if low < 0 or high >= len(self):
            raise IndexError(f"an index is outside of [0, {len(self)})")
        views, samples = where // self.num_samples, where % self.num_samples
        needed = views.unique().tolist()
        if len(needed) > MOST_VIEWS:
            raise ConfigError(
                f"a batch mixes {len(needed)} views, and each would be read whole",
                "Give the DataLoader sampler=EpochSampler(dataset).",
            )
        self._held = {view: held for view, held in self._held.items() if view in needed}
        items: dict[int, CachedBatch] = {}
        for view in needed:
            which = (views == view).nonzero()[:, 0]
            parts = (t.unbind() for t in self.read(view, samples[which]) if t is not None)
            rows = zip(*parts, strict=True)
            items |= zip(which.tolist(), (CachedBatch(*row) for row in rows), strict=True)
        return [items[i] for i in range(len(where))]

    def read(self, view: int, samples: Tensor) -> CachedBatch:
        """A whole batch of one view.

        Parameters
        ----------
        view : int
            In [0, num_views).
        samples : Tensor
            int64 (B,), dataset indices.

        Returns
        -------
        CachedBatch
            On the CPU, in the order of `samples`.
        """
        if len(self.images.skipped) and torch.isin(samples, self.images.skipped).any():
            raise DatasetError(
                f"{self.cache.path} leaves samples out, and a batch asks for one of them",
                "Give the DataLoader sampler=EpochSampler(dataset).",
            )
        targets, shown = self._targets(view), self._pixels.read(view, samples)
        labels, partner_labels, shares = shown.hard_labels(self.images.labels)
        return CachedBatch(
            self.transform(shown.pixels),
            labels,
            self.logits(targets, samples),
            known_wrong(targets, samples),
            samples,
            labels if partner_labels is None else partner_labels,
            torch.ones(len(samples)) if shares is None else shares,
        )

    @property
    def test(self) -> CleanImages:
        """The clean test split with the same transform.

        Raises
        ------
        ConfigError
            If `images` was a dataset object, which is the training split alone.
        """
        if self.settings is None or self.test_images is None:
            raise ConfigError(
                "images were given as a dataset object, which has no test split",
                "Give a dataset's name, or test with images of your own.",
            )
        clean = plain_view(self.image_size, self.settings.resize)
        return CleanImages(self.test_images, clean, self.image_size, self.transform)

    # ---- details, some of which CachedEpochs uses ---------------------------------------

    @property
    def cache(self) -> LogitCache:
        """The cache, opened once in every process."""
        # Zarr's threads and connections are not carried into a worker.
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), LogitCache.open(self._path)
        return self._opened[1]

    def logits(self, targets: ViewTargets, samples: Tensor) -> Tensor:
        """float32 (B, classes): the teacher's rows, or the rectified ones if those were asked."""
        read = targets.rows if self.rectified is None else targets.rectified_rows
        return read(samples, self.temperature)

    def normalise(self, channels: int | None = None) -> Normalise:
        """A transform by the dataset's statistics: uint8 (B, C, H, W) -> float32.

        channels: to how many grey images are repeated; as many as they have if None.
        """
        mean, std = self.images.statistics()
        channels = channels or self.images.shape[0]
        return Normalise(mean, std, channels, torch.device("cpu"), channels_last=False)

    def _targets(self, view: int) -> ViewTargets:
        if view not in self._held:
            self._held[view] = self.cache.read_view(view, self.rectified)
        return self._held[view]

    def __getstate__(self) -> dict[str, Any]:
        # For workers that are spawned, and not forked.
        return {**self.__dict__, "_opened": (0, None), "_held": {}}
