import gzip
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from stages.errors import DatasetError
from stages.inputs.datasets import (
    PUBLISHED_STATISTICS,
    SOURCES,
    ImageDataset,
    Source,
    load_dataset,
    load_splits,
)
from stages.inputs.datasets.dataset import dataset as registered
from stages.settings import Feeding

Pixels = npt.NDArray[np.uint8]
_fresh = itertools.count()


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path, images: Mapping[str, Pixels]) -> None:
    """images: 'class/file' -> (H, W) or (H, W, 3)."""
    for name, pixels in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)


def colour_images() -> dict[str, Pixels]:
    names = ("cat/10.png", "cat/2.png", "ant/b.png", "ant/a.PNG", "bee/z.bmp")
    return {name: noise(6, 5, 3, seed=i) for i, name in enumerate(names)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five colour images in three classes, the same for training and test."""
    for split in ("train", "test"):
        write_images(tmp_path / split, colour_images())
    return tmp_path


Importable = Callable[[str], str]


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Importable:
    """Writes source to a module of its own and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"user_dataset_{next(_fresh)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def pixels_of(dataset: ImageDataset) -> list[Pixels]:
    """(C, H, W) of every image, as `load` gives them."""
    return [dataset.load(i).numpy() for i in range(len(dataset))]


# ---- folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("feeding", ["auto", "stream"])
def test_folder(folder: Path, feeding: Feeding) -> None:
    dataset = load_dataset(f"folder:{folder}", "train", feeding=feeding)
    written = colour_images()
    order = ["ant/a.PNG", "ant/b.png", "bee/z.bmp", "cat/10.png", "cat/2.png"]
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.labels.tolist() == [0, 0, 1, 2, 2]
    assert dataset.shape == (3, 6, 5)
    assert (dataset.images is None) == (feeding == "stream")
    for seen, name in zip(pixels_of(dataset), order, strict=True):
        assert np.array_equal(seen, written[name].transpose(2, 0, 1))
    if dataset.images is not None:
        assert np.array_equal(dataset.images.numpy(), np.stack(pixels_of(dataset)))


@pytest.mark.parametrize("feeding", ["auto", "stream"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_one_colour_image_makes_all_colour(tmp_path: Path, feeding: Feeding, first: bool) -> None:
    written = {f"{c}/{i}.png": noise(4, 4, seed=i) for c in "ab" for i in range(3)}
    colour = "a/0.png" if first else "b/2.png"
    written[colour] = noise(4, 4, 3)
    write_images(tmp_path / "train", written)
    dataset = load_dataset(f"folder:{tmp_path}", "train", feeding=feeding)
    assert dataset.shape == (3, 4, 4)
    for seen, (name, pixels) in zip(pixels_of(dataset), sorted(written.items()), strict=True):
        wanted = pixels.transpose(2, 0, 1) if name == colour else np.stack([pixels] * 3)
        assert np.array_equal(seen, wanted)


def test_a_colour_image_that_turns_up_among_grey_ones_is_named(tmp_path: Path) -> None:
    """As beyond the files that decide: they are looked at when the dataset is loaded."""
    write_images(tmp_path / "train", {"a/0.png": noise(4, 4), "b/0.png": noise(4, 4)})
    dataset = load_dataset(f"folder:{tmp_path}", "train", feeding="stream")
    write_images(tmp_path / "train", {"b/0.png": noise(4, 4, 3)})
    assert dataset.load(0).shape == (1, 4, 4)
    with pytest.raises(DatasetError, match=r"image .*b/0\.png is in colour, others .* are grey"):
        dataset.load(1)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_kinds_of_grey(tmp_path: Path, mode: str) -> None:
    write_images(tmp_path / "train", {"a/0.png": np.full((4, 4), 255, np.uint8)})
    (tmp_path / "train/b").mkdir()
    Image.fromarray(np.full((4, 4), 255, np.uint8)).convert(mode).save(tmp_path / "train/b/0.png")
    dataset = load_dataset(f"folder:{tmp_path}", "train")
    assert dataset.shape == (1, 4, 4)
    assert (np.stack(pixels_of(dataset)) == 255).all()


def test_splits_of_different_channels_are_refused(tmp_path: Path) -> None:
    for split, pixels in (("train", noise(4, 4)), ("test", noise(4, 4, 3))):
        write_images(tmp_path / split, {"a/0.png": pixels, "b/0.png": pixels})
    with pytest.raises(
        DatasetError, match=r"training images have 1 channel\(s\), its test images 3"
    ):
        load_splits(f"folder:{tmp_path}")


@pytest.mark.parametrize("large", [129, 128], ids=["larger", "at the limit"])
def test_large_images_are_streamed(tmp_path: Path, large: int) -> None:
    write_images(tmp_path / "train", {f"{c}/0.png": noise(128, large) for c in "ab"})
    auto = load_dataset(f"folder:{tmp_path}", "train")
    assert (auto.images is None) == (large > 128)
    assert load_dataset(f"folder:{tmp_path}", "train", feeding="memory").images is not None


def test_images_of_differing_sizes(tmp_path: Path) -> None:
    written = {"a/0.png": noise(6, 5), "a/1.png": noise(5, 6), "b/0.png": noise(9, 9)}
    write_images(tmp_path / "train", written)
    dataset = load_dataset(f"folder:{tmp_path}", "train")
    assert dataset.images is None
    for seen, pixels in zip(pixels_of(dataset), written.values(), strict=True):
        assert np.array_equal(seen, pixels[None])
    with pytest.raises(DatasetError, match="differ in size"):
        load_dataset(f"folder:{tmp_path}", "train", feeding="memory")


def folder_digests(folder: Path, feeding: Feeding = "auto") -> tuple[str, str]:
    dataset = load_dataset(f"folder:{folder}", "train", feeding=feeding)
    return dataset.images_digest, dataset.labels_digest


def test_digests_depend_on_neither_feeding_nor_place(folder: Path) -> None:
    before = folder_digests(folder, "memory")
    assert folder_digests(folder, "stream") == before
    assert folder_digests(folder.rename(folder.with_name("moved"))) == before


NAME = "ant/b.png"


@pytest.mark.parametrize(
    ("change", "labels_change"),
    [
        pytest.param(lambda f: write_images(f, {NAME: noise(20, 20, 3)}), False, id="file"),
        pytest.param(lambda f: (f / NAME).rename(f / "ant/c.png"), False, id="name"),
        pytest.param(lambda f: write_images(f, {"bee/zz.png": noise(6, 5, 3)}), True, id="more"),
        pytest.param(lambda f: (f / NAME).rename(f / "cat/b.png"), True, id="label"),
    ],
)
def test_digests_change(folder: Path, change: Callable[[Path], None], labels_change: bool) -> None:
    images, labels = folder_digests(folder)
    change(folder / "train")
    changed_images, changed_labels = folder_digests(folder)
    assert changed_images != images
    assert (changed_labels != labels) == labels_change


ARRAYS = """
import numpy as np

def made(images=None, targets=(0, 1, 1, 2)):
    if images is None:
        images = np.arange(4 * 3 * 2 * 3, dtype=np.uint8).reshape(4, 3, 2, 3)
    return [*zip(images, targets)]

def same(split):
    return made()

def pixel(split):
    images = np.stack([image for image, _ in made()])
    images[2, 1, 1, 0] += 1
    return made(images)

def label(split):
    return made(targets=(0, 1, 1, 0))

def reshaped(split):
    return made([image.reshape(2, 3, 3) for image, _ in made()])
"""


@pytest.mark.parametrize("feeding", ["memory", "stream"])
def test_array_digests(importable: Importable, feeding: Feeding) -> None:
    module = importable(ARRAYS)
    names = ("same", "pixel", "label", "reshaped")
    same, pixel, label, reshaped = (
        load_dataset(f"{module}:{name}", "train", feeding=feeding) for name in names
    )
    assert pixel.images_digest != same.images_digest
    assert pixel.labels_digest == same.labels_digest
    assert label.images_digest == same.images_digest
    assert label.labels_digest != same.labels_digest
    assert reshaped.images_digest != same.images_digest
    in_memory = load_dataset(f"{module}:same", "train", feeding="memory")
    assert same.images_digest == in_memory.images_digest


KINDS = """
import numpy as np
import torch
from PIL import Image

HWC = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)

class Listed(list):
    pass

def of(change):
    return lambda split: [(change(x), i) for i, x in enumerate(HWC)]

arrays = of(lambda x: x)
tensors = of(lambda x: torch.from_numpy(x).permute(2, 0, 1))
pil = of(Image.fromarray)
grey = of(lambda x: x[..., 0])
float_tensors = of(lambda x: torch.rand(3, 4, 5))
batches = of(lambda x: torch.zeros(1, 3, 4, 5, dtype=torch.uint8))
empty = lambda split: []
one_class = lambda split: [(HWC[0], 0)] * 3

def named(split, targets=(2, 0, 2)):
    listed = Listed(arrays(split))
    listed.classes, listed.targets = ["x", "y", "z", split], np.array(targets)
    return listed

labels_too_few = lambda split: named(split, (0, 1))
"""


@pytest.mark.parametrize("feeding", ["memory", "stream"])
@pytest.mark.parametrize("kind", ["arrays", "tensors", "pil"])
def test_callable(importable: Importable, kind: str, feeding: Feeding) -> None:
    dataset = load_dataset(f"{importable(KINDS)}:{kind}", "train", feeding=feeding)
    expected = np.arange(180, dtype=np.uint8).reshape(3, 4, 5, 3).transpose(0, 3, 1, 2)
    assert np.array_equal(np.stack(pixels_of(dataset)), expected)
    assert dataset.labels.tolist() == [0, 1, 2]
    assert dataset.class_names == ("0", "1", "2")
    assert (dataset.images is None) == (feeding == "stream")


def test_callable_of_grey_arrays_and_with_names_and_targets(importable: Importable) -> None:
    module = importable(KINDS)
    dataset = load_dataset(f"{module}:grey", "train")
    expected = np.arange(180, dtype=np.uint8).reshape(3, 1, 4, 5, 3)[..., 0]
    assert np.array_equal(np.stack(pixels_of(dataset)), expected)
    dataset = load_dataset(f"{module}:named", "test")
    assert dataset.class_names == ("x", "y", "z", "test")
    assert dataset.labels.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("float_tensors", r"image \d is torch.float32"),
        ("batches", r"image \d is torch.uint8 of shape \(1, 3, 4, 5\)"),
        ("empty", "has 0 images in 0 class"),
        ("one_class", r"has 3 images in 1 class\(es\)"),
        ("labels_too_few", "has 3 images and 2 labels"),
        ("nothing", "cannot import dataset 'user_dataset_"),
    ],
)
def test_bad_callables(importable: Importable, kind: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_dataset(f"{importable(KINDS)}:{kind}", "train")


@pytest.mark.parametrize("feeding", ["memory", "stream"])
def test_statistics(folder: Path, feeding: Feeding) -> None:
    dataset = load_dataset(f"folder:{folder}", "train", feeding=feeding)
    stacked = np.stack(list(colour_images().values())) / 255  # (N, H, W, C)
    mean, std = dataset.statistics()
    assert mean == pytest.approx(stacked.mean((0, 1, 2)), abs=1e-4)
    assert std == pytest.approx(stacked.std((0, 1, 2), ddof=1), abs=1e-4)


def test_statistics_of_pixels_that_are_alike_or_of_several_sizes(tmp_path: Path) -> None:
    """Pixels are weighed, not images; a deviation is positive."""
    images = {"a/0.png": np.full((2, 2), 255, np.uint8), "b/0.png": np.zeros((2, 6), np.uint8)}
    write_images(tmp_path / "1" / "train", images)
    mean, std = load_dataset(f"folder:{tmp_path / '1'}", "train").statistics()
    assert mean == (0.25,)
    assert std == pytest.approx([np.std([1] * 4 + [0] * 12, ddof=1)], abs=1e-4)
    constant = np.full((4, 4), 51, np.uint8)
    write_images(tmp_path / "2" / "train", {"a/0.png": constant, "b/0.png": constant})
    mean, std = load_dataset(f"folder:{tmp_path / '2'}", "train").statistics()
    assert mean == (0.2,)
    assert std[0] > 0


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "imagenet"])
def test_a_torchvision_dataset_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=r"(?i)is missing or (corrupt|incomplete) in") as caught:
        load_dataset(name, "train", root=str(tmp_path))
    assert name in str(caught.value).lower()
    assert ("--download" in caught.value.remedy) == (name != "imagenet")
    assert "--root" in caught.value.remedy


def test_fashion_mnist_from_its_files(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = noise(6, 28, 28), np.array([3, 0, 9, 9, 1, 2], np.uint8)
    header = np.array([0x803, 6, 28, 28], ">i4").tobytes(), np.array([0x801, 6], ">i4").tobytes()
    for split in ("train", "t10k"):
        for kind, content in (
            ("images-idx3", header[0] + images.tobytes()),
            ("labels-idx1", header[1] + labels.tobytes()),
        ):
            (raw / f"{split}-{kind}-ubyte").write_bytes(content)
            (raw / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    dataset = load_dataset("fashion-mnist", "test", root=str(tmp_path))
    assert np.array_equal(np.stack(pixels_of(dataset))[:, 0], images)
    assert dataset.labels.tolist() == labels.tolist()
    assert dataset.class_names[9] == "Ankle boot"
    assert dataset.statistics() == PUBLISHED_STATISTICS["fashion-mnist"]


def test_cifar_is_turned_to_channels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fake(root: str, train: bool, download: bool) -> SimpleNamespace:
        asked.append((root, train, download))
        return SimpleNamespace(data=noise(2, 32, 32, 3), targets=[1, 0], classes=["a", "b"])

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    dataset = load_dataset("cifar10", "test", root="somewhere", download=True)
    assert asked == [("somewhere", False, True)]
    assert np.array_equal(np.stack(pixels_of(dataset)), noise(2, 32, 32, 3).transpose(0, 3, 1, 2))
    assert dataset.labels.tolist() == [1, 0]


def test_classes_of_the_splits_differ(folder: Path) -> None:
    (folder / "test" / "bee").rename(folder / "test" / "wasp")
    with pytest.raises(DatasetError, match="split differ: bee, wasp"):
        load_splits(f"folder:{folder}")


@pytest.mark.parametrize("spec", ["cifar", "digits:", "", "module:", "no_such_module:x", ":x"])
def test_unknown_dataset(spec: str) -> None:
    with pytest.raises(DatasetError, match=f"'{spec}'"):
        load_dataset(spec, "train")


def test_a_new_dataset_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "mine:", SOURCES["digits"])  # put back afterwards

    @registered("mine:")
    def mine(source: Source) -> ImageDataset:
        images = SOURCES["digits"](Source("digits", source.split))
        return replace(images, name=source.argument)

    assert load_dataset("mine:abc", "test").name == "abc"
