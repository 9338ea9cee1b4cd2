"""What every stage asks about images: splits, views, and which cache is of them."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec
import torch

from stages.cache import LogitCache
from stages.cache.identity import DatasetIdentity, SkippedSample, differences
from stages.errors import CacheError, ConfigError, DatasetError, IdentityError
from stages.inputs.datasets import ImageDataset, Skip, load_splits, read_skip_list
from stages.inputs.feed import plain_view
from stages.inputs.models import Model
from stages.inputs.probes import probes_differ
from stages.inputs.run_files import sha256
from stages.inputs.views import Plain, ViewPolicy, known_policy, view_policy
from stages.reporting import Reporter
from stages.settings import DataSettings
from stages.user_code import check_trusted

_OPTIONS = {
    "exif": "--exif",
    "jpeg_side": "--jpeg-side",
    "tested_share": "--test",
    "decoder": "--decoder",
}
"""Of a dataset's identity, what users choose beside the dataset itself."""


@dataclass(frozen=True)
class Splits:
    """Both splits of a dataset, loaded once; several runs may share them."""

    train: ImageDataset
    test: ImageDataset

    @property
    def tested(self) -> bool:
        """Whether there is anything to test on."""
        return len(self.test) > 0

    def with_classes(self, names: Sequence[str]) -> "Splits":
        """The same images; where the training split has no labels, and so no classes of its own,
        with these. Raises DatasetError where the test split has others.
        """
        if self.train.labelled:
            return self
        test = self.test if self.tested else replace(self.test, class_names=tuple(names))
        if test.class_names != tuple(names):
            raise DatasetError(
                f"the classes of the test split of {test.name} are not those of the teacher's "
                "outputs",
                "Give the same --eval-dataset to cache-teacher, and say with --classes which "
                "outputs they are.",
            )
        return Splits(replace(self.train, class_names=tuple(names)), test)

    def tell(self, reporter: Reporter) -> None:
        """Say what a user has to know of these images."""
        if not self.train.labelled:
            reporter.say(f"{len(self.train):,} training images without labels")
        if not self.tested:
            reporter.say("no test split: nothing is measured")
        for split in (self.train, self.test):
            for note in split.notes:
                reporter.say(note)
            if split.skips:
                reporter.say(
                    f"{len(split.skips):,} of {len(split):,} {split.split} samples skipped"
                )


def load_data(settings: DataSettings, skips: Iterable[Skip] = ()) -> Splits:
    """The dataset of a run. skips: samples to leave out beside those of the settings' own list, as
    a cache has them; what it says of a file counts. Raises DatasetError.
    """
    own = [] if settings.skip is None else read_skip_list(settings.skip)
    return Splits(
        *load_splits(
            settings.dataset,
            root=settings.root,
            feeding=settings.feeding,
            download=settings.download,
            rescan=settings.rescan,
            skips=[*skips, *own],
            eval_dataset=settings.eval_dataset,
            test=settings.test,
            no_labels=settings.no_labels,
            exif=settings.exif,
            jpeg_side=settings.jpeg_side,
            decoder=settings.decoder,
        )
    )


def skips_of(lists: Iterable[Iterable[SkippedSample]]) -> list[Skip]:
    """The samples that any of these lists, as caches keep them, leaves out."""
    return [msgspec.convert(msgspec.to_builtins(s), Skip) for skips in lists for s in skips]


def skipped_samples(splits: Splits) -> list[SkippedSample]:
    """The samples that are left out, as a cache keeps them."""
    skips = (*splits.train.skips, *splits.test.skips)
    return [msgspec.convert(msgspec.to_builtins(skip), SkippedSample) for skip in skips]


def dataset_identity(dataset: ImageDataset) -> DatasetIdentity:
    """The images as a cache and its user must agree on them."""
    return DatasetIdentity(
        name=dataset.name,
        split=dataset.split,
        num_samples=len(dataset),
        class_names=dataset.class_names,
        labels=dataset.labels_digest,
        images=dataset.images_digest,
        exif=dataset.exif,
        jpeg_side=dataset.jpeg_side,
        decoder=dataset.decoder,
        tested_share=dataset.tested_share or None,
    )


def split_digests(splits: Splits) -> dict[str, str]:
    """What the images of both splits are, wherever they lie."""
    return {
        name: sha256(msgspec.json.encode(dataset_identity(split)))[:32]
        for name, split in (("train_split", splits.train), ("test_split", splits.test))
    }


def check_dataset(
    cache: LogitCache, splits: Splits, policy: ViewPolicy, accept_drift: bool, reporter: Reporter
) -> None:
    """Raise IdentityError unless the student sees the samples and pixels that the teacher saw."""
    check_identity(cache, splits.train)
    loaded = {(skip.split, skip.sample) for skip in (*splits.train.skips, *splits.test.skips)}
    if missing := [s for s in cache.skips if (s.split, s.sample) not in loaded]:
        raise IdentityError(
            f"{cache.path} leaves out {len(cache.skips)} samples, and these images have "
            f"{len(missing)} of them",
            "Load them with load_data(settings, skips_of([cache.skips])).",
        )
    size, expected = cache.identity.teacher.image_size, cache.pixel_probes
    if drift := probes_differ(splits.train, policy, size, expected):
        if not accept_drift:
            raise IdentityError(
                f"{drift} of {cache.path} differ: the images are not what the teacher saw",
                "Restore the images or the image libraries, or go on with --accept-pixel-drift.",
            )
        reporter.say(f"warning: {drift} differ from the teacher's")


def check_identity(cache: LogitCache, train: ImageDataset) -> None:
    """Raise IdentityError unless the cache was made from this dataset, by its digests."""
    ours, theirs = dataset_identity(train), cache.identity.dataset
    if differing := differences(ours, theirs):
        options = [f for f in _OPTIONS if getattr(ours, f) != getattr(theirs, f)]
        wanted = " and ".join(_OPTIONS[field] for field in options)
        if theirs.decoder is not None and not torch.cuda.is_available():
            raise IdentityError(
                f"the images of {cache.path} were decoded on a GPU ({theirs.decoder}), and there "
                "is no CUDA device here",
                "Train where there is one, use a cache made without --decoder, or give "
                "CachedDataset the pixels that were decoded there.",
            )
        raise IdentityError(
            f"{cache.path} was made from another dataset or order: {'; '.join(differing[:3])}",
            f"Give {wanted} as the cache was made with, or cache this one."
            if wanted
            else "Give the dataset that the cache was made from, or cache this one.",
        )


def chosen_policy(augment: str, seed: int, clean: Plain) -> ViewPolicy:
    """The view policy asked for; `none` shows what evaluation shows, the view `clean`."""
    return clean if augment == "none" else view_policy(augment, seed, clean)


def clean_view(model: Model, image_size: int | None, resize: int | None) -> Plain:
    """The view that a teacher is evaluated on: as `resize` says, else as the model was; resized
    with the filter that it was trained with.
    """
    view = plain_view(image_size, resize)
    if image_size is None:
        return view
    if resize is None and model.zoom is not None:
        view = Plain(zoom=model.zoom)
    return replace(view, interpolation=model.interpolation or view.interpolation)


def cached_policy(cache: LogitCache) -> ViewPolicy:
    """The policy whose views the cache holds. Raises ConfigError for code that is not trusted."""
    views = cache.identity.views
    check_trusted(f"cache {cache.path}", policy=views.policy)
    return known_policy(views.policy, views.parameters, views.version, views.seed)


def usable_views(
    caches: Sequence[LogitCache], views: int | None, rectified: Collection[str | None]
) -> list[int]:
    """The views to train from, of the first `views` (None for all), which every cache must have
    with each of these rectifications (None for none). Raises ConfigError if there are fewer,
    CacheError unless all are complete, and rectified where that is wanted.
    """
    counts = {cache.num_views for cache in caches}
    if views is None and len(counts) > 1:
        raise ConfigError(
            f"the caches have {' and '.join(map(str, sorted(counts)))} views",
            f"Train from those that all have with --views {min(counts)}.",
        )
    usable, *_ = [_usable_views(cache, views, name) for name in rectified for cache in caches]
    return usable


def _usable_views(cache: LogitCache, views: int | None, rectified: str | None) -> list[int]:
    """As `usable_views`, of one cache and one rectification."""
    count = cache.num_views if views is None else views
    if not 0 < count <= cache.num_views:
        raise ConfigError(f"{views} views were asked for, the cache has {cache.num_views}")
    wanted = range(count)
    complete, logs = set(cache.complete_views), [cache.commits]
    stage = "cache-teacher"
    if rectified is not None:
        logs.append(cache.rectification(rectified).commits)
        done = {v for v in complete if logs[-1].is_complete(v)}
        stage = "cache-teacher" if done == complete else "rectify"
        complete = done
    if not complete.issuperset(wanted):
        leading = next(v for v in range(cache.num_views + 1) if v not in complete)
        offer = f", or train from what is there with --views {leading}" if leading else ""
        raise CacheError(
            f"{cache.path} is not complete: {len(complete)} of {cache.num_views} views are"
            + (" rectified" if stage == "rectify" else ""),
            f"Run `pipeline {stage}` again to finish it{offer}.",
        )
    for log in logs:  # complete by name: what is damaged or gone shows now, not at its epoch
        log.check_all_objects(wanted)
    return list(wanted)
