"""A folder is listed once, and again whenever its files may be others."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from stages.inputs.datasets import files, load_dataset, manifest

HOUR = 3600


@pytest.fixture(autouse=True)
def my_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def my_folder(tmp_path: Path) -> Path:
    """Three classes of four images each, untouched for an hour."""
    root = tmp_path / "images"
    for label, name in enumerate(("ant", "bee", "cat")):
        for i in range(4):
            write_image(root / "train" / name / f"{i}.png", side=3 + i + label)
    settle(root / "train")
    return root


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every folder that is listed, as it is listed."""
    listed: list[Path] = []
    scan = files.list_folder

    def spy(base: Path) -> manifest.FolderListing:
        listed.append(base)
        return scan(base)

    monkeypatch.setattr(files, "list_folder", spy)
    return listed


def write_image(path: Path, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(side).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def settle(train: Path) -> None:
    """Give every folder a time long past, as those of a dataset have."""
    for folder in (train, *(path for path in train.rglob("*") if path.is_dir())):
        os.utime(folder, (time.time() - HOUR,) * 2)


def digests(root: Path, rescan: bool = False) -> tuple[str, str]:
    dataset = load_dataset(f"folder:{root}", "train", feeding="stream", rescan=rescan)
    return dataset.images_digest, dataset.labels_digest


def only_manifest(caches: Path) -> Path:
    (path,) = caches.rglob("*.json")
    return path


def test_the_second_time_nothing_is_listed(
    my_folder: Path, my_caches: Path, scans: list[Path]
) -> None:
    """The listing lies in the user's cache, and not in the dataset."""
    before = sorted(my_folder.rglob("*"))
    first = load_dataset(f"folder:{my_folder}", "train")
    again = load_dataset(f"folder:{my_folder}", "train")
    assert scans == [my_folder / "train"]
    assert sorted(my_folder.rglob("*")) == before
    kept = only_manifest(my_caches)
    assert kept == manifest.manifest_path("folder", my_folder / "train")
    assert kept.parent == my_caches / "teacher-cache" / "folders"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]  # nothing half-written
    assert again.class_names == first.class_names == ("ant", "bee", "cat")
    assert again.labels.tolist() == first.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert again.images_digest == first.images_digest
    assert [again.load(i).shape for i in range(12)] == [first.load(i).shape for i in range(12)]


def test_it_lies_below_home_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    path = manifest.manifest_path("folder", Path("/images"))
    assert getattr(path, "parent", None) == Path("/somewhere/.cache/teacher-cache/folders")


def replace_file(train: Path) -> None:
    """As most programs write: a new file beside it, then a rename."""
    write_image(train / "bee" / "new.png", side=20)
    (train / "bee" / "new.png").replace(train / FILE)


def add_file_as_copies_do(train: Path) -> None:
    """The folder's mtime is set back to what it was, as rsync and tar do."""
    before = (train / "bee").stat()
    write_image(train / "bee" / "9.png", side=4)
    os.utime(train / "bee", ns=(before.st_atime_ns, before.st_mtime_ns))


def overwrite_file(train: Path) -> None:
    """In place: its folder knows nothing; with few files, each one's size is looked at."""
    write_image(train / FILE, side=20)


FILE = "bee/2.png"
CHANGES: dict[str, Callable[[Path], object]] = {
    "more": lambda train: write_image(train / "bee/9.png", side=4),
    "less": lambda train: (train / FILE).unlink(),
    "another name": lambda train: (train / FILE).rename(train / "bee/7.png"),
    "another label": lambda train: (train / FILE).rename(train / "cat/7.png"),
    "another file": replace_file,
    "overwritten": overwrite_file,
    "another class": lambda train: write_image(train / "dog/0.png", side=4),
    "another name of a class": lambda train: (train / "bee").rename(train / "wasp"),
    "copied": add_file_as_copies_do,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(my_folder: Path, scans: list[Path], change: str) -> None:
    before = digests(my_folder)
    CHANGES[change](my_folder / "train")
    after = digests(my_folder)
    assert len(scans) == 2
    assert after == digests(my_folder, rescan=True)
    assert after != before


def test_an_overwritten_file_needs_a_rescan(
    my_folder: Path, scans: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "CHECKED_FILES", 0)
    before = digests(my_folder)
    overwrite_file(my_folder / "train")
    assert digests(my_folder) == before
    assert len(scans) == 1
    rescanned = digests(my_folder, rescan=True)
    assert rescanned != before
    assert digests(my_folder) == rescanned  # and what was found then is what is remembered
    assert len(scans) == 2


def test_a_folder_that_changed_just_now(
    my_folder: Path, my_caches: Path, scans: list[Path]
) -> None:
    os.utime(my_folder / "train" / "cat")
    for _ in range(2):
        digests(my_folder)
    assert len(scans) == 2
    assert list(my_caches.rglob("*.json")) == []


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda content: b"\x00" + content[1:],
    "a digit": lambda content: b"2".join(content.rsplit(b"1", 1)),  # JSON of the right shape
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not text": lambda content: b"\xff\xfe\n\x80",
    "no digest": lambda content: content.partition(b"\n")[2],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest(
    my_folder: Path, my_caches: Path, scans: list[Path], damage: str
) -> None:
    before = digests(my_folder)
    path = only_manifest(my_caches)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert digests(my_folder) == before
    assert len(scans) == 2
    assert path.read_bytes() == whole


def test_a_manifest_of_another_version(
    my_folder: Path, scans: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests(my_folder)
    monkeypatch.setattr(manifest, "VERSION", manifest.VERSION + 1)
    digests(my_folder)
    digests(my_folder)
    assert len(scans) == 2


@pytest.mark.parametrize("blocked", ["caches", "caches/teacher-cache/folders"])
def test_one_that_cannot_be_written(
    my_folder: Path, tmp_path: Path, scans: list[Path], blocked: str
) -> None:
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_text("a file where a folder should be")
    assert digests(my_folder) == digests(my_folder)
    assert len(scans) == 2


def test_two_ways_of_listing_a_folder_do_not_mix(my_folder: Path) -> None:
    train = my_folder / "train"
    digests(my_folder)
    other = manifest.FolderListing(
        ["x"], [0], ["ant/0.png"], [(train / "ant/0.png").stat().st_size]
    )
    with pytest.raises(FileNotFoundError):  # its own scan is asked: there is no folder x
        manifest.remembered("imagenet", train, lambda: other)


def test_imagenet_is_remembered_too(my_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fake(root: Path, split: str) -> SimpleNamespace:
        made.append(split)
        paths = sorted((root / split).glob("*/*"))
        names = sorted({path.parent.name for path in paths})
        samples = [(str(path), names.index(path.parent.name)) for path in paths]
        return SimpleNamespace(samples=samples, wnids=names)

    monkeypatch.setattr("torchvision.datasets.ImageNet", fake)
    loads = [load_dataset("imagenet", "train", root=str(my_folder)) for _ in range(2)]
    assert made == ["train"]
    assert loads[0].images_digest == loads[1].images_digest == digests(my_folder)[0]
    assert loads[1].class_names == ("ant", "bee", "cat")
    assert loads[1].labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert loads[1].name == "imagenet"
