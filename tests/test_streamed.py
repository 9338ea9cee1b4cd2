"""Photographs of differing sizes, streamed by workers through all three stages."""

import io
import multiprocessing
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from helpers import AtBatch, metrics, same_weights, student_of, terminate
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.targets import ViewTargets
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits, cached_policy, load_data
from stages.errors import IdentityError, RunError
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
from stages.train_student import student_trainer, train_student
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
    known: dict[Any, list[int]] = {}

    def remembered(dataset: ImageDataset, policy: Any, image_size: int | None = None) -> list[int]:
        key = (id(dataset.load), image_size)
        if key not in known:
            known[key] = pixel_probes(dataset, policy, image_size)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.inputs.probes.pixel_probes", remembered)
        yield


class World(NamedTuple):
    """120 photographs for training and 20 for testing, in four classes, and a cache of them."""

    folder: Path
    splits: Splits
    config: CacheConfig
    cache: Path

    def student(self, workers: int = 2, **changes: Any) -> StudentConfig:
        train = TrainSettings(epochs=2, batch_size=25, lr=0.05)
        sized = data(self.folder, workers, image_size=STUDENT_SIZE)
        return student_of(self.cache, **{"data": sized, "train": train, **changes})

    def trainer(self, config: StudentConfig, out: Path, **ways: bool) -> Any:
        return student_trainer([config], [RunDirectory(out, **ways)], self.splits)


def data(folder: Path, workers: int = 2, **more: Any) -> DataSettings:
    return DataSettings(dataset=f"folder:{folder}", feeding="stream", workers=workers, **more)


def write(root: Path, split: str, numbers: range, content: Callable[[int], bytes] = jpeg) -> None:
    for i in numbers:
        path = root / split / f"class{i % CLASSES}" / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(i))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Six blocks a view. The teacher is a resnet8 that has learned nothing yet; its logits differ
    from image to image.
    """
    root = tmp_path_factory.mktemp("photographs")
    write(root / "images", "train", range(SAMPLES))
    write(root / "images", "val", range(SAMPLES, SAMPLES + 20))
    torch.manual_seed(3)
    weights = root / "teacher.safetensors"
    save_file(cifar_model("resnet8", CLASSES, 3).state_dict(), weights)
    config = CacheConfig(
        data=data(root / "images"),
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
    splits = load_data(config.data)
    cache_teacher(prepare(config, splits), root / "cache.zarr")
    return World(root / "images", splits, config, root / "cache.zarr")


Drawn = dict[tuple[int, int], tuple[int, ...]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Every box of the policy that is drawn, by (sample, view)."""
    kind, seen = type(view_policy(POLICY)), Drawn()
    draw = kind.draw

    def spy(policy: Any, samples: Tensor, view: int | Tensor, *sizes: Tensor) -> Any:
        boxes = draw(policy, samples, view, *sizes)
        views = torch.as_tensor(view).expand(len(samples)).tolist()
        corners = (boxes.top, boxes.left, boxes.height, boxes.width, boxes.mirrored)
        pairs = zip(samples.tolist(), views, strict=True)
        for pair, box in zip(pairs, torch.stack(corners, 1).tolist(), strict=True):
            assert seen.setdefault(pair, tuple(box)) == tuple(box)
        return boxes

    monkeypatch.setattr(kind, "draw", spy)
    return seen


def test_teacher_and_student_look_at_the_same_crops(
    world: World, array_bytes: Callable[[Path], dict[str, bytes]], tmp_path: Path, drawn: Drawn
) -> None:
    """Only the rendering differs. In one process, so that every box can be seen: its cache is that
    of two workers.
    """
    config = msgspec.structs.replace(world.config, data=data(world.folder, workers=0))
    cache_teacher(prepare(config, world.splits), tmp_path / "cache.zarr")
    assert array_bytes(tmp_path / "cache.zarr") == array_bytes(world.cache)
    every_pair = {(sample, view) for sample in range(SAMPLES) for view in range(VIEWS)}
    assert every_pair <= drawn.keys()
    by_teacher = dict(drawn)
    drawn.clear()
    train_student(world.student(workers=0), tmp_path / "run", splits=world.splits)
    shown = {line["view"] for line in metrics(tmp_path / "run")}
    assert len(shown) == 2
    assert {(s, v) for s, v in every_pair if v in shown} <= drawn.keys()
    assert all(drawn[pair] == by_teacher[pair] for pair in drawn.keys() & by_teacher.keys())


def test_each_model_sees_its_own_size(world: World, tmp_path: Path) -> None:
    stream = world.trainer(world.student(workers=0), tmp_path / "run").stream
    (batch,) = stream.feed.batches(torch.arange(8), 1, 8)
    assert batch.pixels.shape == (8, 3, STUDENT_SIZE, STUDENT_SIZE)
    assert stream.evaluations["test"].feed.image_size == STUDENT_SIZE
    assert LogitCache.open(world.cache).identity.teacher.image_size == TEACHER_SIZE
    unsized = world.student(data=data(world.folder, workers=0))
    assert world.trainer(unsized, tmp_path / "two").stream.feed.image_size == TEACHER_SIZE


def test_probes_are_of_the_teachers_size(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, train = LogitCache.open(world.cache), world.splits.train
    policy, asked = cached_policy(cache), list[int | None]()
    assert cache.pixel_probes == pixel_probes(train, policy, TEACHER_SIZE)
    assert cache.pixel_probes != pixel_probes(train, policy, STUDENT_SIZE)

    def spy(dataset: ImageDataset, policy: Any, image_size: int | None) -> list[int]:
        asked.append(image_size)
        return cache.pixel_probes

    monkeypatch.setattr("stages.inputs.probes.pixel_probes", spy)
    world.trainer(world.student(), tmp_path / "run")
    assert asked == [TEACHER_SIZE]


def test_other_pixels_in_files_of_the_same_size_are_refused(world: World, tmp_path: Path) -> None:
    """Paths and sizes say nothing; the probes do. What follows a JPEG's end is not read."""
    write(tmp_path, "train", range(40), lambda i: jpeg(i, quality=20).ljust(len(jpeg(i)), b"\0"))
    write(tmp_path, "train", range(40, SAMPLES))
    (tmp_path / "val").symlink_to(world.folder / "val")
    with pytest.raises(IdentityError, match=r"of 256 pixel probes of .* differ"):
        train_student(world._replace(folder=tmp_path).student(), tmp_path / "run")


def test_workers_are_gone_when_a_run_ends(world: World, tmp_path: Path) -> None:
    """Also where it was stopped; and a feed that is used again has workers again."""
    before = set(multiprocessing.active_children())
    trainer = world.trainer(world.student(), tmp_path / "run")
    trainer.reporter = AtBatch(3, terminate)
    with pytest.raises(RunError, match="SIGTERM"):
        trainer.fit()
    assert set(multiprocessing.active_children()) <= before
    (batch,) = trainer.stream.feed.batches(torch.arange(4), 0, 4)
    assert len(batch.samples) == 4
    trainer.stream.feed.close()
    assert set(multiprocessing.active_children()) <= before


TIGHT = "6kB"
"""Two of a view's six chunks at a time, and two to come."""


@pytest.fixture(scope="module")
def tight(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[Tensor]]:
    """A whole run of two epochs of five batches each, in three groups of 40 samples, read by two
    workers. Each batch learns from the rows that the whole view has for it. Its directory, its
    stream, and the samples of its batches.
    """
    run = tmp_path_factory.mktemp("tight") / "run"
    trainer, cache = world.trainer(world.student(slab_memory=TIGHT), run), world.cache
    task, shown, views = trainer.learner.task, list[Tensor](), list[int]()
    loss_parts, start = task.loss_parts, task.start_epoch

    def compare(logits: Tensor, batch: Any) -> Any:
        whole, asked = LogitCache.open(cache).read_view(views[-1]), batch.samples
        for _ in range(2):  # any question, any number of times
            assert torch.equal(task.targets.rows(asked), whole.rows(asked))
            assert torch.equal(task.targets.wrong(asked), whole.wrong(asked))
            assert task.targets.kept(asked) is None
        shown.append(asked)
        return loss_parts(logits, batch)

    def start_epoch(epoch: int) -> Any:
        views.extend(start(epoch))
        return (views[-1],)

    task.loss_parts, task.start_epoch = compare, start_epoch
    trainer.fit()
    return run, trainer.stream, shown


def test_groups_show_every_sample_once(world: World, tight: tuple[Path, Any, list[Tensor]]) -> None:
    cache, (_, stream, shown) = LogitCache.open(world.cache), tight
    assert len(shown) == 2 * 5
    for epoch in range(2):
        order = torch.cat(shown[5 * epoch : 5 * epoch + 5])
        assert torch.equal(order.sort().values, torch.arange(SAMPLES))
        assert torch.equal(order, stream.order(torch.arange(SAMPLES), 0, epoch))
        chunks = cache.row_of[order] // cache.grid.chunk_rows
        assert [len(set(part.tolist())) for part in chunks.split(40)] == [2, 2, 2]
        assert len(set(chunks.tolist())) == 6


def test_the_baseline_sees_the_same_order(world: World, tmp_path: Path) -> None:
    streams = [
        world.trainer(
            world.student(0, slab_memory=TIGHT, loss=LossSettings(name=name)), tmp_path / "run"
        ).stream
        for name in ("kd", "ce")
    ]
    samples = torch.arange(SAMPLES)
    for epoch in range(2):
        one, other = (stream.order(samples, 0, epoch) for stream in streams)
        assert torch.equal(one, other)
        assert not torch.equal(one, sample_order(samples, 0, epoch))  # it goes by groups


def test_a_run_in_groups_resumes_exactly(
    world: World, tight: tuple[Path, Any, list[Tensor]], tmp_path: Path
) -> None:
    """Stopped within a group, and before a batch across two groups. In one process, to the weights
    of the run with two workers.
    """
    config, out = world.student(0, slab_memory=TIGHT), tmp_path / "run"
    for batches in (2, 6):
        trainer = world.trainer(config, out, resume=True)
        trainer.reporter = AtBatch(batches, terminate)
        with pytest.raises(RunError, match="SIGTERM"):
            trainer.fit()
    train_student(config, out, resume=True, splits=world.splits)
    assert same_weights(out, tight[0])


def test_memory_is_bounded(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every read, what is alive of this and earlier slabs is within the budget."""
    alive, resident = list[weakref.ref[Tensor]](), list[int]()
    read_view = LogitCache.read_view

    def counted(cache: LogitCache, *which: Any) -> ViewTargets:
        targets = read_view(cache, *which)
        held = [*targets.arrays.values(), targets.predictions, targets.labels, targets.row_of]
        alive.extend(weakref.ref(tensor) for tensor in held)
        tensors = [tensor for reference in alive if (tensor := reference()) is not None]
        resident.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        return targets

    monkeypatch.setattr(LogitCache, "read_view", counted)
    train = TrainSettings(epochs=2, batch_size=12)
    config = world.student(0, slab_memory=TIGHT, train=train)
    train_student(config, tmp_path / "run", splits=world.splits)
    assert len(resident) == 2 * 3
    one_group = 40 * (LogitCache.open(world.cache).row_bytes - 8) + 8 * (40 + SAMPLES)
    assert max(resident) <= 2 * one_group <= parse_bytes(TIGHT, "")
    assert max(resident) > one_group  # the next group is read ahead
