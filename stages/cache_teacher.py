"""Stage one: run the teacher once, keep its logits for every view of every sample.

    pipeline cache-teacher --dataset digits --weights runs/teacher --views 25 \\
        --augment pad-crop:pad=2 --out digits.zarr

Blocks are computed one after another, each in the same batches whatever was done before, and
written by another thread meanwhile. Running the same command again computes what is missing.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.commits import Record
from stages.cache.encoding import (
    FIT_ROWS,
    Encoding,
    check_encoding,
    fit_encoding,
    is_encoding,
)
from stages.cache.identity import (
    Identity,
    TeacherIdentity,
    ViewsIdentity,
    differences,
    weights_digest,
)
from stages.cache.layout import MAX_BLOCK_ROWS, block_grid
from stages.cache.location import location
from stages.cache.lock import exclusive, half_written
from stages.cache.writer import BackgroundWriter
from stages.device import autocast, choose_device, device_name, place, versions
from stages.errors import CacheError, IdentityError, ModelError, ViewError
from stages.inputs.counter_hash import permute
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Normalise, ViewFeed, pixel_probes, plain_view
from stages.inputs.models import Model, load_model, logits_of
from stages.inputs.views import ViewPolicy
from stages.reporting import Reporter, Silent
from stages.training.config import DataSettings, Dtype, Settings, positive, within
from stages.training.setup import (
    Splits,
    check_output,
    chosen_policy,
    dataset_identity,
    load_data,
    normalisation,
)

_ROW_ORDER = 4  # a stream of the view seed, apart from those of training


class TeacherSettings(Settings, frozen=True):
    """architecture may be None where the weights are a run directory. mean, std, image_size: None
    for the weights' own, or the dataset's.
    """

    weights: str
    architecture: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None


class CacheConfig(Settings, frozen=True):
    """A run of cache-teacher. seed: of the views. dtype: of the teacher's forward pass.

    encoding: a name, with parameters after a colon (`topk:k=20`). max_kl: mean KL to the exact rows
    at T=1, in nats, that the encoding must hold; with `auto` the smallest that does is taken.
    """

    data: DataSettings
    teacher: TeacherSettings
    views: int
    augment: str = "pad-crop-flip"
    seed: int = 0
    encoding: str = "auto"
    max_kl: float | None = None
    dtype: Dtype = "float32"
    batch_size: int = 512
    block_rows: int = MAX_BLOCK_ROWS
    channels_last: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        positive("views", self.views)
        within("seed", self.seed, -(2**63), 2**63 - 1)
        positive("batch_size", self.batch_size)
        positive("block_rows", self.block_rows)
        check_encoding(self.encoding)
        if self.max_kl is not None:
            positive("max_kl", self.max_kl)


@dataclass(frozen=True)
class CacheJob:
    """Everything stage one needs, loaded and checked; make it with `prepare`."""

    config: CacheConfig
    splits: Splits
    policy: ViewPolicy
    image_size: int | None
    model: Model
    normalise: Normalise
    identity: Identity
    device: torch.device

    @property
    def num_classes(self) -> int:
        return len(self.splits.train.class_names)

    def feed(self, dataset: ImageDataset, policy: ViewPolicy) -> ViewFeed:
        return ViewFeed(dataset, policy, self.device, self.image_size, self.config.data.workers)


@dataclass(frozen=True)
class CacheSummary:
    """What a run leaves: how many blocks it computed, and the teacher's top-1 in [0, 1]."""

    computed_blocks: int
    views: int
    train_top1: list[float]
    test_top1: float


def prepare(config: CacheConfig, splits: Splits | None = None) -> CacheJob:
    """Load dataset and teacher and check that they belong together.

    Raises DatasetError, ModelError, ViewError or ConfigError.
    """
    splits = splits or load_data(config.data)
    train, device = splits.train, choose_device(config.device)
    classes = len(train.class_names)
    teacher = config.teacher
    model = load_model(teacher.architecture, teacher.weights, classes, train.shape[0])
    image_size = teacher.image_size or config.data.image_size or model.image_size
    policy = chosen_policy(config.augment, config.seed, image_size, config.data.resize)
    if policy.count is not None and config.views > policy.count:
        raise ViewError(
            f"view policy '{config.augment}' has {policy.count} distinct view(s), "
            f"{config.views} were asked for",
            f"Give --views {policy.count}, which is every view there is, or another --augment.",
        )
    mean, std = normalisation(model, train, teacher.mean, teacher.std)
    identity = Identity(
        teacher=TeacherIdentity(
            model.architecture, weights_digest(model.module.state_dict()), mean, std, image_size
        ),
        dataset=dataset_identity(train),
        views=ViewsIdentity(policy.name, policy.parameters, policy.version, policy.seed),
        compute_dtype=config.dtype,
    )
    cpu = torch.device("cpu")
    check_output(
        model,
        Normalise(mean, std, model.channels, cpu, channels_last=False),
        ViewFeed(train, policy, cpu, image_size, workers=0),
        classes,
    )
    place(model.module, device, config.channels_last).eval()
    normalise = Normalise(mean, std, model.channels, device, config.channels_last)
    return CacheJob(config, splits, policy, image_size, model, normalise, identity, device)


def cache_teacher(job: CacheJob, out: str | Path, reporter: Reporter | None = None) -> CacheSummary:
    """Make the cache at `out`, or complete it, or append views to it.

    Raises IdentityError if it was made from something else, CacheError if it cannot be written.
    """
    reporter, where = reporter or Silent(), location(out)
    if isinstance(where, Path):
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"cannot make {out}: {error.strerror}", "Choose another --out."
            ) from error
    with exclusive(where):
        # 1) the store, its encoding fitted to the first rows; and what is missing in it
        feed, cache = job.feed(job.splits.train, job.policy), open_existing(job, out)
        progress = _Progress(reporter, job.config.views * len(job.splits.train))
        first: dict[tuple[int, int], Tensor] = {}
        if cache is None:
            first, coding = fitted_encoding(job, feed, progress)
            cache = _create(job, out, coding)
        for leftover in half_written(where):
            leftover.unlink()
        cache.grow(job.config.views)
        missing = missing_blocks(cache, job.config.views)
        if done := job.config.views * cache.grid.num_blocks - len(missing):
            reporter.say(f"{done} blocks are there already, {len(missing)} are missing")
            progress = _Progress(reporter, sum(cache.grid.length(b) for _, b in missing))

        # 2) the training views, block by block
        record: Record = {"device": device_name(job.device), "versions": versions()}
        with BackgroundWriter(functools.partial(_write_block, cache, record)).running() as writer:
            for view, block in missing:
                logits = first.pop((view, block), None)
                if logits is None:
                    samples = cache.dataset_index[cache.grid.rows(block)]
                    logits = checked_logits(job, feed, samples, view, progress)
                writer.put((view, block, logits))
        feed.close()
        cache.write_fidelity()

        # 3) the test split
        if not cache.eval_commits.is_complete(0):
            _cache_test_split(job, cache, record)
        for commits in (cache.commits, cache.eval_commits):
            commits.compact_rest()

        # 4) how good the teacher is
        logits, labels = cache.eval_logits()
        return CacheSummary(
            computed_blocks=len(missing),
            views=len(cache.complete_views),
            train_top1=[cache.top1(view) for view in cache.complete_views],
            test_top1=float((logits.argmax(1) == labels).double().mean()),
        )


def row_order(job: CacheJob) -> Tensor:
    """int64 (N,): the sample of each row, a keyed permutation."""
    samples = len(job.splits.train)
    return permute(torch.arange(samples), samples, job.config.seed, _ROW_ORDER)


def fitted_encoding(
    job: CacheJob, feed: ViewFeed, progress: Callable[[int], None] = lambda rows: None
) -> tuple[dict[tuple[int, int], Tensor], Encoding]:
    """The encoding asked for, fitted to the first rows of view 0; and the blocks that these are,
    (view, block) -> float32 (n, C), so that nothing is computed twice.
    """
    order, labels = row_order(job), job.splits.train.labels
    grid = block_grid(len(order), job.num_classes, job.config.block_rows)
    needed = -(-min(FIT_ROWS, len(order)) // grid.block_rows)
    blocks = {
        (0, block): checked_logits(job, feed, order[grid.rows(block)], 0, progress)
        for block in range(needed)
    }
    rows = torch.cat(list(blocks.values()))[:FIT_ROWS]
    coding = fit_encoding(job.config.encoding, rows, labels[order[: len(rows)]], job.config.max_kl)
    return blocks, coding


def open_existing(job: CacheJob, out: str | Path) -> LogitCache | None:
    """The cache at `out` if there is one. Raises IdentityError if it was made otherwise."""
    if not LogitCache.exists(out):
        return None
    cache = LogitCache.open(out, writable=True)
    if differing := differences(job.identity, cache.identity):
        raise IdentityError(
            f"{out} was made from something else: {'; '.join(differing[:3])}",
            "Use the settings it was made with, or another --out.",
        )
    if not is_encoding(job.config.encoding, cache.encoding):
        known = ", ".join(f"{k}={v}" for k, v in cache.encoding.parameters.items())
        raise IdentityError(
            f"{out} is encoded as {cache.encoding.name}{f' ({known})' if known else ''}, "
            f"not {job.config.encoding}",
            "Leave --encoding out, or choose another --out.",
        )
    budget, fidelity = job.config.max_kl, cache.fidelity
    if budget is not None and fidelity is not None and not fidelity.holds(budget):
        raise IdentityError(
            f"{out} holds a mean KL of {fidelity.mean_kl[0]:.2g} at T=1, not {budget:g}",
            "Leave --max-kl out, or choose another --out.",
        )
    return cache


def missing_blocks(cache: LogitCache, views: int) -> list[tuple[int, int]]:
    """The (view, block) pairs of the first `views` views that are not committed, in order."""
    every = ((v, b) for v in range(views) for b in range(cache.grid.num_blocks))
    return [pair for pair in every if pair not in cache.commits.records]


@torch.inference_mode()
def teacher_logits(
    job: CacheJob,
    feed: ViewFeed,
    samples: Tensor,
    view: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """The teacher's float32 logits (n, C) for one view of some samples, on its device."""
    logits = torch.empty((len(samples), job.num_classes), device=job.device)
    start = 0
    for batch in feed.batches(samples, view, job.config.batch_size):
        with autocast(job.device, job.config.dtype):
            output = logits_of(job.model.module(job.normalise(batch.pixels)))
        logits[start : start + len(output)] = output.float()
        start += len(output)
        progress(len(output))
    return logits


# ---- details --------------------------------------------------------------------------------


def checked_logits(
    job: CacheJob,
    feed: ViewFeed,
    samples: Tensor,
    view: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """As `teacher_logits`, on the CPU. Raises ModelError unless all are finite."""
    logits = teacher_logits(job, feed, samples, view, progress).cpu()
    check_finite(logits, samples, f"view {view}")
    return logits


class _Progress:
    def __init__(self, reporter: Reporter, total: int) -> None:
        self._reporter, self._total, self._done = reporter, total, 0

    def __call__(self, rows: int) -> None:
        self._done += rows
        self._reporter.progress("teacher pass", self._done, self._total, "samples")


def _create(job: CacheJob, out: str | Path, coding: Encoding) -> LogitCache:
    config, train = job.config, job.splits.train
    return LogitCache.create(
        out,
        identity=job.identity,
        coding=coding,
        num_views=config.views,
        dataset_index=row_order(job),
        labels=train.labels,
        eval_labels=job.splits.test.labels,
        pixel_probes=pixel_probes(train, job.policy, job.image_size),
        provenance=_provenance(job),
        block_rows=config.block_rows,
    )


def _provenance(job: CacheJob) -> dict[str, object]:
    """What was used and does not decide which numbers are right."""
    return {
        "config": msgspec.to_builtins(job.config),
        "device": device_name(job.device),
        "versions": versions(),
    }


def _write_block(cache: LogitCache, record: Record, computed: tuple[int, int, Tensor]) -> None:
    view, block, logits = computed
    cache.write_block(view, block, logits, logits.argmax(1), record)


def _cache_test_split(job: CacheJob, cache: LogitCache, record: Record) -> None:
    feed = job.feed(job.splits.test, plain_view(job.image_size, job.config.data.resize))
    samples = torch.arange(len(job.splits.test))
    logits = teacher_logits(job, feed, samples, 0).cpu()
    feed.close()
    check_finite(logits, samples, "the test split")
    cache.write_eval_logits(logits, record)


def check_finite(logits: Tensor, samples: Tensor, where: str) -> None:
    finite = torch.isfinite(logits).all(1)
    if not bool(finite.all()):
        first = int(finite.logical_not().nonzero()[0])
        raise ModelError(
            f"the teacher's logits are not finite: sample {int(samples[first])}, {where}",
            "Compute in --dtype float32, or check the weights and the normalisation.",
        )
