"""Photographs of differing sizes, streamed by workers through all three stages."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers import metrics, weights
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stages import train_student as stage
from stages.cache import LogitCache
from stages.cache_teacher import CacheConfig, TeacherSettings, cache_teacher, prepare
from stages.errors import IdentityError
from stages.inputs.cifar_models import cifar_model
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import pixel_probes
from stages.inputs.views import view_policy
from stages.train_student import StudentConfig, train_student
from stages.training.config import DataSettings, ModelSettings, TrainSettings
from stages.training.setup import Splits, load_data

# Two workers are what is tested, also where a container grants one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")

CLASSES, SAMPLES, VIEWS = 4, 240, 3
TEACHER_SIZE, STUDENT_SIZE = 48, 32
POLICY = "resized-crop-flip"


def jpeg(i: int, quality: int = 80, seed: int = 0) -> bytes:
    """Photograph i: blocks of noise around the colour of its class, of a size of its own."""
    random = np.random.default_rng([seed, i])
    height, width = random.integers(40, 120, 2)
    colour = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])[i % CLASSES]
    blocks = np.clip(colour + random.normal(0, 50, (6, 6, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(blocks).resize((int(width), int(height)), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


@pytest.fixture(scope="module")
def my_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 photographs for training and 40 for testing, in four classes."""
    root = tmp_path_factory.mktemp("photographs")
    for split, numbers in (("train", range(SAMPLES)), ("val", range(SAMPLES, SAMPLES + 40))):
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
    config = StudentConfig(
        cache=str(cache),
        data=msgspec.structs.replace(data(folder, workers), image_size=STUDENT_SIZE),
        model=ModelSettings(architecture="resnet8"),
        train=TrainSettings(epochs=2, batch_size=50, lr=0.05),
        device="cpu",
    )
    return msgspec.structs.replace(config, **changes)


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
    my_folder: Path, my_weights: Path, my_splits: Splits, tmp_path: Path, drawn: Drawn
) -> None:
    """Only the rendering differs. In one process, so that every box can be seen."""
    config = cache_config(my_folder, my_weights, workers=0)
    cache_teacher(prepare(config, my_splits), tmp_path / "cache.zarr")
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
        student_config(my_cache, my_folder, workers=0), tmp_path / "run", splits=my_splits
    )
    order = torch.arange(8)
    (batch,) = trainer.feed.batches(order, 1, 8)
    assert batch.pixels.shape == (8, 3, STUDENT_SIZE, STUDENT_SIZE)
    assert trainer.evaluations["test"].feed.image_size == STUDENT_SIZE
    assert LogitCache.open(my_cache).identity.teacher.image_size == TEACHER_SIZE


def test_without_a_size_the_student_takes_the_teachers(
    my_cache: Path, my_folder: Path, my_splits: Splits, tmp_path: Path
) -> None:
    config = student_config(my_cache, my_folder, data=data(my_folder, workers=0))
    trainer = stage.student_trainer(config, tmp_path / "run", splits=my_splits)
    assert trainer.feed.image_size == TEACHER_SIZE


def test_probes_are_of_the_teachers_size_and_checked_by_the_student(
    my_cache: Path,
    my_folder: Path,
    my_splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = LogitCache.open(my_cache)
    policy = stage.cached_policy(cache)
    assert cache.pixel_probes == pixel_probes(my_splits.train, policy, TEACHER_SIZE)
    assert cache.pixel_probes != pixel_probes(my_splits.train, policy, STUDENT_SIZE)
    asked: list[int | None] = []

    def spy(dataset: ImageDataset, policy: Any, image_size: int | None) -> list[int]:
        asked.append(image_size)
        return pixel_probes(dataset, policy, image_size)

    monkeypatch.setattr(stage, "pixel_probes", spy)
    stage.student_trainer(student_config(my_cache, my_folder), tmp_path / "run", splits=my_splits)
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

Arrays = Callable[[Path], dict[str, bytes]]


def test_workers_change_nothing(
    my_cache: Path,
    my_folder: Path,
    my_weights: Path,
    my_splits: Splits,
    array_bytes: Arrays,
    tmp_path: Path,
) -> None:
    """Two processes decoded what one does here; the arrays and a student's weights are equal."""
    alone = cache_config(my_folder, my_weights, workers=0)
    cache_teacher(prepare(alone, my_splits), tmp_path / "cache.zarr")
    assert array_bytes(tmp_path / "cache.zarr") == array_bytes(my_cache)
    for workers in (0, 2):
        config = student_config(my_cache, my_folder, workers)
        train_student(config, tmp_path / f"run{workers}", splits=my_splits)
    one, two = (weights(tmp_path / f"run{workers}") for workers in (0, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
