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
import torch
from PIL import Image

from stages.errors import DatasetError
from stages.inputs.datasets import (
    PUBLISHED_STATISTICS,
    SOURCES,
    ImageDataset,
    Source,
    Split,
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


# ---- digits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "size"), [("train", 1000), ("test", 797)])
def test_digits(split: Split, size: int) -> None:
    digits = load_dataset("digits", split)
    assert len(digits) == size
    assert digits.shape == (1, 8, 8)
    assert digits.images is not None
    assert digits.images.shape == (size, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    assert digits.labels.dtype == torch.int64
    assert sorted(set(digits.labels.tolist())) == list(range(10))
    assert digits.class_names == tuple("0123456789")


# ---- folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("feeding", ["auto", "memory", "stream"])
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


def test_grey_folder(tmp_path: Path) -> None:
    written = {"a/0.png": noise(4, 7), "b/0.png": noise(4, 7, seed=1)}
    write_images(tmp_path / "train", written)
    dataset = load_dataset(f"folder:{tmp_path}", "train")
    assert dataset.shape == (1, 4, 7)
    for seen, pixels in zip(pixels_of(dataset), written.values(), strict=True):
        assert np.array_equal(seen[0], pixels)


@pytest.mark.parametrize("feeding", ["auto", "memory", "stream"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_one_colour_image_among_grey_ones_makes_them_colour(
    tmp_path: Path, feeding: Feeding, first: bool
) -> None:
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
    assert [x.shape for x in pixels_of(dataset)] == [(1, 6, 5), (1, 5, 6), (1, 9, 9)]
    with pytest.raises(DatasetError, match="differ in size"):
        load_dataset(f"folder:{tmp_path}", "train", feeding="memory")


# ---- digests --------------------------------------------------------------------------------


def folder_digests(folder: Path, feeding: Feeding = "auto") -> tuple[str, str]:
    dataset = load_dataset(f"folder:{folder}", "train", feeding=feeding)
    return dataset.images_digest, dataset.labels_digest


def test_digests_do_not_depend_on_feeding(folder: Path) -> None:
    assert folder_digests(folder, "memory") == folder_digests(folder, "stream")


def test_digests_do_not_depend_on_the_place(folder: Path) -> None:
    before = folder_digests(folder)
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert folder_digests(moved) == before


def replace_file(train: Path) -> None:
    write_images(train, {"ant/b.png": noise(20, 20, 3)})  # of another size in bytes


def rename_file(train: Path) -> None:
    (train / "ant/b.png").rename(train / "ant/c.png")


def add_file(train: Path) -> None:
    write_images(train, {"bee/zz.png": noise(6, 5, 3)})


def relabel_file(train: Path) -> None:
    (train / "ant/b.png").rename(train / "cat/b.png")


@pytest.mark.parametrize(
    ("change", "labels_change"),
    [
        pytest.param(replace_file, False, id="another file"),
        pytest.param(rename_file, False, id="another name"),
        pytest.param(add_file, True, id="one more file"),
        pytest.param(relabel_file, True, id="another label"),
    ],
)
def test_folder_digests_change(
    folder: Path, change: Callable[[Path], None], labels_change: bool
) -> None:
    images, labels = folder_digests(folder)
    change(folder / "train")
    changed_images, changed_labels = folder_digests(folder)
    assert changed_images != images
    assert (changed_labels != labels) == labels_change


ARRAYS = """
import numpy as np

class Arrays:
    def __init__(self):
        self.images = np.arange(4 * 3 * 2 * 3, dtype=np.uint8).reshape(4, 3, 2, 3)
        self.targets = [0, 1, 1, 2]

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.images[i], self.targets[i]

def same(split):
    return Arrays()

def pixel(split):
    changed = Arrays()
    changed.images[2, 1, 1, 0] += 1
    return changed

def label(split):
    changed = Arrays()
    changed.targets[3] = 0
    return changed

def reshaped(split):
    changed = Arrays()
    changed.images = changed.images.reshape(4, 2, 3, 3)
    return changed
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


# ---- module:callable ------------------------------------------------------------------------

KINDS = """
import numpy as np
import torch
from PIL import Image

HWC = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)

class Listed(list):
    pass

def arrays(split):
    return [(x, i) for i, x in enumerate(HWC)]

def tensors(split):
    return [(torch.from_numpy(x).permute(2, 0, 1), i) for i, x in enumerate(HWC)]

def pil(split):
    return [(Image.fromarray(x), i) for i, x in enumerate(HWC)]

def grey(split):
    return [(x[..., 0], i) for i, x in enumerate(HWC)]

def named(split):
    listed = Listed(arrays(split))
    listed.classes = ["x", "y", "z", split]
    listed.targets = np.array([2, 0, 2])
    return listed

def float_tensors(split):
    return [(torch.rand(3, 4, 5), i) for i in range(3)]

def batches(split):
    return [(torch.zeros(1, 3, 4, 5, dtype=torch.uint8), i) for i in range(3)]

def empty(split):
    return []

def one_class(split):
    return [(HWC[0], 0)] * 3

def with_targets(targets, classes=("x", "y", "z")):
    listed = Listed((x, 0) for x in HWC)
    listed.classes, listed.targets = classes, targets
    return listed

def labels_too_few(split):
    return with_targets([0, 1])

def labels_too_many(split):
    return with_targets([0, 1, 2, 0])

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


def test_callable_of_grey_arrays(importable: Importable) -> None:
    dataset = load_dataset(f"{importable(KINDS)}:grey", "train")
    expected = np.arange(180, dtype=np.uint8).reshape(3, 1, 4, 5, 3)[..., 0]
    assert np.array_equal(np.stack(pixels_of(dataset)), expected)


def test_callable_with_names_and_targets(importable: Importable) -> None:
    dataset = load_dataset(f"{importable(KINDS)}:named", "test")
    assert dataset.class_names == ("x", "y", "z", "test")
    assert dataset.labels.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("float_tensors", r"image \d is torch.float32", id="float tensor"),
        pytest.param("batches", r"image \d is torch.uint8 of shape \(1, 3, 4, 5\)", id="4-D"),
        pytest.param("empty", "has 0 images in 0 class", id="empty"),
        pytest.param("one_class", r"has 3 images in 1 class\(es\)", id="one class"),
        pytest.param("labels_too_few", "has 3 images and 2 labels", id="too few labels"),
        pytest.param("labels_too_many", "has 3 images and 4 labels", id="too many labels"),
        pytest.param("nothing", "cannot import dataset 'user_dataset_", id="no such attribute"),
    ],
)
def test_bad_callables(importable: Importable, kind: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_dataset(f"{importable(KINDS)}:{kind}", "train")


def test_callable_of_no_module() -> None:
    with pytest.raises(DatasetError, match=r"cannot import dataset 'no_such_module:x'.*\n.*import"):
        load_dataset("no_such_module:x", "train")
    with pytest.raises(DatasetError, match=r"cannot import dataset ':x'.*\n.*import"):
        load_dataset(":x", "train")


# ---- statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize("feeding", ["memory", "stream"])
def test_statistics(folder: Path, feeding: Feeding) -> None:
    dataset = load_dataset(f"folder:{folder}", "train", feeding=feeding)
    stacked = np.stack(list(colour_images().values())) / 255  # (N, H, W, C)
    mean, std = dataset.statistics()
    assert mean == pytest.approx(stacked.mean((0, 1, 2)), abs=1e-4)
    assert std == pytest.approx(stacked.std((0, 1, 2), ddof=1), abs=1e-4)


def test_statistics_weigh_pixels_where_sizes_differ(tmp_path: Path) -> None:
    images = {"a/0.png": np.full((2, 2), 255, np.uint8), "b/0.png": np.zeros((2, 6), np.uint8)}
    write_images(tmp_path / "train", images)
    mean, std = load_dataset(f"folder:{tmp_path}", "train").statistics()
    assert mean == (0.25,)
    assert std == pytest.approx([np.std([1] * 4 + [0] * 12, ddof=1)], abs=1e-4)


def test_constant_images_have_a_positive_deviation(tmp_path: Path) -> None:
    images = {name: np.full((4, 4), 51, np.uint8) for name in ("a/0.png", "b/0.png")}
    write_images(tmp_path / "train", images)
    mean, std = load_dataset(f"folder:{tmp_path}", "train").statistics()
    assert mean == (0.2,)
    assert std[0] > 0


# ---- torchvision ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_torchvision_dataset_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=f"{name} is missing or corrupt in") as caught:
        load_dataset(name, "train", root=str(tmp_path))
    assert "--download" in caught.value.remedy
    assert "--root" in caught.value.remedy


def test_imagenet_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="ImageNet is missing or incomplete in") as caught:
        load_dataset("imagenet", "test", root=str(tmp_path))
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


# ---- errors ---------------------------------------------------------------------------------


def test_one_class(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"only/0.png": noise(4, 4)})
    with pytest.raises(DatasetError, match=r"has 1 images in 1 class\(es\)"):
        load_dataset(f"folder:{tmp_path}", "train")


def test_classes_of_the_splits_differ(folder: Path) -> None:
    (folder / "test" / "bee").rename(folder / "test" / "wasp")
    with pytest.raises(DatasetError, match="split differ: bee, wasp"):
        load_splits(f"folder:{folder}")


@pytest.mark.parametrize("spec", ["cifar", "digits:", "", "module:"])
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
