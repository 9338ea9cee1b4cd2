"""What a teacher's run leaves, measured again without the training code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import RUN_FILES, cut, metrics, same_weights, teacher_of, weights
from torch import Tensor

from stages import train_teacher as stage
from stages.data import Splits
from stages.inputs.cifar_models import cifar_model
from stages.inputs.feed import Batch
from stages.order import held_out
from stages.settings import TeacherConfig
from stages.train_teacher import LabelTask, train_teacher
from stages.training.history import selected_epoch


@pytest.fixture(scope="module")
def my_splits(digits: Splits) -> Splits:
    return cut(digits, 300, 150)


def teacher_config(**changes: Any) -> TeacherConfig:
    """Three epochs of a resnet8 on digits."""
    return teacher_of(**{"train__epochs": 3, "train__batch_size": 32, **changes})


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


def test_saved_weights_give_the_accuracy_that_was_reported(my_run: Path, my_splits: Splits) -> None:
    summary = json.loads((my_run / "summary.json").read_text())
    assert my_splits.test.images is not None
    top1, top5 = accuracy(my_run, my_splits.test.images, my_splits.test.labels)
    assert summary["last"]["epoch"] == 2
    assert summary["last"]["test_top1"] == pytest.approx(top1)
    assert summary["last"]["test_top5"] == pytest.approx(top5)
    assert 0.15 < top1 < 1  # it has learned something
    assert {path.name for path in my_run.iterdir()} == RUN_FILES
    lines = metrics(my_run)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert len({line["view"] for line in lines} & {*range(25)}) == 3
    kept, images = yaml.safe_load((my_run / "config.yaml").read_text()), my_splits.train.images
    assert images is not None
    assert (kept["kind"], kept["train"]["epochs"]) == ("teacher", 3)
    assert kept["model"]["architecture"] == "resnet8"
    assert kept["model"]["mean"] == pytest.approx([images.double().mean().item() / 255], abs=1e-4)
    assert kept["model"]["std"] == pytest.approx([images.double().std().item() / 255], abs=1e-4)


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
    train = {"train__epochs": 7, "train__batch_size": 16, "train__schedule": "constant"}
    config = teacher_config(data__val_fraction=0.2, train__lr=0.05, **train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "LabelTask", Spy)
        train_teacher(config, run, splits=my_splits)
    return run, shown


def test_the_selected_epoch_is_the_one_that_is_saved(
    my_validated: tuple[Path, set[int]], my_splits: Splits
) -> None:
    """And held-out samples are never trained on."""
    run, shown = my_validated
    training, validation = held_out(300, 0.2, seed=0)
    assert shown == set(training.tolist())
    lines = metrics(run)
    summary = json.loads((run / "summary.json").read_text())
    best = max(line["val_top1"] for line in lines)
    chosen = next(line for line in lines if line["val_top1"] == best)
    assert summary["selected"]["epoch"] == chosen["epoch"] == selected_epoch(lines)
    assert chosen["epoch"] < 5
    assert my_splits.train.images is not None
    assert my_splits.test.images is not None
    top1, _ = accuracy(run, my_splits.train.images[validation], my_splits.train.labels[validation])
    assert top1 == pytest.approx(chosen["val_top1"])
    top1, top5 = accuracy(run, my_splits.test.images, my_splits.test.labels)
    assert (top1, top5) == pytest.approx((chosen["test_top1"], chosen["test_top5"]))


def test_seeds_decide(my_run: Path, my_splits: Splits, tmp_path: Path) -> None:
    """test_train_student.py has which of them decides what."""
    torch.manual_seed(12345)  # whatever came before must not matter
    train_teacher(teacher_config(), tmp_path / "same", splits=my_splits)
    assert same_weights(my_run, tmp_path / "same")
    other = teacher_config(seed__data=1)
    train_teacher(other, tmp_path / "other", splits=my_splits)
    views = [[line["view"] for line in metrics(run)] for run in (my_run, tmp_path / "other")]
    assert views[0] != views[1]


def test_init_starts_from_weights(my_run: Path, my_splits: Splits, tmp_path: Path) -> None:
    """With a rate of next to nothing, the weights stay those of `init`."""
    config = teacher_config(model__init=str(my_run), train__epochs=1, train__lr=1e-12)
    train_teacher(config, tmp_path / "run", splits=my_splits)
    start, end = weights(my_run), weights(tmp_path / "run")
    for name in (n for n in start if "running" not in n and "tracked" not in n):
        torch.testing.assert_close(end[name], start[name], rtol=0, atol=1e-9)


def test_an_unbounded_policy_numbers_its_views_by_epoch(
    tiny_splits: Splits, tmp_path: Path
) -> None:
    config = teacher_config(augment="resized-crop-flip", train__epochs=2)
    train_teacher(config, tmp_path / "run", splits=tiny_splits)
    assert [line["view"] for line in metrics(tmp_path / "run")] == [0, 1]
