"""JPEGs decoded at a part of their size: at which, to which pixels; a student must agree."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers import members_of, save_table, smooth, student_of_photographs, write_shard
from torch.nn.functional import avg_pool2d

from stages.cache import LogitCache
from stages.cached_images import named_images
from stages.data import load_data
from stages.errors import IdentityError
from stages.inputs.datasets import load_dataset
from stages.inputs.probes import pixel_probes
from stages.inputs.views import view_policy
from stages.settings import (
    DataSettings,
)
from stages.train_student import train_student

SIDES = {"0.jpg": (64, 96), "1.jpg": (61, 33), "2.jpg": (16, 300), "3.png": (64, 96)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for label in "ab":
        (root / label).mkdir()
        for seed, (name, sides) in enumerate(SIDES.items()):
            smooth(seed, *sides).save(root / label / name, quality=95, subsampling=0)
    return root


def settings(folder: Path, **changes: Any) -> DataSettings:
    own = {"test": "none", "feeding": "stream", "workers": 0, "image_size": 16, **changes}
    return DataSettings(dataset=f"folder:{folder}", **own)


@pytest.mark.parametrize("side", [None, 8, 17, 33, 64])
def test_both_sides_keep_so_many_pixels(folder: Path, side: int | None) -> None:
    whole = load_data(settings(folder)).train
    dataset = load_data(settings(folder, jpeg_side=side)).train
    for i, (name, (height, width)) in enumerate(SIDES.items()):
        parts = [p for p in (8, 4, 2) if side and min(height // side, width // side) >= p]
        part = parts[0] if parts and name.endswith("jpg") else 1
        shown = dataset.load(i)
        assert shown.shape == (3, -(-height // part), -(-width // part))
        if part == 1:
            assert torch.equal(shown, whole.load(i))
        else:  # the means of squares of the whole image; nearly, where it is not an eighth
            means = avg_pool2d(whole.load(i).float(), part)
            apart = shown[:, : height // part, : width // part] - means
            assert float(apart.abs().mean()) < 3


def test_every_kind_of_dataset_decodes_alike(folder: Path, tmp_path: Path) -> None:
    train = load_data(settings(folder, jpeg_side=16)).train
    files = [folder / label / name for label in "ab" for name in SIDES]
    labels = [0] * 4 + [1] * 4
    write_shard(tmp_path / "x.tar", members_of(files, labels))
    save_table(tmp_path / "hf", files, labels)
    for spec in (f"wds:{tmp_path}/x.tar", f"hf:{tmp_path}/hf"):
        other = load_dataset(spec, "train", test="none", feeding="stream", jpeg_side=16)
        assert other.jpeg_side == 16
        for i in range(len(files)):
            assert torch.equal(other.load(i), train.load(i))


def test_a_student_decodes_as_the_teacher_did(folder: Path, tmp_path: Path) -> None:
    student = student_of_photographs(settings(folder, jpeg_side=16), tmp_path)
    cache = LogitCache.open(student.cache)
    assert cache.identity.dataset.jpeg_side == 16
    assert named_images(cache, f"folder:{folder}").jpeg_side == 16
    for side, message in ((None, "None, not 16"), (8, "8, not 16")):
        other = msgspec.structs.replace(student, data=settings(folder, jpeg_side=side))
        with pytest.raises(IdentityError, match=f"jpeg_side: {message}\n.*--jpeg-side"):
            train_student(other, tmp_path / f"run{side}")
    # Probes alone would tell as well.
    policy = view_policy("resized-crop-flip")
    for side, same in ((16, True), (None, False), (8, False)):
        train = load_data(settings(folder, jpeg_side=side)).train
        assert (pixel_probes(train, policy, 16) == cache.pixel_probes) is same
