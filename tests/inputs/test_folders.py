"""Folders of images as people have them: what is taken, what is not, and what is told of it."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from PIL import Image

from stages.errors import DatasetError
from stages.inputs.datasets import ImageDataset, load_dataset, load_splits
from stages.inputs.datasets.listing import extensions, walk_folder


def picture(path: Path, seed: int = 0, mode: str = "RGB", side: int = 8) -> Path:
    """A file of 8 x 8 pixels of noise, in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def classes(base: Path, names: str = "ab") -> Path:
    for seed, name in enumerate(names):
        picture(base / name / "0.png", seed)
    return base


def train(root: Path) -> ImageDataset:
    return load_dataset(f"folder:{root}", "train", feeding="stream")


def test_files_and_their_order_are_those_of_image_folder(tmp_path: Path) -> None:
    """torchvision is the truth: subfolders, links to folders and to files, both sorted its way."""
    from torchvision.datasets import ImageFolder

    base = classes(tmp_path / "train")
    for name in ("a/sub/1.JPG", "a/sub/deep/er/2.bmp", "a/sub-1/3.png", "a/Z.png", "b/x.jpg/1.png"):
        picture(base / name, len(name))
    picture(tmp_path / "elsewhere" / "7.webp")
    (base / "b" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (base / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (base / "a" / "also.png").symlink_to(base / "b" / "0.png")
    ours, theirs = walk_folder(base)[0], ImageFolder(str(base))
    assert ours.class_names == theirs.classes
    expected = [(os.path.relpath(path, base), label) for path, label in theirs.samples]
    assert list(zip(ours.paths, ours.labels, strict=True)) == expected
    assert ours.sizes == [os.path.getsize(path) for path, _ in theirs.samples]
    assert ours.passed_over == {}


@pytest.mark.parametrize("name", ["0.jfif", "0.gif", "0.JPEG", "0.webp"])
def test_what_pillow_reads_is_taken(tmp_path: Path, name: str) -> None:
    base = classes(tmp_path / "train", "b")
    path = picture(base / "a" / name)
    dataset = train(tmp_path)
    assert not {".eps", ".ps", ".h5", ".hdf", ".mpg", ".pdf", ".txt"} & extensions()
    assert dataset.labels.tolist() == [0, 1]
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(dataset.load(0).numpy(), expected)


def special_files(base: Path) -> None:
    (base / "a" / "gone.png").symlink_to("nowhere.png")
    (base / "a" / "itself.png").symlink_to("itself.png")
    os.mkfifo(base / "a" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(base / "b")  # the path of a socket is at most 108 bytes long
        try:
            listening.bind("socket.jpg")
        finally:
            os.chdir(here)
    (base / "b" / "loop").symlink_to(base, target_is_directory=True)
    (base / "b" / "up").symlink_to(base / "b", target_is_directory=True)


def test_what_is_not_taken_is_counted_in_one_line(tmp_path: Path) -> None:
    base = classes(tmp_path / "train")
    special_files(base)
    listing, passed = walk_folder(base)  # links in a circle end
    assert listing.paths == ["a/0.png", "b/0.png", "b/loop/a/0.png"]
    assert ("b/loop/b", "link to a folder above it") in passed
    for name in ("a/notes.txt", "a/b.TXT", "b/Makefile", "loose.png", "README.md"):
        (base / name).write_bytes(b"x")
    (base / ".hidden").mkdir()
    (base / "a" / "._0.png").write_bytes(b"what a file system leaves")
    (base / "b" / "loop").unlink()
    listing, passed = walk_folder(base)
    assert listing.paths == ["a/0.png", "b/0.png"]
    assert dict(passed) == {
        "a/gone.png": "dangling link",
        "a/itself.png": "dangling link",
        "a/pipe.png": "special file",
        "b/socket.jpg": "special file",
        "b/up": "link to a folder above it",
        "a/notes.txt": ".txt",
        "a/b.TXT": ".txt",
        "b/Makefile": "without extension",
        "README.md": ".md",
        "loose.png": "outside class folders",
    }
    (note,) = train(tmp_path).notes
    assert len(note.splitlines()) == 1
    for message in ("2 dangling link", "2 .txt", "2 special file", f"check-data folder:{tmp_path}"):
        assert message in note


def test_images_that_come_later_are_seen(tmp_path: Path) -> None:
    """At the end of a link, and in a folder without any; listings are remembered."""
    base = classes(tmp_path / "train")
    (base / "a" / "1.png").symlink_to(tmp_path / "later.png")
    (base / "a" / "empty").mkdir()
    for folder in (base, base / "a", base / "b", base / "a" / "empty"):
        os.utime(folder, (1e9, 1e9))
    assert len(train(tmp_path)) == 2
    picture(tmp_path / "later.png")
    assert len(train(tmp_path)) == 3
    picture(base / "a" / "empty" / "1.png")
    assert len(train(tmp_path)) == 4


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    base = classes(tmp_path / "train")
    picture(base / "a" / "x.png").rename(base / "a" / "\udcff.png")
    assert len(train(tmp_path)) == 3
    picture(base / "\udcff" / "0.png")
    with pytest.raises(DatasetError, match="UTF-8"):
        train(tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, scandir = classes(tmp_path / "train"), os.scandir

    def refusing(path: str | Path) -> "os.ScandirIterator[str]":  # as root may read everything
        if str(path) == str(base / "b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(str(path))

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DatasetError, match=r"cannot list .*b: Permission denied"):
        train(tmp_path)


@pytest.mark.parametrize(
    "names", ["train test val", "Train Testing", "TRAINING VAL", "train valid", "train validation"]
)
def test_names_of_the_splits(tmp_path: Path, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the home folder; `test` is preferred to `val`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in names.split():
        classes(tmp_path / "data" / name)
    picture(tmp_path / "data" / names.split()[1] / "a" / "1.png", 5)
    assert [len(split) for split in load_splits("folder:~/data")] == [2, 3]


@pytest.mark.parametrize(
    ("both", "other"),
    [("train training", "test"), ("test Test", "train"), ("val validation", "train")],
)
def test_two_folders_for_one_split_are_refused(tmp_path: Path, both: str, other: str) -> None:
    for name in [*both.split(), other]:
        classes(tmp_path / name)
    with pytest.raises(DatasetError) as caught:
        load_splits(f"folder:{tmp_path}")
    assert all(name in caught.value.cause for name in both.split())


def tiny_imagenet(root: Path) -> None:
    for name in ("n01", "n02"):
        picture(root / "train" / name / "images" / f"{name}_0.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text("x")
    for i in range(2):
        picture(root / "val" / "images" / f"val_{i}.JPEG", i)
        picture(root / "test" / "images" / f"test_{i}.JPEG", i)
    lines = "val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n"
    (root / "val" / "val_annotations.txt").write_text(lines)


LAYOUTS = [
    ("other/x", "no folder train", "DIR/train/CLASS/IMAGE"),
    ("inner/train/a/0.png", "no folder train", "inner"),
    ("train/a/0.png train/b/0.png", "no folder test or val", "DIR/test"),
    ("train/a/0.png train/b/0.png test/0.png", "do not lie in class folders", "/test/CLASS/IMAGE"),
    ("train/labels.csv", "no class folders, only: 1 .csv", "DIR/train/CLASS/IMAGE"),
    ("train/a/0.png train/b/0.png train/c/0.svg", "c (not taken: 1 .svg) holds no", "1 of 3 class"),
    ("TINY-IMAGENET", "Tiny-ImageNet's layout", "val_annotations.txt"),
    ("A FILE", "cannot list", "DIR/train/CLASS/IMAGE"),
]


@pytest.mark.parametrize(("files", "cause", "remedy"), LAYOUTS)
def test_layouts_that_cannot_be_used(tmp_path: Path, files: str, cause: str, remedy: str) -> None:
    root = tmp_path / "images"
    if files == "TINY-IMAGENET":
        tiny_imagenet(root)
    elif files == "A FILE":
        root.write_text("x")
    else:
        for name in files.split():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            picture(root / name) if name.endswith("png") else (root / name).write_text("x")
    with refused(DatasetError, cause, remedy):
        load_splits(f"folder:{root}")


def test_the_remedy_for_tiny_imagenet_is_one(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    with pytest.raises(DatasetError) as caught:
        load_splits(f"folder:{tmp_path}")
    (tmp_path / "test").rename(tmp_path / "unlabelled")
    assert os.system(f"cd {tmp_path}/val && ({caught.value.remedy})") == 0
    training, test = load_splits(f"folder:{tmp_path}", feeding="stream")
    assert training.class_names == test.class_names == ("n01", "n02")
    assert test.labels.tolist() == [0, 1]
    with Image.open(tmp_path / "val" / "n01" / "val_1.JPEG") as image:
        assert np.array_equal(test.load(0).numpy(), np.array(image).transpose(2, 0, 1))


def half_a_file(path: Path) -> None:
    content = picture(path, side=64).read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest resets filters
@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (half_a_file, "truncated"),
        (lambda path: path.write_text("<html>404</html>"), "no image"),
        (lambda path: picture(path, side=200), "40000 pixels"),
        (Path.unlink, "No such file"),
    ],
)
def test_a_broken_image_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], cause: str
) -> None:
    """Up to twice the pixels at which Pillow warns, an image is read, as of 12,000 x 12,000."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow's own is 89 million
    base = classes(tmp_path / "train")
    picture(base / "a" / "0.png", side=120)
    path = picture(base / "a" / "1.jpg")
    dataset = train(tmp_path)
    assert dataset.load(0).shape == (3, 120, 120)
    spoil(path)
    with pytest.raises(DatasetError) as caught:
        dataset.load(1)
    assert str(path) in caught.value.cause
    assert cause in caught.value.cause
    assert f"check-data folder:{tmp_path} --skip-out skip.txt" in caught.value.remedy
    assert "--skip skip.txt" in caught.value.remedy


@pytest.mark.parametrize(
    ("number", "cause", "remedy"),
    [(13, "Permission denied", "allow reading"), (24, "too many open files", "ulimit")],
)
def test_what_the_system_refuses_is_not_a_broken_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cause: str, remedy: str
) -> None:
    classes(tmp_path / "train")
    dataset = train(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "0.png")

    monkeypatch.setattr(Image, "open", refuse)
    with refused(DatasetError, cause, remedy):
        dataset.load(0)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_the_colours_that_torchvision_shows(tmp_path: Path, mode: str) -> None:
    from torchvision.datasets.folder import pil_loader

    suffix = {"CMYK": "tif", "YCbCr": "jpg", "PA": "tif"}.get(mode, "png")
    base = classes(tmp_path / "train", "b")
    try:
        path = picture(base / "a" / f"0.{suffix}", mode=mode)
    except (OSError, ValueError):
        pytest.skip(f"Pillow writes no {mode} here")
    expected = np.array(pil_loader(str(path))).transpose(2, 0, 1)
    assert np.array_equal(train(tmp_path).load(0).numpy(), expected)


def test_a_palette_with_transparency_gives_no_warning(tmp_path: Path) -> None:
    base = classes(tmp_path / "train")
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    image.save(base / "a" / "0.png", transparency=bytes(range(256)))
    with Image.open(base / "a" / "0.png") as image:
        expected = np.array(image.convert("RGBA").convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(train(tmp_path).load(0).numpy(), expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused(tmp_path: Path, mode: str) -> None:
    base = classes(tmp_path / "train", "b")
    (base / "a").mkdir()
    Image.new(mode, (8, 8)).save(base / "a" / "0.tif")
    with pytest.raises(DatasetError, match="more than 8 bits"):
        train(tmp_path).load(0)
