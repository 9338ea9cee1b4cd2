"""Photographs of differing sizes, streamed by workers through all three stages."""

import io
import multiprocessing
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers import (
    AtBatch,
    SeenBatch,
    metrics,
    same_weights,
    seen_batches,
    student_of,
    terminate,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stages import train_student as stage
from stages.cache import LogitCache
from stages.cache.targets import ViewTargets
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits, cached_policy, load_data
from stages.errors import ConfigError, IdentityError, RunError
from stages.inputs.cifar_models import cifar_model
from stages.inputs.datasets import ImageDataset
from stages.inputs.probes import pixel_probes
from stages.inputs.views import view_policy
from stages.order import sample_order
from stages.settings import (
    CacheConfig,
    DataSettings,
    LossSettings,
    StudentConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.sizes import parse_bytes
from stages.train_student import train_student
from stages.training.run_directory import RunDirectory

# Two workers are what is tested, also where a container grants one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")

CLASSES, SAMPLES, VIEWS = 4, 120, 3
TEACHER_SIZE, STUDENT_SIZE = 24, 16
POLICY = "resized-crop-flip"


def jpeg(i: int, quality: int = 80, seed: int = 0) -> bytes:
    """Photograph i: blocks of noise around the colour of its class, of a size of its own."""
    random = np.random.default_rng([seed, i])
    height, width = random.integers(24, 60, 2)
    colour = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])[i % CLASSES]
    blocks = np.clip(colour + random.normal(0, 50, (6, 6, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(blocks).resize((int(width), int(height)), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


@pytest.fixture(scope="module", autouse=True)
def remembered_probes() -> Iterator[None]:
    """Probes of photographs take half the time of short runs: once a dataset and size is enough."""
    known: list[tuple[ImageDataset, int | None, list[int]]] = []

    def remembered(dataset: ImageDataset, policy: Any, image_size: int | None = None) -> list[int]:
        for before, size, probes in known:
            if before is dataset and size == image_size:
                return probes
        known.append((dataset, image_size, pixel_probes(dataset, policy, image_size)))
        return known[-1][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.inputs.probes.pixel_probes", remembered)
        yield


@pytest.fixture(scope="module")
def my_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 photographs for training and 20 for testing, in four classes."""
    root = tmp_path_factory.mktemp("photographs")
    for split, numbers in (("train", range(SAMPLES)), ("val", range(SAMPLES, SAMPLES + 20))):
        for i in numbers:
            path = root / split / f"class{i % CLASSES}" / f"{i:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i))
    return root


def data(folder: Path, workers: int = 2) -> DataSettings:
    return DataSettings(dataset=f"folder:{folder}", feeding="stream", workers=workers)


@pytest.fixture(scope="module")
def my_splits(my_folder: Path) -> Splits:
    return load_data(data(my_folder))


@pytest.fixture(scope="module")
def my_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a resnet8 that has learned nothing yet; its logits differ from image to image."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(cifar_model("resnet8", CLASSES, 3).state_dict(), path)
    return path


def cache_config(folder: Path, weights: Path, workers: int = 2) -> CacheConfig:
    """Six blocks a view."""
    return CacheConfig(
        data=data(folder, workers),
        teacher=TeacherSettings(
            architecture="resnet8", weights=str(weights), image_size=TEACHER_SIZE
        ),
        views=VIEWS,
        augment=POLICY,
        encoding="float32",
        batch_size=64,
        block_rows=SAMPLES // 6,
        device="cpu",
    )


@pytest.fixture(scope="module")
def my_cache(
    tmp_path_factory: pytest.TempPathFactory, my_folder: Path, my_weights: Path, my_splits: Splits
) -> Path:
    path = tmp_path_factory.mktemp("cache") / "photographs.zarr"
    cache_teacher(prepare(cache_config(my_folder, my_weights), my_splits), path)
    return path


def student_config(cache: Path, folder: Path, workers: int = 2, **changes: Any) -> StudentConfig:
    sized = msgspec.structs.replace(data(folder, workers), image_size=STUDENT_SIZE)
    train = TrainSettings(epochs=2, batch_size=25, lr=0.05)
    return student_of(cache, **{"data": sized, "train": train, **changes})


# ---- a teacher and a student of different input sizes ---------------------------------------


Drawn = dict[tuple[int, int], tuple[int, ...]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drawn]:
    """Every box of the policy that is drawn, by (sample, view)."""
    kind = type(view_policy(POLICY))
    seen: Drawn = {}
    draw = kind.draw

    def spy(policy: Any, samples: Tensor, view: int | Tensor, *sizes: Tensor) -> Any:
        boxes = draw(policy, samples, view, *sizes)
        views = torch.as_tensor(view).expand(len(samples)).tolist()
        corners = (boxes.top, boxes.left, boxes.height, boxes.width, boxes.mirrored)
        for pair, box in zip(
            zip(samples.tolist(), views, strict=True),
            torch.stack(corners, 1).tolist(),
            strict=True,
        ):
            assert seen.setdefault(pair, tuple(box)) == tuple(box)
        return boxes

    monkeypatch.setattr(kind, "draw", spy)
    return seen


def test_teacher_and_student_look_at_the_same_crops(
    my_cache: Path,
    my_folder: Path,
    my_weights: Path,
    my_splits: Splits,
    array_bytes: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
    drawn: Drawn,
) -> None:
    """Only the rendering differs. In one process, so that every box can be seen: its cache is that
    of two workers.
    """
    config = cache_config(my_folder, my_weights, workers=0)
    cache_teacher(prepare(config, my_splits), tmp_path / "cache.zarr")
    assert array_bytes(tmp_path / "cache.zarr") == array_bytes(my_cache)
    every_pair = {(sample, view) for sample in range(SAMPLES) for view in range(VIEWS)}
    assert every_pair <= drawn.keys()
    by_teacher = dict(drawn)
    drawn.clear()
    train_student(
        student_config(tmp_path / "cache.zarr", my_folder, workers=0),
        tmp_path / "run",
        splits=my_splits,
    )
    shown = {line["view"] for line in metrics(tmp_path / "run")}
    assert len(shown) == 2
    assert {(s, v) for s, v in every_pair if v in shown} <= drawn.keys()
    assert all(drawn[pair] == by_teacher[pair] for pair in drawn.keys() & by_teacher.keys())


def test_each_model_sees_its_own_size(
    my_cache: Path, my_folder: Path, my_splits: Splits, tmp_path: Path
) -> None:
    trainer = stage.student_trainer(
        [student_config(my_cache, my_folder, workers=0)],
        [RunDirectory(tmp_path / "run")],
        my_splits,
    )
    order = torch.arange(8)
    (batch,) = trainer.stream.feed.batches(order, 1, 8)
    assert batch.pixels.shape == (8, 3, STUDENT_SIZE, STUDENT_SIZE)
    assert trainer.stream.evaluations["test"].feed.image_size == STUDENT_SIZE
    assert LogitCache.open(my_cache).identity.teacher.image_size == TEACHER_SIZE
    unsized = student_config(my_cache, my_folder, data=data(my_folder, workers=0))
    trainer = stage.student_trainer([unsized], [RunDirectory(tmp_path / "two")], my_splits)
    assert trainer.stream.feed.image_size == TEACHER_SIZE


def test_probes_are_of_the_teachers_size_and_checked_by_the_student(
    my_cache: Path,
    my_folder: Path,
    my_splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = LogitCache.open(my_cache)
    policy = cached_policy(cache)
    assert cache.pixel_probes == pixel_probes(my_splits.train, policy, TEACHER_SIZE)
    assert cache.pixel_probes != pixel_probes(my_splits.train, policy, STUDENT_SIZE)
    asked: list[int | None] = []

    def spy(dataset: ImageDataset, policy: Any, image_size: int | None) -> list[int]:
        asked.append(image_size)
        return pixel_probes(dataset, policy, image_size)

    monkeypatch.setattr("stages.inputs.probes.pixel_probes", spy)
    stage.student_trainer(
        [student_config(my_cache, my_folder)], [RunDirectory(tmp_path / "run")], my_splits
    )
    assert asked == [TEACHER_SIZE]


def test_other_pixels_in_files_of_the_same_size_are_refused(
    my_cache: Path, my_folder: Path, tmp_path: Path
) -> None:
    """Paths and sizes say nothing; the probes do. What follows a JPEG's end is not read."""
    for i in range(SAMPLES):
        path = tmp_path / "train" / f"class{i % CLASSES}" / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = jpeg(i)
        other = jpeg(i, quality=20) if i < 40 else whole
        path.write_bytes(other.ljust(len(whole), b"\0"))
    (tmp_path / "val").symlink_to(my_folder / "val")
    with pytest.raises(IdentityError, match=r"of 256 pixel probes of .* differ"):
        train_student(student_config(my_cache, tmp_path), tmp_path / "run")


# ---- workers --------------------------------------------------------------------------------


def test_workers_are_gone_when_a_run_ends(
    my_cache: Path, my_folder: Path, my_splits: Splits, tmp_path: Path
) -> None:
    """Also where it was stopped; and a feed that is used again has workers again."""
    before = set(multiprocessing.active_children())
    config = student_config(my_cache, my_folder, workers=2)
    trainer = stage.student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits)
    trainer.reporter = AtBatch(3, terminate)
    with pytest.raises(RunError, match="SIGTERM"):
        trainer.fit()
    assert set(multiprocessing.active_children()) <= before
    (batch,) = trainer.stream.feed.batches(torch.arange(4), 0, 4)
    assert len(batch.samples) == 4
    trainer.stream.feed.close()
    assert set(multiprocessing.active_children()) <= before


# ---- bounded slab memory --------------------------------------------------------------------

TIGHT = "6kB"
"""Two of a view's six chunks at a time, and two to come."""


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[SeenBatch]:
    return seen_batches(monkeypatch)


@pytest.fixture(scope="module")
def my_tight(
    my_cache: Path, my_folder: Path, my_splits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A whole run of two epochs of five batches each, in three groups of 40 samples, read by two
    workers.
    """
    run = tmp_path_factory.mktemp("tight") / "run"
    config = student_config(my_cache, my_folder, slab_memory=TIGHT)
    train_student(config, run, splits=my_splits)
    return run


def test_an_epoch_in_groups_shows_every_sample_once(
    my_cache: Path, my_folder: Path, my_splits: Splits, tmp_path: Path, shown: Any
) -> None:
    """With two workers; each batch learns from the rows that the whole view has for it."""
    config = student_config(my_cache, my_folder, slab_memory=TIGHT)
    cache, views = LogitCache.open(my_cache), []
    trainer = stage.student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits)
    loss_parts = trainer.learner.task.loss_parts

    def compare(logits: Tensor, batch: Any) -> dict[str, Tensor]:
        targets = trainer.learner.task.targets  # type: ignore[attr-defined]
        whole = cache.read_view(views[-1])
        for _ in range(2):  # any question, any number of times
            assert torch.equal(targets.rows(batch.samples), whole.rows(batch.samples))
            assert torch.equal(targets.wrong(batch.samples), whole.wrong(batch.samples))
            assert targets.kept(batch.samples) is None
        return loss_parts(logits, batch)

    def start_epoch(epoch: int) -> tuple[int, ...]:
        shown_at_once = start(epoch)
        views.extend(shown_at_once)
        return shown_at_once

    start = trainer.learner.task.start_epoch
    trainer.learner.task.start_epoch = start_epoch  # type: ignore[method-assign]
    trainer.learner.task.loss_parts = compare  # type: ignore[method-assign]
    trainer.fit()
    assert len(shown) == 2 * 5
    for epoch in range(2):
        order = torch.cat([seen.samples for seen in shown[5 * epoch : 5 * epoch + 5]])
        assert torch.equal(order.sort().values, torch.arange(SAMPLES))
        assert torch.equal(order, trainer.stream.order(torch.arange(SAMPLES), 0, epoch))
        chunks = cache.row_of[order] // cache.grid.chunk_rows
        assert [len(set(part.tolist())) for part in chunks.split(40)] == [2, 2, 2]
        assert len(set(chunks.tolist())) == 6


def test_the_baseline_sees_the_same_order(
    my_cache: Path, my_folder: Path, my_splits: Splits, tmp_path: Path
) -> None:
    kd = student_config(my_cache, my_folder, 0, slab_memory=TIGHT)
    ce = msgspec.structs.replace(kd, loss=LossSettings(name="ce"))
    streams = [
        stage.student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits).stream
        for config in (kd, ce)
    ]
    samples = torch.arange(SAMPLES)
    for epoch in range(2):
        one, other = (stream.order(samples, 0, epoch) for stream in streams)
        assert torch.equal(one, other)
        assert not torch.equal(one, sample_order(samples, 0, epoch))  # it goes by groups


@pytest.mark.parametrize("batches", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5)), 8])
def test_a_run_in_groups_resumes_exactly(
    my_cache: Path,
    my_folder: Path,
    my_splits: Splits,
    my_tight: Path,
    tmp_path: Path,
    batches: int,
) -> None:
    """Stopped within a group, at the end of an epoch, and before a batch across two groups. In one
    process, to the weights of the run with two workers.
    """
    config = student_config(my_cache, my_folder, 0, slab_memory=TIGHT)
    trainer = stage.student_trainer([config], [RunDirectory(tmp_path / "run")], my_splits)
    trainer.reporter = AtBatch(batches, terminate)
    with pytest.raises(RunError, match="SIGTERM"):
        trainer.fit()
    train_student(config, tmp_path / "run", resume=True, splits=my_splits)
    assert same_weights(tmp_path / "run", my_tight)


def test_memory_is_bounded(
    my_cache: Path,
    my_folder: Path,
    my_splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At every read, what is alive of this and earlier slabs is within the budget."""
    alive: list[weakref.ref[Tensor]] = []
    resident: list[int] = []
    read_view = LogitCache.read_view

    def counted(cache: LogitCache, *which: Any) -> ViewTargets:
        targets = read_view(cache, *which)
        held = [*targets.arrays.values(), targets.predictions, targets.labels, targets.row_of]
        alive.extend(weakref.ref(tensor) for tensor in held)
        tensors = [tensor for reference in alive if (tensor := reference()) is not None]
        resident.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        return targets

    monkeypatch.setattr(LogitCache, "read_view", counted)
    config = student_config(
        my_cache, my_folder, 0, slab_memory=TIGHT, train=TrainSettings(epochs=2, batch_size=12)
    )
    train_student(config, tmp_path / "run", splits=my_splits)
    assert len(resident) == 2 * 3
    one_group = 40 * (LogitCache.open(my_cache).row_bytes - 8) + 8 * (40 + SAMPLES)
    assert max(resident) <= 2 * one_group <= parse_bytes(TIGHT, "")
    assert max(resident) > one_group  # the next group is read ahead


def test_too_little_memory(
    my_cache: Path, my_folder: Path, my_splits: Splits, tmp_path: Path
) -> None:
    config = student_config(my_cache, my_folder, slab_memory="3.5kB")
    with pytest.raises(ConfigError, match=r"3.5kB is too small.*\nGive --slab-memory 4.8kB"):
        train_student(config, tmp_path / "run", splits=my_splits)
    assert not (tmp_path / "run").exists()
    offered = student_config(my_cache, my_folder, 0, slab_memory="4.8kB")
    assert stage.student_trainer([offered], [RunDirectory(tmp_path / "run")], my_splits)
