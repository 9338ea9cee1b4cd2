"""What stage one is given, loaded and checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.arrays import open_group
from stages.cache.encoding import check_encoding
from stages.cache.identity import (
    Identity,
    TeacherIdentity,
    ViewsIdentity,
    identity_from_json,
)
from stages.cache.layout import BlockGrid, block_grid
from stages.cache.metadata import RootAttributes, read_attributes
from stages.cache.storage import location
from stages.data import Splits, chosen_policy, clean_view, dataset_identity, load_data, skips_of
from stages.device import device_of_rank, place
from stages.distributed import ALONE, Ranks
from stages.errors import ViewError
from stages.inputs.counter_hash import permute
from stages.inputs.datasets import ImageDataset, Skip, Statistics
from stages.inputs.feed import Normalise, ViewFeed
from stages.inputs.model_input import (
    filter_notes,
    normalisation,
    normalisation_source,
    small_image_notes,
)
from stages.inputs.model_outputs import sample_outputs, sample_pixels
from stages.inputs.models import Model
from stages.inputs.views import Plain, ViewPolicy
from stages.settings import CacheConfig, TeacherSettings
from stages.teacher.folds import (
    FoldTeachers,
    check_unmixed_folds,
    load_teachers,
)
from stages.teacher.outputs import output_names, teacher_outputs, weights_of

_ROW_ORDER = 4  # a stream of the view seed, apart from those of training


@dataclass(frozen=True)
class CacheJob:
    """Everything stage one needs, loaded and checked; make it with `prepare`.

    clean: the view of the test split. normalised: where the normalisation comes from. notes_shown:
    `notes` have been printed already. folds: where there are several teachers, each of its own
    samples; `model` is then the first.
    """

    config: CacheConfig
    splits: Splits
    policy: ViewPolicy
    clean: Plain
    image_size: int | None
    model: Model
    normalise: Normalise
    identity: Identity
    device: torch.device
    ranks: Ranks = ALONE
    normalised: str = ""
    notes_shown: bool = False
    folds: FoldTeachers | None = None

    @property
    def num_classes(self) -> int:
        """C, the classes of the dataset."""
        return len(self.splits.train.class_names)

    @property
    def normalisation(self) -> str:
        """Mean and standard deviation, and where they come from, in words."""
        teacher = self.identity.teacher
        return normalisation_text(teacher.mean, teacher.std, self.normalised)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen when the teacher was loaded, a line each."""
        return self.model.notes

    @cached_property
    def row_order(self) -> Tensor:
        """int64 (N,): the sample of each row, a keyed permutation."""
        samples = len(self.splits.train)
        return permute(torch.arange(samples), samples, self.config.seed, _ROW_ORDER)

    @property
    def grid(self) -> BlockGrid:
        """How the rows of a new cache are cut into blocks."""
        return block_grid(len(self.splits.train), self.num_classes, self.config.block_rows)

    def feed(self, dataset: ImageDataset, policy: ViewPolicy) -> ViewFeed:
        """Views of a dataset as this teacher sees them."""
        return ViewFeed(dataset, policy, self.device, self.image_size, self.config.data.workers)


@dataclass(frozen=True)
class Begun:
    """What a cache that is there settles for whoever goes on with it: the samples that it leaves
    out, and its mean and standard deviation, which may have been measured on images that have
    broken since.
    """

    skips: Sequence[Skip]
    statistics: Statistics

    @staticmethod
    def of(attributes: RootAttributes, where: str) -> "Begun":
        """From a cache's attributes. Raises CacheError if its identity cannot be read."""
        teacher = identity_from_json(attributes.identity, where).teacher
        return Begun(skips_of([attributes.skipped]), (teacher.mean, teacher.std))


def begun_at(path: str | Path) -> Begun | None:
    """As `Begun`, of the cache at `path`; None if there is none."""
    if not LogitCache.exists(path):
        return None
    where = location(path)
    return Begun.of(read_attributes(where, open_group(where).attrs.asdict()), str(where))


def prepare(
    config: CacheConfig,
    splits: Splits | None = None,
    ranks: Ranks = ALONE,
    begun: Begun | None = None,
) -> CacheJob:
    """Load dataset and teacher and check that they belong together; ranks: which of several does.
    begun: the cache that is to be gone on with, see `begun_at`.

    Raises CacheError, DatasetError, ModelError, ViewError or ConfigError.
    """
    check_encoding(config.encoding)
    splits = splits or load_data(config.data, begun.skips if begun else ())
    train, device = splits.train, device_of_rank(ranks, config.device)
    teacher = config.teacher
    models, folds = load_teachers(teacher, splits)
    model = models[0]
    image_size = teacher.image_size or config.data.image_size or model.image_size
    clean = clean_view(model, image_size, config.data.resize)
    policy = _policy(config, clean)
    if folds is not None:
        check_unmixed_folds(policy)
    pixels = sample_pixels(train, policy, image_size)
    mean, std = _statistics(teacher, model, train, begun)
    normalise = Normalise(mean, std, model.channels, pixels.device, channels_last=False)
    rows, *_ = [sample_outputs(each, pixels, normalise) for each in models]
    splits = splits.with_classes(train.class_names or output_names(model, teacher, rows.shape[1]))
    outputs = teacher_outputs(model, teacher, splits.train.class_names, rows)
    identity = Identity(
        teacher=TeacherIdentity(
            architecture=model.architecture,
            weights=folds.weights if folds else weights_of(model),
            mean=mean,
            std=std,
            image_size=image_size,
            outputs=teacher.outputs,
            class_order=outputs.order,
            pooled_outputs=outputs.pooled,
            folds=folds.identity if folds else None,
        ),
        dataset=dataset_identity(splits.train),
        views=ViewsIdentity(policy.name, policy.parameters, policy.version, policy.seed),
        compute_dtype=config.dtype,
    )
    notes = small_image_notes(model.architecture, train, image_size)
    notes += filter_notes(model, policy, image_size)
    modules = tuple(outputs.adapted(each, teacher).module for each in models)
    for module in modules:
        place(module, device, config.channels_last).eval()
    return CacheJob(
        config=config,
        splits=splits,
        policy=policy,
        clean=clean,
        image_size=image_size,
        model=replace(model, module=modules[0], notes=(*model.notes, *notes)),
        normalise=Normalise(mean, std, model.channels, device, config.channels_last),
        normalised=normalisation_source(model, teacher.mean is not None),
        identity=identity,
        device=device,
        ranks=ranks,
        folds=folds and replace(folds, modules=modules),
    )


def _policy(config: CacheConfig, clean: Plain) -> ViewPolicy:
    """The view policy asked for. Raises ViewError where it has fewer views than that."""
    policy = chosen_policy(config.augment, config.seed, clean)
    if policy.count is not None and config.views > policy.count:
        raise ViewError(
            f"view policy '{config.augment}' has {policy.count} distinct view(s), "
            f"{config.views} were asked for",
            f"Give --views {policy.count}, which is every view there is, or another --augment.",
        )
    return policy


def _statistics(
    teacher: TeacherSettings, model: Model, train: ImageDataset, begun: Begun | None
) -> Statistics:
    """The teacher's mean and standard deviation."""
    mean, std = teacher.mean, teacher.std
    if mean is std is None and model.statistics is None and begun and train.skips:
        mean, std = begun.statistics  # measured when its images were whole
    return normalisation(model, train, mean, std)


def normalisation_text(mean: Sequence[float], std: Sequence[float], source: str) -> str:
    """mean 0.491, 0.482, 0.447, std 0.247, 0.243, 0.262, of run runs/teacher."""
    shown = [", ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
    every = " for every channel" if len(mean) == 1 else ""
    return f"mean {shown[0]}, std {shown[1]}{every}" + (f", {source}" if source else "")
