"""A finished run on the test split: how good, how confident, and where it beats its teacher.

    pipeline evaluate runs/kd --cache digits.zarr

Everything is measured on the clean view, with the weights of the selected epoch, in the precision
of the run: top-1 is what its metrics.jsonl has for that epoch. The teacher is never loaded: its
logits and predictions of the test split lie in the cache. Several caches are averaged in
probability, as a student of several was trained.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.data import skips_of
from stages.device import choose_device, forward, place
from stages.errors import (
    CacheError,
    DatasetError,
    IdentityError,
    ModelError,
    RunError,
    UnansweredError,
)
from stages.inputs.datasets import ImageDataset, Skip, load_dataset, read_skip_list
from stages.inputs.feed import Normalise, ViewFeed, plain_view
from stages.inputs.model_outputs import check_output, output_order, sample_pixels
from stages.inputs.models import Model, load_model
from stages.inputs.run_files import read_config, read_summary
from stages.reporting import Reporter, Silent
from stages.scores import ClassScore, Comparison, Scores, class_scores, compare, score
from stages.settings import DataSettings, TrainSettings
from stages.targets.ensemble import mean_logits
from stages.user_code import check_trusted

_SMALLEST_BATCH = 256


class Evaluated(msgspec.Struct, frozen=True):
    """What `evaluate_run` found. recorded_top1: of the same epoch, by the run itself; None where it
    has not finished, or was measured on other data.
    """

    run: str
    dataset: str
    samples: int
    scores: Scores
    recorded_top1: float | None
    classes: tuple[ClassScore, ...]
    comparison: Comparison | None = None


@dataclass(frozen=True)
class OtherImages:
    """Where the test split is, if not where the run had it. None is the run's own. skip: a file
    that names samples to leave out.
    """

    dataset: str | None = None
    root: str | None = None
    download: bool = False
    skip: str | None = None


def evaluate_run(
    run: str | Path,
    other: OtherImages | None = None,
    caches: Sequence[str] = (),
    batch_size: int | None = None,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> Evaluated:
    """Measure a run on the test split. Images that the caches of the run's own dataset leave out
    are left out here.

    caches: the teacher's; empty for those that a student's run names, if they can be opened.
    Raises RunError for what is no finished run, ModelError or DatasetError where weights and images
    do not belong together, IdentityError where a cache given is of another test split.
    """
    other, reporter = other or OtherImages(), reporter or Silent()
    # 1) the run, its images, its weights
    settings = _read_run(Path(run))
    own = other.dataset in (None, settings.data.eval_dataset or settings.data.dataset)
    images = _test_images(run, settings, other, (caches or settings.caches) if own else ())
    for note in images.notes:
        reporter.say(note)
    try:
        model = load_model(None, str(run), len(images.class_names), images.shape[0])
        output_order(model.classes, images.class_names, None, str(run))
    except ModelError as error:
        if own:
            raise
        raise ModelError(
            f"{run} was trained on {settings.data.dataset}, {other.dataset} does not fit: "
            f"{error.cause}",
            "Give the same images, or leave --dataset out.",
        ) from error
    labels = images.labels[images.shown]

    # 2) every test sample once; the teacher's answers to the same samples
    size = batch_size or max(_SMALLEST_BATCH, settings.train.batch_size)
    logits = _test_logits(model, images, settings, size, choose_device(device), reporter)
    teacher, used = _teacher_of(images, caches, settings.caches, reporter)
    theirs = None if teacher is None else teacher[1]

    # 3) what they are worth
    return Evaluated(
        run=str(run),
        dataset=images.name,
        samples=len(labels),
        scores=score(logits, labels),
        recorded_top1=_recorded_top1(Path(run)) if own else None,
        classes=class_scores(images.class_names, labels, logits.argmax(1), theirs),
        comparison=None if teacher is None else compare(logits, teacher, labels, used),
    )


# ---- the run --------------------------------------------------------------------------------


def _test_images(
    run: str | Path, settings: "_Run", other: OtherImages, caches: Sequence[str]
) -> ImageDataset:
    """Raises DatasetError. caches: those whose skipped samples are left out."""
    data = settings.data
    name = data.eval_dataset or data.dataset
    if other.dataset is None:
        check_trusted(f"run {run}", name=name)
    own = other.dataset in (None, name)
    held = data.test if own else None  # what the run was tested on
    if other.dataset is not None and held == "none":
        held = None
    try:
        images = load_dataset(
            other.dataset or name,
            "test",
            test=held,
            exif=data.exif,
            jpeg_side=data.jpeg_side,
            decoder=data.decoder,
            root=other.root or data.root,
            feeding=data.feeding,
            download=other.download or data.download,
            skips=_skips(other.skip or (data.skip if own else None), caches),
        )
        if not len(images):
            raise DatasetError(
                f"{run} has no test split", "Name a dataset that has one: --dataset."
            )
        return images
    except DatasetError as error:
        if other.dataset is not None or other.root is not None:
            raise
        raise DatasetError(
            f"the images that {run} names cannot be read from here: {error.cause}",
            "Say where they are now: --dataset or --root.",
        ) from error


def _skips(file: str | None, caches: Sequence[str]) -> list[Skip]:
    """What a list and these caches leave out; caches that cannot be opened are reported later."""
    opened = []
    for path in caches:
        with contextlib.suppress(CacheError, UnansweredError):
            opened.append(LogitCache.open(path).skips)
    return [*skips_of(opened), *([] if file is None else read_skip_list(file))]


@dataclass(frozen=True)
class _Run:
    """What config.yaml says that evaluation needs. caches: those a student learned from."""

    data: DataSettings
    train: TrainSettings
    caches: tuple[str, ...]


def _read_run(path: Path) -> _Run:
    config = read_config(path)
    try:
        data = msgspec.convert(config["data"], DataSettings)
        train = msgspec.convert(config["train"], TrainSettings)
        caches = (config["cache"], *config.get("also", ())) if "cache" in config else ()
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} is not a run directory: {' '.join(str(error).split())}",
            "Give the --out of train-teacher or train-student.",
        ) from error
    if not (path / "model.safetensors").exists():
        raise RunError(
            f"{path} has no weights yet", "They are written after the first epoch: --resume it."
        )
    return _Run(data, train, caches)


def _recorded_top1(path: Path) -> float | None:
    try:
        return float((read_summary(path) or {})["selected"]["test_top1"])
    except (ValueError, KeyError, TypeError):
        return None


@torch.inference_mode()
def _test_logits(
    model: Model,
    images: ImageDataset,
    run: _Run,
    batch_size: int,
    device: torch.device,
    reporter: Reporter,
) -> Tensor:
    """float32 (N, C) on the CPU, of the clean view of every sample. Raises ModelError."""
    assert model.statistics is not None  # a run directory brings them
    policy = plain_view(model.image_size, run.data.resize)
    feed = ViewFeed(images, policy, device, model.image_size, run.data.workers)
    pixels = sample_pixels(images, policy, model.image_size)
    normalise = Normalise(*model.statistics, model.channels, pixels.device, channels_last=False)
    check_output(model, pixels, normalise, len(images.class_names))
    module = place(model.module, device, run.train.channels_last).eval()
    normalise = Normalise(*model.statistics, model.channels, device, run.train.channels_last)
    parts, done = [], 0
    try:
        for batch in feed.batches(images.shown, 0, batch_size):
            parts.append(forward(module, normalise(batch.pixels), run.train.dtype).cpu())
            done += len(batch.samples)
            reporter.progress("test split", done, len(images.shown), "images")
    finally:
        feed.close()
    return torch.cat(parts)


# ---- the teacher ----------------------------------------------------------------------------


def _teacher_of(
    images: ImageDataset, given: Sequence[str], named: Sequence[str], reporter: Reporter
) -> tuple[tuple[Tensor, Tensor] | None, Sequence[str]]:
    """The teacher's logits float32 (N, C) and predictions int64 (N,), and the caches they are from;
    None where only the run names caches, and these are gone or of other images.
    """
    paths = given or named
    if not paths:
        return None, ()
    try:
        members = [_cached_logits(path, images) for path in paths]
        if len(members) == 1:
            return members[0], paths
        together = mean_logits([logits for logits, _ in members])
        return (together, together.argmax(1)), paths
    except (CacheError, UnansweredError) as error:
        if given:
            raise
        reporter.say(f"not compared with the teacher: {error.cause}; name its cache with --cache")
        return None, ()


def _cached_logits(path: str, images: ImageDataset) -> tuple[Tensor, Tensor]:
    """Raises IdentityError unless the cache has logits of this very test split."""
    cache = LogitCache.open(path)
    logits, labels = cache.eval_logits()
    same_classes = cache.identity.dataset.class_names == images.class_names
    if not (same_classes and torch.equal(labels, images.labels)):
        what = "labels" if same_classes else "classes"
        raise IdentityError(
            f"the test split of {path} has other {what} than that of {images.name}",
            "Give the dataset that the cache was made from, or another --cache.",
        )
    return logits[images.shown], cache.eval_predictions()[images.shown]
