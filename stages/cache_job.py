"""What stage one is given, loaded and checked; and the teacher's logits of it, view by view.

Logits of a row depend on nothing but the rows that are computed with it: blocks are cut into the
same batches in every process, whatever was done before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache.arrays import open_group
from stages.cache.encoding import Encoding, check_encoding, fit_encoding, fit_rows
from stages.cache.identity import (
    Identity,
    TeacherIdentity,
    ViewsIdentity,
    identity_from_json,
)
from stages.cache.layout import MAX_BLOCK_BYTES, BlockGrid, BlockId, block_grid
from stages.cache.metadata import RootAttributes, read_attributes
from stages.cache.storage import location
from stages.data import (
    Splits,
    chosen_policy,
    clean_view,
    dataset_identity,
    filter_notes,
    load_data,
    normalisation,
    normalisation_source,
    sample_outputs,
    skips_of,
    small_image_notes,
)
from stages.device import forward, place
from stages.distributed import ALONE, Ranks, device_of_rank
from stages.errors import ModelError, ViewError
from stages.fold_teachers import (
    FoldTeachers,
    check_unmixed_folds,
    load_teachers,
    mean_logits,
)
from stages.inputs.counter_hash import permute
from stages.inputs.datasets import ImageDataset, Skip, Statistics
from stages.inputs.feed import Normalise, ViewFeed
from stages.inputs.models import Model
from stages.inputs.views import ViewPolicy
from stages.settings import CacheConfig
from stages.teacher_classes import output_names, teacher_outputs, weights_of

_ROW_ORDER = 4  # a stream of the view seed, apart from those of training


@dataclass(frozen=True)
class CacheJob:
    """Everything stage one needs, loaded and checked; make it with `prepare`.

    normalised: where the normalisation comes from. told: `notes` have been printed already. folds:
    where several teachers answer, each for its own samples; `model` is then the first of them.
    """

    config: CacheConfig
    splits: Splits
    policy: ViewPolicy
    image_size: int | None
    model: Model
    normalise: Normalise
    identity: Identity
    device: torch.device
    ranks: Ranks = ALONE
    normalised: str = ""
    told: bool = False
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

    def seen_rows(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of the first rows' logits, float32 (n, C), those whose samples the teacher has seen; and
        their labels, int64 (m,).
        """
        samples, train = self.row_order[: len(logits)], self.splits.train
        seen = ~torch.isin(samples, train.skipped)
        return logits[seen], train.labels[samples[seen]]

    def feed(self, dataset: ImageDataset, policy: ViewPolicy) -> ViewFeed:
        """Views of a dataset as this teacher sees them."""
        return ViewFeed(dataset, policy, self.device, self.image_size, self.config.data.workers)

    def teacher(self, progress: Callable[[int], None] = lambda rows: None) -> "TeacherPass":
        """The teacher on views of the training split."""
        return TeacherPass(self, self.feed(self.splits.train, self.policy), None, progress)

    def teacher_on_test(self) -> "TeacherPass":
        """The teacher on the test split, view 0."""
        view = clean_view(self.model, self.image_size, self.config.data.resize)
        return TeacherPass(self, self.feed(self.splits.test, view), "the test split")


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
    policy = chosen_policy(config.augment, config.seed, clean)
    if policy.count is not None and config.views > policy.count:
        raise ViewError(
            f"view policy '{config.augment}' has {policy.count} distinct view(s), "
            f"{config.views} were asked for",
            f"Give --views {policy.count}, which is every view there is, or another --augment.",
        )
    mean, std = teacher.mean, teacher.std
    if mean is std is None and model.statistics is None and begun and train.skips:
        mean, std = begun.statistics  # measured when its images were whole
    mean, std = normalisation(model, train, mean, std)
    if folds is not None:
        check_unmixed_folds(policy)
    notes = small_image_notes(model.architecture, train, image_size)
    notes += filter_notes(model, policy, image_size)
    rows = sample_outputs(model, (mean, std), train, policy, image_size)
    names = train.class_names or output_names(model, teacher, rows.shape[1])
    splits = splits.with_classes(names)
    train = splits.train
    outputs = teacher_outputs(model, teacher, train.class_names, rows)
    for other in models[1:]:
        sample_outputs(other, (mean, std), train, policy, image_size)
    source_of_mean = normalisation_source(model, teacher.mean is not None)
    model = replace(model, notes=(*model.notes, *notes))
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
        dataset=dataset_identity(train),
        views=ViewsIdentity(policy.name, policy.parameters, policy.version, policy.seed),
        compute_dtype=config.dtype,
    )
    modules = [outputs.adapted(each, teacher).module for each in models]
    for module in modules:
        place(module, device, config.channels_last).eval()
    model = replace(model, module=modules[0])
    normalise = Normalise(mean, std, model.channels, device, config.channels_last)
    return CacheJob(
        config=config,
        splits=splits,
        policy=policy,
        image_size=image_size,
        model=model,
        normalise=normalise,
        normalised=source_of_mean,
        identity=identity,
        device=device,
        ranks=ranks,
        folds=folds and replace(folds, modules=tuple(modules)),
    )


def normalisation_text(mean: Sequence[float], std: Sequence[float], source: str) -> str:
    """mean 0.491, 0.482, 0.447, std 0.247, 0.243, 0.262, of run runs/teacher."""
    shown = [", ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
    every = " for every channel" if len(mean) == 1 else ""
    return f"mean {shown[0]}, std {shown[1]}{every}" + (f", {source}" if source else "")


@dataclass(frozen=True)
class TeacherPass:
    """The teacher on the images of one split. Close its feed when it is done.

    split: as an error names it, None for the view that was asked for. progress: called with the
    number of rows of each batch.
    """

    job: CacheJob
    feed: ViewFeed
    split: str | None = None
    progress: Callable[[int], None] = lambda rows: None

    def logits(self, samples: Tensor, view: int) -> Tensor:
        """The teacher's float32 logits (n, C) for one view of some samples, on the CPU; of several
        each for the samples of its fold, or of the test split their mean.
        """
        return self.of_views(samples, (view,))[0]

    @torch.inference_mode()
    def of_views(self, samples: Tensor, views: Sequence[int]) -> list[Tensor]:
        """As `logits`, for each of several views; an image is decoded once for all of them."""
        folds = self.job.folds
        if folds is None:
            return self._rows(self.job.model.module, samples, views)
        if self.split is not None:
            each = [self._rows(module, samples, views) for module in folds.modules]
            return [mean_logits(of_view) for of_view in zip(*each, strict=True)]
        logits = [torch.empty(len(samples), self.job.num_classes) for _ in views]
        for module, places in folds.parts(samples):
            found = self._rows(module, samples[places], views)
            for whole, part in zip(logits, found, strict=True):
                whole[places] = part
        return logits

    def _rows(self, module: nn.Module, samples: Tensor, views: Sequence[int]) -> list[Tensor]:
        """As `of_views`, of one network. From a GPU they are copied batch by batch while it goes on
        computing.
        """
        job, classes = self.job, self.job.num_classes
        # A block must not depend on who computes it: cuDNN chooses by rule, not by timing.
        torch.backends.cudnn.benchmark = False
        on_gpu = job.device.type == "cuda"
        pinned = on_gpu and 4 * len(samples) * classes <= MAX_BLOCK_BYTES  # torch keeps it
        logits = [torch.empty((len(samples), classes), pin_memory=pinned) for _ in views]
        in_order, start = self.feed.dataset.in_order, 0
        if in_order:  # their place in the block is given back at the end
            samples, places = samples.sort()
        for batches in self.feed.views(samples, views, job.config.batch_size):
            size = len(batches[0].samples)
            for batch, whole in zip(batches, logits, strict=True):
                output = forward(module, job.normalise(batch.pixels), job.config.dtype)
                if output.shape != (size, classes):
                    raise ModelError(
                        f"the teacher gives logits of shape {tuple(output.shape)} for "
                        f"{size} images and {classes} classes",
                        "Let the model return a row of logits for each image.",
                    )
                whole[start : start + size].copy_(output, non_blocking=True)
                self.progress(size)
            start += size
        if on_gpu:
            torch.cuda.current_stream(job.device).synchronize()
        if in_order:
            for rows in logits:
                rows[places] = rows.clone()
        return logits

    def finite_logits(self, samples: Tensor, view: int) -> Tensor:
        """As `logits`. Raises ModelError unless all are finite."""
        return self.finite_of_views(samples, (view,))[0]

    def finite_of_views(self, samples: Tensor, views: Sequence[int]) -> list[Tensor]:
        """As `of_views`. Raises ModelError unless all are finite."""
        found = self.of_views(samples, views)
        for view, logits in zip(views, found, strict=True):
            check_finite(logits, samples, self.split or f"view {view}")
        return found

    def fitted_encoding(self) -> tuple[dict[BlockId, Tensor], Encoding]:
        """The encoding asked for, fitted to the first rows of view 0; and the blocks that these
        are, float32 (n, C), so that nothing is computed twice.
        """
        job, order = self.job, self.job.row_order
        grid = block_grid(len(order), job.num_classes, job.config.block_rows)
        most = fit_rows(job.num_classes)
        blocks = {
            BlockId(0, block): self.finite_logits(order[grid.rows(block)], 0)
            for block in range(blocks_to_fit(grid, job.num_classes))
        }
        rows, labels = job.seen_rows(torch.cat([block[:most] for block in blocks.values()])[:most])
        return blocks, fit_encoding(job.config.encoding, rows, labels, job.config.budget)


def blocks_to_fit(grid: BlockGrid, num_classes: int) -> int:
    """How many blocks of view 0 an encoding is fitted to."""
    return -(-min(fit_rows(num_classes), grid.num_rows) // grid.block_rows)


def check_finite(logits: Tensor, samples: Tensor, where: str) -> None:
    """Raise ModelError unless all logits are finite. samples: int64 (n,), whose they are."""
    finite = torch.isfinite(logits).all(1)
    if not bool(finite.all()):
        first = int(finite.logical_not().nonzero()[0])
        raise ModelError(
            f"the teacher's logits are not finite: sample {int(samples[first])}, {where}",
            "Compute in --dtype float32, or check the weights and the normalisation.",
        )
