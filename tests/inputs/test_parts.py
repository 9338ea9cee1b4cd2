"""What is tested on: a share, another folder, another dataset or nothing; images without labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from stages.errors import ConfigError, DatasetError, PipelineError
from stages.inputs.datasets import Skip, load_dataset, load_splits
from stages.inputs.datasets.parts import share_mask, share_of
from stages.settings import DataSettings, Feeding


def photograph(path: Path, shade: int, turned: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 6, 3), shade, dtype=np.uint8)
    pixels[0, 0] = 255 - shade  # a corner that tells how it is turned
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/CLASS/IMAGE: 10 cats, 5 dogs, one emu."""
    root = tmp_path_factory.mktemp("single")
    for name, count in (("cat", 10), ("dog", 5), ("emu", 1)):
        for i in range(count):
            photograph(root / name / f"{i}.png", 10 * i + len(name))
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    for i in range(6):
        photograph(root / f"{i}.png", 10 * i)
    return root


def test_a_share_is_the_same_of_every_class() -> None:
    labels = torch.randint(5, (1000,), generator=torch.Generator().manual_seed(0))
    tested = share_mask(labels, 0.2)
    for label in range(5):
        of_class = tested[labels == label]
        assert int(of_class.sum()) == round(0.2 * len(of_class))
    assert torch.equal(tested, share_mask(labels, 0.2))
    assert not bool((share_mask(labels, 0.1) & ~tested).any())  # a smaller share is part of it
    where = tested[labels == 0].nonzero().squeeze(1).double()
    assert 80 < float(where.mean()) < 120  # not the first or the last ones of 200


@pytest.mark.parametrize(("images", "tested"), [(1, 0), (2, 1), (3, 1), (10, 1), (100, 5)])
def test_a_class_keeps_images_on_both_sides(images: int, tested: int) -> None:
    assert int(share_mask(torch.zeros(images, dtype=torch.int64), 0.05).sum()) == tested


@pytest.mark.parametrize("feeding", ["memory", "stream"])
def test_a_single_folder_and_a_share(single: Path, feeding: Feeding) -> None:
    spec = f"folder:{single}"
    train, test = load_splits(spec, test="0.2", feeding=feeding)
    assert train.class_names == test.class_names == ("cat", "dog", "emu")
    assert train.labels.bincount().tolist() == [8, 4, 1]
    assert test.labels.bincount().tolist() == [2, 1]
    whole = load_dataset(spec, "train", test="none", feeding=feeding)
    seen = sorted(int(part.load(i)[0, 1, 1]) for part in (train, test) for i in range(len(part)))
    assert seen == sorted(int(whole.load(i)[0, 1, 1]) for i in range(len(whole)))
    if feeding == "memory":
        assert train.images is not None
        assert all(torch.equal(train.images[i], train.load(i)) for i in range(len(train)))
    assert train.images_digest == test.images_digest == whole.images_digest
    assert train.labels_digest != whole.labels_digest
    assert train.tested_share == 0.2


def test_skipped_files_of_both_parts(single: Path) -> None:
    skips = [Skip("train", None, f"cat/{i}.png") for i in range(5)]
    train, test = load_splits(f"folder:{single}", test="0.2", skips=skips)
    named = {skip.path for skip in (*train.skips, *test.skips)}
    assert named == {skip.path for skip in skips}
    for part in (train, test):
        for skip in part.skips:
            assert skip.split == part.split
            assert not bool(part.load(int(skip.sample or 0)).any())  # black
    again = load_splits(f"folder:{single}", test="0.2", skips=[*train.skips, *test.skips])
    assert (again[0].skips, again[1].skips) == (train.skips, test.skips)


def test_images_alone(alone: Path) -> None:
    train, test = load_splits(f"folder:{alone}", test="none")
    assert not train.labelled
    assert train.class_names == test.class_names == ()
    assert (len(train), len(test)) == (6, 0)
    assert train.labels_digest == ""
    shades = [int(train.load(i)[0, 1, 1]) for i in range(6)]
    assert shades == [0, 10, 20, 30, 40, 50]


def test_labels_are_not_used(single: Path) -> None:
    for no_labels in (True, False, True):  # listings are remembered apart
        train, _ = load_splits(f"folder:{single}", test="none", no_labels=no_labels)
        assert len(train) == 16
        assert train.labelled is not no_labels
    digits, test = load_splits("digits", no_labels=True)
    assert not digits.labelled
    assert test.labelled
    assert digits.class_names == test.class_names  # those of what is tested on


def test_another_dataset_is_tested_on(alone: Path, single: Path, tmp_path: Path) -> None:
    (tmp_path / "test").symlink_to(single)
    train, test = load_splits(f"folder:{alone}", eval_dataset=f"folder:{tmp_path}")
    assert train.class_names == test.class_names == ("cat", "dog", "emu")
    assert len(test) == 16
    train, test = load_splits(f"folder:{single}", test=str(single))
    assert len(train) == len(test) == 16


def test_exif_orientation(tmp_path: Path) -> None:
    photograph(tmp_path / "train" / "a" / "0.png", 10, turned=True)
    photograph(tmp_path / "train" / "b" / "0.png", 20)
    spec = f"folder:{tmp_path}"
    ignored = load_dataset(spec, "train", feeding="stream")
    turned = load_dataset(spec, "train", feeding="stream", exif=True)
    assert ignored.load(0).shape == (3, 4, 6)  # as torchvision shows it
    with Image.open(tmp_path / "train" / "a" / "0.png") as image:
        upright = np.array(ImageOps.exif_transpose(image))
    assert torch.equal(turned.load(0), torch.from_numpy(upright).permute(2, 0, 1))
    assert torch.equal(turned.load(1), ignored.load(1))
    assert (turned.exif, ignored.exif) == (True, False)


@pytest.mark.parametrize(
    ("spec", "reading", "message"),
    [
        ("digits", {"test": "0"}, "no share"),
        ("digits", {"test": "nan"}, "no share"),
        ("digits", {"test": "photos"}, "none, a share"),
        ("digits", {"exif": True}, "--exif"),
        ("digits", {"jpeg_side": 64}, "--jpeg-side"),
        ("digits", {"test": "0.1", "no_labels": True}, "no labels"),
        ("digits", {"test": "0.1", "skips": [Skip("train", 3)]}, "names files"),
        ("folder:ALONE", {}, "--test none"),
        ("folder:ALONE", {"test": "0.1"}, "no labels"),
        ("folder:SINGLE", {}, "--test none"),
        ("folder:SINGLE", {"test": "nowhere"}, "nowhere"),
        ("folder:SINGLE", {"test": "ALONE"}, "class folders"),
        ("folder:EMPTY", {"test": "none"}, "folders"),
        ("folder:EMPTY", {"test": "none", "no_labels": True}, "no images"),
        ("folder:SINGLE", {"eval_dataset": "digits"}, "differ"),
        ("folder:SINGLE", {"eval_dataset": "folder:ALONE"}, "no folder test"),
    ],
)
def test_what_cannot_be_read(
    spec: str, reading: dict[str, Any], message: str, single: Path, alone: Path, tmp_path: Path
) -> None:
    def placed(text: Any) -> Any:
        for name, place in (("ALONE", alone), ("SINGLE", single), ("EMPTY", tmp_path)):
            text = text.replace(name, str(place)) if isinstance(text, str) else text
        return text

    with pytest.raises(DatasetError) as raised:
        load_splits(placed(spec), **{key: placed(value) for key, value in reading.items()})
    assert message in f"{raised.value.cause} {raised.value.remedy}"
    assert len(str(raised.value).splitlines()) <= 3


def test_settings_of_tests() -> None:
    assert [share_of(test) for test in (None, "none", "photos", "0.25")] == [0, 0, 0, 0.25]
    with pytest.raises(PipelineError):
        share_of("1")
    with pytest.raises(ConfigError, match="Give one of them"):
        DataSettings(dataset="digits", test="none", eval_dataset="digits")
