"""WebDataset shards: the samples that they hold, their pixels, and what is wrong with others."""

import functools
import gzip
import io
import json
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import write_shard
from PIL import Image
from torch import Tensor

from stages.check_data import check_data, write_skip_list
from stages.errors import DatasetError
from stages.inputs.datasets import (
    ImageDataset,
    Skip,
    load_dataset,
    load_splits,
    read_skip_list,
    tar_reader,
    wds,
)
from stages.inputs.datasets.tar_index import index_shard, key_and_extension
from stages.inputs.feed import ViewFeed
from stages.inputs.views import view_policy


def picture(seed: int, kind: str = "JPEG", side: int = 0) -> bytes:
    """Noise of 9 x 6 pixels or more."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6 + side, 9, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def sample(key: str, seed: int, label: object) -> dict[str, bytes]:
    return {f"{key}.jpg": picture(seed), f"{key}.cls": str(label).encode()}


def samples(labels: list[int], start: int = 0) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for i, label in enumerate(labels, start):
        found |= sample(f"{i:06}", i, label)
    return found


def as_web_dataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """What the library's documented rules give: members one after another as a stream, cut at the
    first dot of their base names, those of one key in a row a sample.
    """
    found: list[tuple[str, dict[str, bytes]]] = []
    with tarfile.open(path, "r|") as tar:
        for info in tar:
            file = tar.extractfile(info)
            folder, _, base = info.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if file is None or not dot or not stem:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if not found or found[-1][0] != key:
                found.append((key, {}))
            found[-1][1][extension.lower()] = file.read()
    return found


def pixels_of(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def load(root: Path, split: Any = "train", **reading: Any) -> ImageDataset:
    return load_dataset(f"wds:{root}", split, **{"feeding": "stream", **reading})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training shards of twelve images in three classes, one test shard."""
    folder = tmp_path / "set"
    for shard in range(3):
        labels = [(shard + i) % 3 for i in range(4)]
        write_shard(folder / f"x-train-{shard:03}.tar", samples(labels, 4 * shard))
    write_shard(folder / "x-val-000.tar", samples([2, 1], 50))
    return folder


def test_samples_are_those_of_the_library(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "train.tar",
        {
            "a/b/0001.jpg": picture(1),
            "a/b/0001.cls": b"1\n",
            "a/b/0001.seg.png": picture(9, "PNG"),
            "a/b/0001.txt": b"a caption",
            "a/b.c/0002.JPEG": picture(2),
            "a/b.c/0002.json": json.dumps({"label": 0, "cls": 5, "text": "x"}).encode(),
            "0003.png": picture(3, "PNG"),
            "0003.json": b'{"cls": 2}',
            "0003.cls": b" 1",
            "n" * 180 + ".webp": picture(4, "WEBP"),
            "n" * 180 + ".cls": b"0",
        },
    )
    dataset, truth = load(path, test="none"), as_web_dataset(path)
    assert len(dataset) == len(truth) == 4
    for i, (_, parts) in enumerate(truth):
        image = next(parts[e] for e in ("jpg", "jpeg", "png", "webp") if e in parts)
        fields = json.loads(parts.get("json", b"{}"))
        label = int(parts["cls"]) if "cls" in parts else fields.get("label", fields.get("cls"))
        assert torch.equal(dataset.load(i), pixels_of(image))
        assert dataset.labels[i] == label
    assert dataset.class_names == ("0", "1")
    (note,) = dataset.notes
    assert "1 .seg.png, 1 .txt" in note


def test_keys() -> None:
    for name in ("a.jpg", "x/y.z/a.b.JPG", "./a.cls"):
        library = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name)  # its own expression
        assert library is not None
        assert key_and_extension(name) == (library[1], library[2].lower())
    for name in (".hidden.jpg", "x/.jpg", "a", "x.y/a", "__meta__/a.jpg", "x/__size__"):
        assert key_and_extension(name) is None


def test_members_may_lie_in_any_order_and_beside_other_things(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("d/7.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        tar.addfile(link)
        contents = {"d/1.cls": b"1", "d/0.jpg": picture(0), "d/1.jpg": picture(1), "d/0.cls": b"0"}
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"comment": "é" * 90}
            tar.addfile(info, io.BytesIO(content))
    index = index_shard(tmp_path, "train.tar")
    assert index.members == ["d/0.jpg", "d/1.jpg"]
    assert index.labels == [0, 1]
    assert index.passed_over == {"special file": 1}
    content = path.read_bytes()
    for i, (offset, size) in enumerate(zip(index.offsets, index.sizes, strict=True)):
        assert content[offset : offset + size] == picture(i)


def test_images_and_labels_of_both_splits(root: Path) -> None:
    train, test = load_splits(f"wds:{root}", feeding="stream")
    assert (train.name, train.in_order, len(train), len(test)) == ("wds", True, 12, 2)
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert test.labels.tolist() == [2, 1]
    assert train.class_names == test.class_names == ("0", "1", "2")
    for i in (0, 3, 4, 11):
        assert torch.equal(train.load(i), pixels_of(picture(i)))
    assert torch.equal(test.load(1), pixels_of(picture(51)))
    held = load_dataset(f"wds:{root}", "train")
    assert held.images is not None
    assert torch.equal(held.images[7], train.load(7))
    assert held.images_digest == train.images_digest


def test_other_shards_for_testing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    spec = "wds:x-train-{000..001}.tar"
    for test in ("x-val-000.tar", "wds:x-val-*.tar"):
        train, tested = load_splits(spec, test=test, feeding="stream")
        assert (len(train), len(tested)) == (8, 2)
        assert train.class_names == tested.class_names
    whole, own = load_splits(spec, eval_dataset="wds:x-val-000.tar", feeding="stream")
    assert (len(whole), own.labels.tolist()) == (8, [2, 1])


def test_a_share_and_nothing_to_test_on(root: Path) -> None:
    spec = f"wds:{root}/x-train-*.tar"
    train, test = load_splits(spec, test="0.25", feeding="stream")
    assert (len(train), len(test)) == (9, 3)
    assert sorted(test.labels.tolist()) == [0, 1, 2]
    shown = {bytes(t.numpy().tobytes()) for d in (train, test) for t in map(d.load, range(len(d)))}
    assert shown == {pixels_of(picture(i)).contiguous().numpy().tobytes() for i in range(12)}
    train, test = load_splits(spec, test="none", feeding="stream")
    assert (len(train), len(test)) == (12, 0)


@pytest.mark.parametrize("place", [".", ".."])
def test_names_of_classes(root: Path, place: str) -> None:
    (root / place / "classes.txt").write_text("ant\nbee\ncrane\ncrane\n\n")
    for dataset in load_splits(f"wds:{root}", feeding="stream"):
        assert dataset.class_names == ("ant", "bee", "crane", "crane")


def test_images_without_labels(root: Path, tmp_path: Path) -> None:
    alone = {f"{i}.jpg": picture(i) for i in range(3)} | {"1.json": b'{"text": "label"}'}
    write_shard(tmp_path / "alone-0.tar", alone)
    train, test = load_splits(f"wds:{tmp_path}/alone-0.tar", test="none", feeding="stream")
    assert not train.labelled
    assert train.labels.tolist() == [-1] * 3
    assert len(test) == 0
    train, test = load_splits(f"wds:{root}", no_labels=True, feeding="stream")
    assert not train.labelled
    assert train.class_names == test.class_names == ("0", "1", "2")


def test_workers(root: Path) -> None:
    dataset = load(root)
    dataset.load(0)  # the file is open here before there are workers
    policy, order = view_policy("resized-crop-flip"), torch.randperm(12)
    feed, alone = (
        ViewFeed(dataset, policy, torch.device("cpu"), image_size=8, workers=n) for n in (2, 0)
    )
    pixels = torch.cat([batch.pixels for batch in feed.batches(order, 3, 5)])
    feed.close()
    (batch,) = alone.batches(torch.arange(12), 3, 12)
    assert torch.equal(pixels, batch.pixels[order])


def test_few_files_are_open_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads go on reading a file that another has let go."""
    few = functools.lru_cache(1)(tar_reader._opened.__wrapped__)
    monkeypatch.setattr(tar_reader, "_opened", few)
    dataset, wrong = load(root), list[int]()
    known = [pixels_of(picture(i)) for i in range(12)]
    before = len(os.listdir("/proc/self/fd"))

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 12, 60).tolist():
            if not torch.equal(dataset.load(i), known[i]):
                wrong.append(i)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The shards of every indexing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    found: list[list[str]] = []
    index = wds.index_shards

    def spy(base: Path, names: list[str], labelled: bool) -> Any:
        found.append([*names])
        return index(base, names, labelled)

    monkeypatch.setattr(wds, "index_shards", spy)
    return found


def settle(root: Path) -> None:
    for path in root.glob("*.tar"):
        os.utime(path, (1.6e9, 1.6e9))


def test_shards_are_indexed_once(root: Path, scans: list[list[str]]) -> None:
    settle(root)
    first, again = load(root), load(root)
    assert scans == [[f"x-train-{i:03}.tar" for i in range(3)]]
    assert again.images_digest == first.images_digest
    assert torch.equal(again.labels, first.labels)
    assert torch.equal(again.load(9), first.load(9))
    part = load(root / "x-train-{000..001}.tar", test="none")  # other shards, another index
    assert len(part) == 8
    load(root, no_labels=True)
    load(root, rescan=True)
    assert [len(names) for names in scans] == [3, 2, 3, 3]


@pytest.mark.parametrize("change", ["label", "image", "order"])
def test_a_changed_shard_is_indexed_again(root: Path, scans: list[list[str]], change: str) -> None:
    settle(root)
    before = load(root)
    members = samples([1, 2, 0, 1], 4)
    if change == "label":
        members["000005.cls"] = b"0"
    elif change == "image":
        members["000005.jpg"] = picture(5, side=3)
    else:
        members = dict(reversed(members.items()))
    write_shard(root / "x-train-001.tar", members)
    after = load(root)
    assert len(scans) == 2
    assert (after.images_digest == before.images_digest) == (change == "label")
    assert (after.labels_digest == before.labels_digest) == (change == "image")
    with pytest.raises(DatasetError, match="has changed since it was indexed"):
        before.load(5)


def test_broken_images_are_found_and_left_out(root: Path, tmp_path: Path) -> None:
    members = samples([1, 2, 0, 1], 4)
    good, next_one = load(root), pixels_of(picture(7))
    name, size = "x-train-001.tar/000006.jpg", len(members["000006.jpg"])
    members["000006.jpg"] = members["000006.jpg"][:99]
    write_shard(root / "x-train-001.tar", members)
    with pytest.raises(DatasetError, match=rf"image .*{name}: Truncated File Read") as raised:
        load(root).load(6)
    assert f"pipeline check-data wds:{root} --skip-out" in str(raised.value)
    checked = check_data(f"wds:{root}")
    (broken,) = checked.broken
    assert broken.name == f"train/{name}"
    write_skip_list(tmp_path / "skip.txt", checked.broken)
    skips = read_skip_list(tmp_path / "skip.txt")
    left = load(root, skips=skips)
    assert left.skipped.tolist() == [6]
    assert not left.load(6).any()
    assert torch.equal(left.load(7), next_one)
    # The size that it had makes these the images of a cache from before.
    assert left.images_digest != good.images_digest
    known = [Skip("train", None, name, size)]
    assert load(root, skips=known).images_digest == good.images_digest
    train, test = load_splits(f"wds:{root}", test="0.25", skips=skips, feeding="stream")
    assert len(train.skipped) + len(test.skipped) == 1
    # The list has the size that it has now: the images stay these when the shard is mended.
    assert broken.size == 99
    write_shard(root / "x-train-001.tar", samples([1, 2, 0, 1], 4))
    assert load(root, skips=skips).images_digest == left.images_digest


def test_check_data_says_what_is_not_taken(root: Path) -> None:
    members = {**samples([0, 1], 50), "000050.txt": b"x", "9.cls": b"1"}
    write_shard(root / "x-val-000.tar", members)
    found = {(f.split, f.name, f.what) for f in check_data(f"wds:{root}").findings}
    assert ("test", "x-val-000.tar", "1 .txt") in found
    assert ("test", "x-val-000.tar", "1 class without image") in found


def spoil(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def compress(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def with_members(**changes: bytes | None) -> Any:
    """Write the shard again with other members; `_` stands for a dot."""

    def change(path: Path) -> None:
        named = {name.replace("_", "."): content for name, content in changes.items()}
        members = {**samples([0, 1, 2, 0]), **named}
        write_shard(path, {n: c for n, c in members.items() if c is not None})

    return change


SIZE = tarfile.BLOCKSIZE
PAIR = SIZE * (3 + -(-len(picture(0)) // SIZE))
"""Bytes of an image and its class, each with a header."""
LARGE_JSON = b'{"label": 1, "' + b"x" * (2**20 - 1) + b'":2}'
WRONG = {
    "missing": (Path.unlink, "no shard .*x-train-000"),
    "cut in an image": (
        lambda p: os.truncate(p, SIZE + 100),
        "no whole tar file: unexpected end of data",
    ),
    "cut before a class": (lambda p: os.truncate(p, PAIR - SIZE), "unexpected end of data"),
    "cut between members": (lambda p: os.truncate(p, PAIR), "the mark of its end is missing"),
    "cut in a header": (lambda p: os.truncate(p, PAIR + 9), "the mark of its end is missing"),
    "no bytes": (lambda p: os.truncate(p, 0), "no whole tar file: empty file"),
    "spoilt header": (lambda p: spoil(p, PAIR, b"xyz"), r"end is missing \(1 images before\)"),
    "no tar": (lambda p: p.write_bytes(b"hello" * 500), "no whole tar file: invalid header"),
    "compressed": (compress, r"is compressed \(gzip\)"),
    "empty": (lambda p: write_shard(p, {}), r"has no images\n"),
    "no label": (with_members(**{"000001_cls": None}), r"000001\.jpg has no label, 11 other"),
    "two images": (
        with_members(**{"000001_png": picture(1, "PNG")}),
        r"two images of the key 000001: 000001\.jpg and 000001\.png",
    ),
    "text": (with_members(**{"000001_cls": b"cat"}), r"000001\.cls is 'cat', no class number"),
    "fraction": (with_members(**{"000001_cls": b"1.5"}), "'1.5', no class number"),
    "huge": (with_members(**{"000001_cls": b"9999999"}), r"000001\.cls is 9999999\n"),
    "json text": (
        with_members(**{"000001_cls": None, "000001_json": b'{"label": [1]}'}),
        r"000001\.json is '\[1\]', no class number",
    ),
    "large json": (
        with_members(**{"000001_cls": None, "000001_json": LARGE_JSON}),
        r"000001\.json has 1,048,593 bytes, a label at most 1,048,576\n.*KEY\.cls",
    ),
    "no json": (with_members(**{"000001_json": b"{'label': 1}"}), r"000001\.json is no JSON"),
}


def test_a_large_json_is_not_read_beside_a_class(root: Path) -> None:
    path = root / "x-train-000.tar"
    before = load(path, test="none").labels
    with_members(**{"000001_json": LARGE_JSON})(path)
    assert torch.equal(load(path, test="none").labels, before)
    write_shard(path, {"0.jpg": picture(0), "0.json": LARGE_JSON})
    assert not load(path, test="none", no_labels=True).labelled


@pytest.mark.parametrize("kind", WRONG)
def test_shards_that_cannot_be_used(root: Path, kind: str) -> None:
    change, message = WRONG[kind]
    change(root / "x-train-000.tar")
    with pytest.raises(DatasetError, match=message) as raised:
        load(root / "x-train-{000..002}.tar", test="none")
    assert str(raised.value).count("\n") <= 2


def test_labels_out_of_range(root: Path) -> None:
    write_shard(root / "x-val-000.tar", samples([0, 3], 50))
    with pytest.raises(DatasetError, match=r"000051\.jpg is 3, and there are 3 classes"):
        load(root, "test")
    (root / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DatasetError, match=r"is 3, and there are 2 classes\n.*classes\.txt"):
        load(root, "test")
    write_shard(root / "x-val-000.tar", {"a.jpg": picture(1)})
    with pytest.raises(DatasetError, match=r"test images of .* have no labels"):
        load(root, "test")


def test_labels_that_count_from_one(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.tar", samples([1, 2, 3]))
    with pytest.raises(DatasetError, match="begin with 1"):
        load(tmp_path, test="none")
    (tmp_path / "classes.txt").write_text("none\na\nb\nc\n")
    assert load(tmp_path, test="none").labels.tolist() == [1, 2, 3]


def test_skip_lists_that_name_nothing(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"x-train-000\.tar/9\.jpg, which is not among"):
        load(root, skips=[Skip("train", None, "x-train-000.tar/9.jpg", 5)])
    with pytest.raises(DatasetError, match=r"sample 12 of .*, which has 12"):
        load(root, skips=[Skip("train", 12)])


def test_a_shard_that_goes_while_it_is_read(root: Path) -> None:
    dataset = load(root)
    (root / "x-train-002.tar").unlink()
    tar_reader._opened.cache_clear()
    with pytest.raises(DatasetError, match=r"x-train-002\.tar/000009\.jpg: No such file"):
        dataset.load(9)
