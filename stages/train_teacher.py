"""Ordinary training on hard labels: a teacher, or a baseline.

pipeline train-teacher --dataset digits --model resnet20 --augment pad-crop:pad=2 --out runs/t
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from stages.device import choose_device
from stages.inputs.feed import Batch, ViewFeed
from stages.objectives.losses import ce
from stages.reporting import Reporter, Silent
from stages.training.config import (
    DataSettings,
    ModelSettings,
    SeedSettings,
    Settings,
    TrainSettings,
)
from stages.training.run_directory import RunDirectory
from stages.training.setup import (
    Splits,
    check_output,
    chosen_policy,
    held_out,
    load_data,
    make_evaluations,
    make_model,
    make_normalise,
)
from stages.training.trainer import Trainer, view_order


class TeacherConfig(Settings, frozen=True):
    """A run of train-teacher. augment: a view policy; every epoch shows another of its views."""

    data: DataSettings
    model: ModelSettings
    augment: str = "pad-crop-flip"
    train: TrainSettings = TrainSettings()
    seed: SeedSettings = SeedSettings()
    device: str = "auto"


class LabelTask:
    """Hard labels on a view that no two epochs share, as far as the policy has views."""

    def __init__(self, labels: Tensor, num_views: int | None, seed: int) -> None:
        self._labels, self._num_views, self._seed = labels, num_views, seed

    def start_epoch(self, epoch: int) -> int:
        if self._num_views is None:
            return epoch
        return view_order(self._seed, epoch, self._num_views)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": ce(logits, None, self._labels[batch.samples])}

    def epoch_metrics(self) -> dict[str, float]:
        return {}


def train_teacher(
    config: TeacherConfig,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train a model on hard labels and return the run's summary."""
    reporter = reporter or Silent()
    # 1) images and model
    splits = splits or load_data(config.data)
    device = choose_device(config.device)
    model, resolved = make_model(config.model, splits.train, config.seed)
    image_size = resolved.image_size or config.data.image_size
    policy = chosen_policy(config.augment, config.seed.data, image_size, config.data.resize)
    feed = ViewFeed(splits.train, policy, device, image_size, config.data.workers)
    cpu = torch.device("cpu")
    check_output(
        model, make_normalise(model, resolved, cpu, False), feed, len(splits.train.class_names)
    )

    samples, validation = held_out(len(splits.train), config.data.val_fraction, config.seed.data)

    # 2) the run directory
    config = msgspec.structs.replace(config, model=resolved)
    plain = {"kind": "teacher", **msgspec.to_builtins(config)}
    run = RunDirectory.prepare(out, plain, resume, overwrite)
    reporter.say(run.config_text)

    # 3) train
    trainer = Trainer(
        module=model.module,
        normalise=make_normalise(model, resolved, device, config.train.channels_last),
        task=LabelTask(splits.train.labels.to(device), policy.count, config.seed.data),
        feed=feed,
        samples=samples,
        evaluations=make_evaluations(config.data, splits, image_size, validation, device),
        settings=config.train,
        seeds=config.seed,
        run=run,
        reporter=reporter,
        device=device,
    )
    return trainer.fit()
