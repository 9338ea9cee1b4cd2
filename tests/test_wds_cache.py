"""A cache of WebDataset shards: that of the same images in a folder, in another reading order."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers import members_of, student_of, write_shard
from PIL import Image
from safetensors.torch import save_file

from stages.cache import LogitCache
from stages.cache_teacher import CacheJob, cache_teacher, prepare
from stages.errors import ChangedImagesError, IdentityError
from stages.inputs.cifar_models import cifar_model
from stages.inputs.datasets.tar_reader import TarImages
from stages.repair import recorded_job
from stages.settings import (
    CacheConfig,
    DataSettings,
    StudentConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.teacher.logits import TeacherPass
from stages.teacher.memory import held_bytes
from stages.train_student import train_student
from stages.verify import verify_live

EACH, SHARDS = 8, 4


def picture(seed: int, side: int = 9) -> bytes:
    """Without compression, so that images of one shape have one size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, 10, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "BMP")
    return content.getvalue()


@dataclass(frozen=True)
class World:
    """Eight images of each of three classes, numbered as a folder lists them, in four shards and in
    a folder.
    """

    root: Path

    @property
    def spec(self) -> str:
        return f"wds:{self.root}/shards/a-{{0..{SHARDS - 1}}}.tar"

    def write(self, changed: dict[int, bytes] | None = None) -> None:
        images = {i: picture(i) for i in range(3 * EACH)} | (changed or {})
        for i, content in images.items():
            path = self.root / "folder" / str(i // EACH) / f"{i:04}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        paths = sorted((self.root / "folder").rglob("*.bmp"))
        for shard, some in enumerate(np.array_split(paths, SHARDS)):
            members = members_of(some, [int(path.parent.name) for path in some])
            write_shard(self.root / "shards" / f"a-{shard}.tar", members)

    def student(self, cache: LogitCache) -> StudentConfig:
        data = DataSettings(dataset=self.spec, test="none", workers=0, image_size=8)
        return student_of(cache.path, data=data, train=TrainSettings(epochs=1, batch_size=8))

    def job(self, spec: str, **changes: Any) -> CacheJob:
        config = CacheConfig(
            data=DataSettings(dataset=spec, test="none", feeding="stream", workers=0, image_size=8),
            teacher=TeacherSettings(weights=f"{self.root}/t.safetensors", architecture="resnet8"),
            views=2,
            augment="resized-crop-flip",
            encoding="float32",
            block_rows=12,
            batch_size=5,
            device="cpu",
        )
        return prepare(msgspec.structs.replace(config, **changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    made.write()
    torch.manual_seed(0)
    save_file(cifar_model("resnet8", 3, 3).state_dict(), made.root / "t.safetensors")
    return made


@pytest.fixture(scope="module")
def cached(world: World) -> LogitCache:
    """Two views of two blocks each. Read only."""
    path = world.root / "wds.zarr"
    cache_teacher(world.job(world.spec), path)
    return LogitCache.open(path)


def test_it_is_the_cache_of_the_same_images_in_a_folder(world: World, cached: LogitCache) -> None:
    path = world.root / "folder.zarr"
    cache_teacher(world.job(f"folder:{world.root}/folder"), path)
    folder = LogitCache.open(path)
    assert torch.equal(cached.dataset_index, folder.dataset_index)
    assert torch.equal(cached.labels, folder.labels)
    assert cached.pixel_probes == folder.pixel_probes
    every = torch.arange(3 * EACH)
    for view in range(2):
        ours, theirs = (cache.read_view(view).rows(every) for cache in (cached, folder))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2])
def test_shards_are_read_once_and_onwards(
    world: World, tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = world.job(world.spec, views_at_once=at_once)
    read: list[tuple[int, int]] = []
    compressed = TarImages.compressed

    def spy(self: TarImages, index: int) -> tuple[bytes, str]:
        read.append((int(self.places[index, 0]), int(self.places[index, 1])))
        return compressed(self, index)

    teacher = TeacherPass.of(job)
    monkeypatch.setattr(TarImages, "compressed", spy)
    rows = job.row_order[:12]
    found = teacher.of_views(rows, range(at_once))
    teacher.feed.close()
    assert len(read) == 12
    assert read == sorted(read)
    folder = world.job(f"folder:{world.root}/folder", views_at_once=at_once)
    assert held_bytes(job, 2) == held_bytes(folder, 2) + 4 * 3 * 12  # a block of rows in order
    assert rows.tolist() != sorted(rows.tolist())
    for view, logits in enumerate(found):
        for row in (0, 7, 11):
            alone = teacher.logits(rows[row : row + 1], view)
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_student_and_the_live_teacher(world: World, cached: LogitCache, tmp_path: Path) -> None:
    train_student(world.student(cached), tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert verify_live(cached, recorded_job(cached.path), 20) == []


@pytest.mark.parametrize(
    ("side", "message"),
    [
        pytest.param(9, "pixel probes .* differ", id="other pixels"),
        pytest.param(12, "another dataset or order: images: ", id="other sizes"),
    ],
)
def test_a_shard_that_changed_after_caching(
    world: World, cached: LogitCache, tmp_path: Path, side: int, message: str
) -> None:
    other = World(tmp_path)
    other.write({13: picture(99, side)})
    with pytest.raises(IdentityError, match=message):
        train_student(other.student(cached), tmp_path / "run")


def test_shards_that_are_gone(world: World, cached: LogitCache, tmp_path: Path) -> None:
    away = world.root / "shards" / "away"
    os.rename(world.root / "shards" / "a-2.tar", away)
    try:
        with pytest.raises(ChangedImagesError, match=r"no shard .*a-2\.tar"):
            recorded_job(cached.path)
    finally:
        os.rename(away, world.root / "shards" / "a-2.tar")
    assert recorded_job(cached.path).identity == cached.identity
