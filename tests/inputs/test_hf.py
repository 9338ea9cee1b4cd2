"""Datasets of Hugging Face's `datasets`, saved to disk."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from stages.check_data import check_data
from stages.errors import DatasetError
from stages.inputs.datasets import Skip, load_dataset, load_splits
from stages.inputs.datasets.compressed import SAMPLED_MODES
from stages.inputs.datasets.dataset import fixed_sample
from stages.inputs.feed import ViewFeed
from stages.inputs.probes import pixel_probes
from stages.inputs.views import view_policy

datasets = pytest.importorskip("datasets")

# Two workers are what is tested, also where a container grants one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")

CLASSES = ["ant", "bee", "cat"]
Pixels = npt.NDArray[np.uint8]


def pixels_of(i: int) -> Pixels:
    """(H, W, 3), each image of its own size."""
    return np.random.default_rng(i).integers(0, 256, (6 + i % 3, 9, 3), dtype=np.uint8)


def png(pixels: Pixels) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def table(
    images: list[Any] | None = None,
    labels: list[int | None] | None = None,
    more: dict[str, Any] | None = None,
    columns: dict[str, list[Any]] | None = None,
) -> Any:
    """A Dataset with the columns `id`, `picture` and `kind`; and more."""
    if images is None:
        images = [{"bytes": png(pixels_of(i)), "path": None} for i in range(7)]
    features = {
        "id": datasets.Value("string"),
        "picture": datasets.Image(),
        "kind": datasets.ClassLabel(names=CLASSES),
        **(more or {}),
    }
    values = {
        "id": [f"row {i}" for i in range(len(images))],
        "picture": images,
        "kind": labels or [i % 3 for i in range(len(images))],
        **(columns or {}),
    }
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def saved(root: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(root))
    return f"hf:{root}"


@pytest.fixture
def my_spec(tmp_path: Path) -> str:
    return saved(tmp_path / "set", train=table(), test=table())


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def test_images_labels_and_classes(my_spec: str, tmp_path: Path) -> None:
    """Nothing is written beside the data."""
    before = {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*")}
    dataset = load_dataset(my_spec, "train")
    assert (dataset.name, dataset.split) == ("hf", "train")
    assert dataset.class_names == tuple(CLASSES)
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert dataset.labels.dtype == torch.int64
    assert dataset.images is None  # they differ in size
    for i in range(7):
        assert np.array_equal(dataset.load(i).numpy(), pixels_of(i).transpose(2, 0, 1))
    assert {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_small_images_of_one_size_are_held_in_memory(tmp_path: Path) -> None:
    images = [{"bytes": png(pixels_of(3 * i)), "path": None} for i in range(5)]
    spec = saved(tmp_path / "set", train=table(images))
    dataset = load_dataset(spec, "train")
    assert dataset.images is not None
    assert np.array_equal(dataset.images[4].numpy(), pixels_of(12).transpose(2, 0, 1))
    streamed = load_dataset(spec, "train", feeding="stream")
    assert streamed.images is None
    assert streamed.images_digest == dataset.images_digest


@pytest.mark.parametrize("name", ["test", "validation", "val"])
def test_the_test_split_has_three_names(tmp_path: Path, name: str) -> None:
    train, test = load_splits(saved(tmp_path / "set", train=table(), **{name: table()}))
    assert (train.split, test.split) == ("train", "test")
    assert test.images_digest == train.images_digest


def test_labels_are_read_without_looking_at_an_image(tmp_path: Path) -> None:
    images = [{"bytes": png(pixels_of(i)), "path": None} for i in range(200)]
    broken = next(i for i in range(200) if i not in fixed_sample(200)[:SAMPLED_MODES])
    images[broken]["bytes"] = b"this is no image"
    dataset = load_dataset(saved(tmp_path / "set", train=table(images)), "train", feeding="stream")
    assert len(dataset.labels) == 200
    with pytest.raises(DatasetError, match=rf"cannot read image {broken} of .*\(train\)"):
        dataset.load(broken)


def test_a_selection_in_another_order_of_grey_images(tmp_path: Path) -> None:
    grey = [{"bytes": png(pixels_of(i)[..., 0]), "path": None} for i in range(6)]
    dataset = load_dataset(saved(tmp_path / "set", train=table(grey).select([5, 0, 4])), "train")
    assert dataset.labels.tolist() == [2, 0, 1]
    for i, row in enumerate((5, 0, 4)):
        assert np.array_equal(dataset.load(i).numpy(), pixels_of(row)[None, ..., 0])


def test_images_that_lie_in_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(png(pixels_of(i)))
    whole = load_dataset(saved(tmp_path / "s", train=table([*map(str, paths)])), "train")
    paths[1].unlink()
    assert np.array_equal(whole.load(1).numpy(), pixels_of(1).transpose(2, 0, 1))


def test_digests(tmp_path: Path) -> None:
    def digests(name: str, *arguments: Any) -> tuple[str, str]:
        dataset = load_dataset(saved(tmp_path / name, train=table(*arguments)), "train")
        return dataset.images_digest, dataset.labels_digest

    same = [{"bytes": png(pixels_of(i)), "path": None} for i in range(7)]
    other = [*same[:4], {"bytes": png(pixels_of(99)), "path": None}, *same[5:]]
    first = digests("first")
    assert digests("again", same) == first
    assert digests("pixels", other)[0] != first[0]
    assert digests("pixels-labels", other)[1] == first[1]
    assert digests("order", same[::-1])[0] != first[0]
    relabelled = digests("labels", same, [1, 1, 2, 0, 1, 2, 0])
    assert (relabelled[0] == first[0], relabelled[1] == first[1]) == (True, False)


def test_workers(my_spec: str) -> None:
    dataset = load_dataset(my_spec, "train", feeding="stream")
    policy, order = view_policy("resized-crop-flip"), torch.tensor([6, 2, 5, 0, 1, 3, 4])
    feed, alone = (
        ViewFeed(dataset, policy, torch.device("cpu"), image_size=8, workers=n) for n in (2, 0)
    )
    pixels = torch.cat([batch.pixels for batch in feed.batches(order, 3, 2)])
    feed.close()
    (batch,) = alone.batches(torch.arange(7), 3, 7)
    assert torch.equal(pixels, batch.pixels[order])
    assert len(set(pixel_probes(dataset, policy, 8))) > 200


ALSO = {
    "coarse": (datasets.ClassLabel(names=["x", "y"]), [0] * 7),
    "mask": (datasets.Image(), [{"bytes": png(pixels_of(0)), "path": None}] * 7),
}


@pytest.mark.parametrize(
    ("added", "dropped", "message"),
    [
        ("coarse", None, r"2 columns of type ClassLabel: id \(Value\), picture \(Image\), kind"),
        ("mask", None, r"2 columns of type Image: .*mask \(Image\)"),
        (None, "kind", r"no columns of type ClassLabel: id \(Value\), picture \(Image\)"),
        (None, "picture", r"no columns of type Image: id \(Value\), kind \(ClassLabel\)"),
    ],
)
def test_unclear_columns(
    tmp_path: Path, added: str | None, dropped: str | None, message: str
) -> None:
    if added is None:
        made = table().remove_columns([dropped])
    else:
        feature, values = ALSO[added]
        made = table(more={added: feature}, columns={added: values})
    with pytest.raises(DatasetError, match=message):
        load_dataset(saved(tmp_path / "set", train=made), "train")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None, 2, 0, 1, 2], "column 'kind' of .* has missing labels"),
        ([-1] * 7, "labels from -1 to -1 for 3 classes"),
    ],
)
def test_missing_and_hidden_labels(tmp_path: Path, labels: list[int | None], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_dataset(saved(tmp_path / "set", train=table(labels=labels)), "train")


def test_a_missing_image(tmp_path: Path) -> None:
    images = [{"bytes": png(pixels_of(i)), "path": None} for i in range(3)]
    made = table([*images, None])
    spec = saved(tmp_path / "set", train=made)
    with pytest.raises(DatasetError, match=r"image 3 of .*\(train\) is missing"):
        load_dataset(spec, "train").load(3)
    left_out = load_dataset(spec, "train", skips=[Skip("train", 3)])
    assert left_out.shown.tolist() == [0, 1, 2]
    assert not bool(left_out.load(3).any())


def test_one_split_alone(tmp_path: Path) -> None:
    spec = saved(tmp_path / "set", train=table())
    with pytest.raises(DatasetError, match="no split test or validation or val, only train"):
        load_dataset(spec, "test")
    table().save_to_disk(str(tmp_path / "one"))
    with pytest.raises(DatasetError, match="no split train, only none"):
        load_dataset(f"hf:{tmp_path / 'one'}", "train")


@pytest.mark.parametrize("kind", ["missing", "empty", "other"])
def test_a_folder_that_is_not_one(tmp_path: Path, kind: str) -> None:
    root = tmp_path / kind
    if kind != "missing":
        root.mkdir()
    if kind == "other":
        (root / "dataset_dict.json").write_text("not json")
    with pytest.raises(DatasetError, match=r"cannot read .*\n.*save_to_disk"):
        load_dataset(f"hf:{root}", "train")


def test_the_package_is_missing(my_spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"`datasets`\npip install 'teacher-cache\[hf\]'"):
        load_dataset(my_spec, "train")


def test_missing_and_broken_images_are_all_found(tmp_path: Path) -> None:
    images = [{"bytes": png(pixels_of(i)), "path": None} for i in range(7)]
    bad = table([None, *images[1:5], {"bytes": b"no image", "path": None}, images[6]])

    findings = check_data(saved(tmp_path / "set", train=bad, test=table())).findings

    assert [f.name for f in findings if f.kind == "broken"] == ["train:0", "train:5"]
