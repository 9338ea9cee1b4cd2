"""What a teacher's run leaves, measured again without the training code."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import yaml
from helpers import RUN_FILES, first, metrics, same_weights, weights
from torch import Tensor

from stages import train_teacher as stage
from stages.data import Splits, held_out, load_data
from stages.errors import ConfigError, ModelError, PipelineError, ViewError
from stages.inputs.cifar_models import cifar_model
from stages.inputs.feed import Batch
from stages.settings import DataSettings, ModelSettings, SeedSettings, TeacherConfig, TrainSettings
from stages.train_teacher import LabelTask, train_teacher
from stages.training.history import selected_epoch


@pytest.fixture(scope="module")
def my_splits() -> Splits:
    """300 training and 150 test digits of 8 x 8."""
    splits = load_data(DataSettings(dataset="digits"))
    return Splits(first(splits.train, 300), first(splits.test, 150))


def teacher_config(**changes: Any) -> TeacherConfig:
    """Four epochs of a resnet8 on digits; keyword arguments replace whole sections."""
    config = TeacherConfig(
        data=DataSettings(dataset="digits"),
        model=ModelSettings(architecture="resnet8"),
        augment="pad-crop:pad=2",
        train=TrainSettings(epochs=4, batch_size=32),
        device="cpu",
    )
    return msgspec.structs.replace(config, **changes)


@pytest.fixture(scope="module")
def my_run(tmp_path_factory: pytest.TempPathFactory, my_splits: Splits) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    train_teacher(teacher_config(), run, splits=my_splits)
    return run


def accuracy(run: Path, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 of a run's saved weights in the plain model, without the training code."""
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    module = cifar_model(model["architecture"], 10, 1)
    module.load_state_dict(weights(run))
    pixels = (images.float() / 255 - model["mean"][0]) / model["std"][0]
    with torch.no_grad():
        ranked = np.argsort(-module.eval()(pixels).numpy(), axis=1)
    hits = ranked == labels.numpy()[:, None]
    return hits[:, 0].mean(), hits[:, :5].any(1).mean()


# ---- what it leaves -------------------------------------------------------------------------


def test_a_run_leaves_its_files(my_run: Path) -> None:
    assert {path.name for path in my_run.iterdir()} == RUN_FILES


def test_saved_weights_give_the_accuracy_that_was_reported(my_run: Path, my_splits: Splits) -> None:
    summary = json.loads((my_run / "summary.json").read_text())
    assert my_splits.test.images is not None
    top1, top5 = accuracy(my_run, my_splits.test.images, my_splits.test.labels)
    assert summary["last"]["epoch"] == 3
    assert summary["last"]["test_top1"] == pytest.approx(top1)
    assert summary["last"]["test_top5"] == pytest.approx(top5)
    assert 0.15 < top1 < 1  # it has learned something


def test_the_teacher_learns(my_run: Path) -> None:
    losses = [line["loss"] for line in metrics(my_run)]
    assert losses[-1] < 0.8 * losses[0]


def test_its_configuration_is_resolved(my_run: Path, my_splits: Splits) -> None:
    kept = yaml.safe_load((my_run / "config.yaml").read_text())
    images = my_splits.train.images
    assert images is not None
    assert kept["kind"] == "teacher"
    assert kept["train"]["epochs"] == 4
    assert kept["model"]["architecture"] == "resnet8"
    assert kept["model"]["mean"] == pytest.approx([images.double().mean().item() / 255], abs=1e-4)
    assert kept["model"]["std"] == pytest.approx([images.double().std().item() / 255], abs=1e-4)


def test_each_epoch_shows_another_view(my_run: Path) -> None:
    views = [line["view"] for line in metrics(my_run)]
    assert len(set(views)) == 4
    assert all(0 <= view < 25 for view in views)


# ---- held-out samples -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def my_validated(
    tmp_path_factory: pytest.TempPathFactory, my_splits: Splits
) -> tuple[Path, set[int]]:
    """A run with a fifth held out, and the samples that its task was asked about.

    From the sixth epoch on it is taught wrong labels: the best epoch is not the last.
    """
    shown: set[int] = set()

    class Spy(LabelTask):
        def start_epoch(self, epoch: int) -> tuple[int, ...]:
            if epoch == 5:
                self._labels = (self._labels + 1) % 10
            return super().start_epoch(epoch)

        def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
            shown.update(batch.samples.tolist())
            return super().loss_parts(logits, batch)

    run = tmp_path_factory.mktemp("validated") / "run"
    config = teacher_config(
        data=DataSettings(dataset="digits", val_fraction=0.2),
        train=TrainSettings(epochs=7, batch_size=16, lr=0.05, schedule="constant"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "LabelTask", Spy)
        train_teacher(config, run, splits=my_splits)
    return run, shown


def test_held_out_samples_are_never_trained_on(my_validated: tuple[Path, set[int]]) -> None:
    training, validation = held_out(300, 0.2, seed=0)
    assert len(validation) == 60
    assert my_validated[1] == set(training.tolist())


def test_the_selected_epoch_is_the_one_that_is_saved(
    my_validated: tuple[Path, set[int]], my_splits: Splits
) -> None:
    run, _ = my_validated
    lines = metrics(run)
    summary = json.loads((run / "summary.json").read_text())
    best = max(line["val_top1"] for line in lines)
    chosen = next(line for line in lines if line["val_top1"] == best)
    assert summary["selected"]["epoch"] == chosen["epoch"] == selected_epoch(lines)
    assert chosen["epoch"] < 5
    validation = held_out(300, 0.2, seed=0)[1]
    assert my_splits.train.images is not None
    assert my_splits.test.images is not None
    top1, _ = accuracy(run, my_splits.train.images[validation], my_splits.train.labels[validation])
    assert top1 == pytest.approx(chosen["val_top1"])
    top1, top5 = accuracy(run, my_splits.test.images, my_splits.test.labels)
    assert (top1, top5) == pytest.approx((chosen["test_top1"], chosen["test_top5"]))


# ---- seeds and starts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "same"),
    [((0, 0), True), ((1, 0), False), ((0, 1), False)],
    ids=["same-seeds", "other-data", "other-init"],
)
def test_seeds_decide(
    my_run: Path, my_splits: Splits, tmp_path: Path, seeds: tuple[int, int], same: bool
) -> None:
    torch.manual_seed(12345)  # whatever came before must not matter
    torch.rand(7)
    config = teacher_config(seed=SeedSettings(data=seeds[0], init=seeds[1]))
    train_teacher(config, tmp_path / "run", splits=my_splits)
    assert same_weights(my_run, tmp_path / "run") is same


def test_init_starts_from_weights(my_run: Path, my_splits: Splits, tmp_path: Path) -> None:
    """With a rate of next to nothing, the weights stay those of `init`."""
    config = teacher_config(
        model=ModelSettings(architecture="resnet8", init=str(my_run)),
        train=TrainSettings(epochs=1, batch_size=150, lr=1e-12),
    )
    train_teacher(config, tmp_path / "run", splits=my_splits)
    start, end = weights(my_run), weights(tmp_path / "run")
    for name in (n for n in start if "running" not in n and "tracked" not in n):
        torch.testing.assert_close(end[name], start[name], rtol=0, atol=1e-9)


def test_an_unbounded_policy_numbers_its_views_by_epoch(my_splits: Splits, tmp_path: Path) -> None:
    small = Splits(first(my_splits.train, 40), first(my_splits.test, 10))
    config = teacher_config(
        data=DataSettings(dataset="digits", workers=0),
        augment="resized-crop-flip",
        train=TrainSettings(epochs=2, batch_size=20),
    )
    train_teacher(config, tmp_path / "run", splits=small)
    assert [line["view"] for line in metrics(tmp_path / "run")] == [0, 1]


# ---- refusals -------------------------------------------------------------------------------

REFUSED = {
    "unknown-model": ({"model": ModelSettings(architecture="resnet9x")}, ModelError, "unknown"),
    "unknown-policy": ({"augment": "pad-corp"}, ViewError, "did you mean 'pad-crop'"),
    "mean-without-std": (
        {"model": ModelSettings(architecture="resnet8", mean=(0.5,))},
        PipelineError,
        "belong together",
    ),
    "four-means": (
        {"model": ModelSettings(architecture="resnet8", mean=(0.5,) * 4, std=(1.0,) * 4)},
        PipelineError,
        "4 numbers",
    ),
    "std-of-zero": (
        {"model": ModelSettings(architecture="resnet8", mean=(0.5,), std=(0.0,))},
        PipelineError,
        "positive",
    ),
    "mean-nan": (
        {"model": ModelSettings(architecture="resnet8", mean=(float("nan"),), std=(1.0,))},
        ConfigError,
        "mean must be finite, was .*nan",
    ),
    "mean-inf": (
        {"model": ModelSettings(architecture="resnet8", mean=(float("-inf"),), std=(1.0,))},
        ConfigError,
        "mean must be finite, was .*inf",
    ),
    "std-nan": (
        {"model": ModelSettings(architecture="resnet8", mean=(0.0,), std=(float("nan"),))},
        ConfigError,
        "std must be positive, was nan",
    ),
    "std-inf": (
        {"model": ModelSettings(architecture="resnet8", mean=(0.0,), std=(float("inf"),))},
        ConfigError,
        "std must be positive, was inf",
    ),
    "nothing-to-train-on": (
        {"data": DataSettings(dataset="digits", val_fraction=0.999)},
        ConfigError,
        r"data\.val_fraction 0\.999 of 300 samples leaves 0 for training and 300 held out",
    ),
    "one-to-train-on": (
        {"data": DataSettings(dataset="digits", val_fraction=0.997)},
        ConfigError,
        "leaves 1 for training and 299 held out",
    ),
    "nothing-held-out": (
        {"data": DataSettings(dataset="digits", val_fraction=0.001)},
        ConfigError,
        "leaves 300 for training and 0 held out",
    ),
    "no-weights": (
        {"model": ModelSettings(architecture="resnet8", init="nowhere.pt")},
        ModelError,
        "no weights at nowhere.pt",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(
    my_splits: Splits,
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[PipelineError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        train_teacher(teacher_config(**changes), tmp_path / "run", splits=my_splits)
    assert not (tmp_path / "run").exists()
