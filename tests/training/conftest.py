"""Small digits and a ready trainer for the tests of the training loop."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Batch, ViewFeed
from stages.inputs.views import view_policy
from stages.objectives.losses import ce
from stages.reporting import Silent
from stages.training.config import DataSettings, ModelSettings, SeedSettings, TrainSettings
from stages.training.run_directory import RunDirectory
from stages.training.setup import Splits, load_data, make_evaluations, make_model, make_normalise
from stages.training.trainer import Task, Trainer

CPU = torch.device("cpu")


def first(dataset: ImageDataset, size: int) -> ImageDataset:
    """The first `size` images of a dataset."""
    assert dataset.images is not None
    images = dataset.images[:size]
    return dataclasses.replace(
        dataset,
        labels=dataset.labels[:size],
        images=images,
        load=images.__getitem__,
        images_digest=f"first {size}",
    )


@pytest.fixture(scope="session")
def my_splits() -> Splits:
    """210 training and 100 test digits of 8 x 8."""
    splits = load_data(DataSettings(dataset="digits"))
    return Splits(first(splits.train, 210), first(splits.test, 100))


class SpyTask:
    """Hard labels; view e + 1 in epoch e. Remembers samples and pixels of every batch."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.batches: list[Tensor] = []
        self.pixels: list[Tensor] = []

    def start_epoch(self, epoch: int) -> int:
        return epoch + 1

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        samples = batch.samples
        self.batches.append(samples)
        self.pixels.append(batch.pixels.clone())
        loss = ce(logits, None, self.labels[samples])
        return {"loss": loss, "mean_sample": samples.float().mean()}

    def epoch_metrics(self) -> dict[str, float]:
        return {"batches_so_far": float(len(self.batches))}


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def my_trainer(my_splits: Splits, tmp_path: Path) -> MakeTrainer:
    """Makes trainers of a resnet8; the settings alone are enough."""

    def make(
        settings: TrainSettings,
        task: Task | None = None,
        samples: Tensor | None = None,
        validation: Tensor | None = None,
    ) -> Trainer:
        train = my_splits.train
        seeds = SeedSettings()
        model, resolved = make_model(ModelSettings(architecture="resnet8"), train, seeds)
        return Trainer(
            module=model.module,
            normalise=make_normalise(model, resolved, CPU, settings.channels_last),
            task=task or SpyTask(train.labels),
            feed=ViewFeed(train, view_policy("pad-crop:pad=2"), CPU),
            samples=torch.arange(len(train)) if samples is None else samples,
            evaluations=make_evaluations(
                DataSettings(dataset="digits"),
                my_splits,
                None,
                torch.arange(0) if validation is None else validation,
                CPU,
            ),
            settings=settings,
            seeds=seeds,
            run=RunDirectory.prepare(tmp_path / "run", {}),
            reporter=Silent(),
            device=CPU,
        )

    return make


@pytest.fixture
def my_spy(my_splits: Splits) -> SpyTask:
    return SpyTask(my_splits.train.labels)
