"""Ordinary training on hard labels: a teacher, or a baseline; or a teacher for every fold.

    pipeline train-teacher --dataset digits --model resnet20 --augment pad-crop:pad=2 --out runs/t
    pipeline train-teacher --dataset digits --model resnet20 --folds 5 --out runs/t5

The teacher of fold k is trained without the samples of fold k (`stages.folds`), and is a run like
any other: in its own directory, with the same seeds.
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from stages.data import Splits, chosen_policy, load_data, split_digests
from stages.device import choose_device
from stages.errors import ConfigError, RunError
from stages.folds import fold_map
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Batch, plain_view
from stages.objectives.losses import mixed_ce
from stages.order import SINGLES, Rounds, held_out, view_order
from stages.reporting import Reporter, Silent
from stages.settings import TeacherConfig
from stages.teacher.folds import fold_folder
from stages.training.learner import Learner
from stages.training.models import build
from stages.training.run_directory import RunDirectory
from stages.training.stream import Showing, open_stream
from stages.training.trainer import Trainer


class LabelTask:
    """Hard labels, both of them where samples are mixed, on a view that no two epochs share, as far
    as the policy has views.
    """

    learned = None

    def __init__(
        self, labels: Tensor, num_views: int | None, seed: int, rounds: Rounds = SINGLES
    ) -> None:
        self._labels, self._num_views, self._seed = labels, num_views, seed
        self._rounds = rounds

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        epochs, views = self._rounds.of(epoch).epochs, self._num_views
        if views is None:
            return tuple(epochs)
        return tuple(view_order(self._seed, each, views) for each in epochs)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": mixed_ce(logits, *batch.hard_labels(self._labels))}

    def keep_in_place(self) -> None:
        """Labels are where they are."""

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
    """Train a model on hard labels and return the run's summary: on all samples, or on those of all
    folds but `config.fold`.
    """
    if config.folds is not None and config.fold is None:
        raise ConfigError("several folds are several runs", "Call train_folds, or name a fold.")
    _check_fold(config)
    run, reporter = RunDirectory(out, resume, overwrite), reporter or Silent()
    # 1) the images
    splits = splits or load_data(config.data)
    splits.tell(reporter)
    if not splits.train.labelled:
        raise ConfigError(
            f"training on hard labels needs labels, and {config.data.dataset} has none",
            "Cache a teacher's logits of it, and train students from them.",
        )

    # 2) the model, and the batches that it is shown
    device = choose_device(config.device)
    models = build([config], splits.train, None, reporter, device)
    size = models[0].settings.image_size
    policy = chosen_policy(config.augment, config.seed.data, plain_view(size, config.data.resize))
    samples, validation = held_out(
        len(splits.train),
        config.data.val_fraction,
        config.seed.data,
        _left_out(config, splits.train),
    )
    rounds = Rounds(config.train.views_per_decode or 1, config.train.epochs, policy.count)
    showing = Showing(samples, validation, rounds=rounds)
    stream = open_stream(config, splits, policy, size, showing, device)

    # 3) train
    task = LabelTask(stream.labels, policy.count, config.seed.data, rounds)
    learner = Learner(config, models[0], task, run, stream, split_digests(splits))
    return Trainer([learner], stream, reporter).fit()


def train_folds(
    config: TeacherConfig,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Train the teacher of every fold, one after another, each in a run directory below `out`; of
    `config.fold` alone where that is given. Returns their summaries.

    Raises ConfigError unless there are folds, RunError where `out` is a run itself, and what
    `train_teacher` raises.
    """
    if config.folds is None:
        raise ConfigError("no number of folds was given", "Give --folds.")
    if (Path(out) / "config.yaml").exists():
        raise RunError(f"{out} is a run, not a folder for several", "Choose another --out.")
    splits = splits or load_data(config.data)
    _check_fold(config)
    folds = range(config.folds) if config.fold is None else [config.fold]
    summaries = []
    for fold in folds:
        where = fold_folder(out, fold)
        (reporter or Silent()).say(f"fold {fold} of {config.folds}: {where}")
        one = msgspec.structs.replace(config, fold=fold)
        summaries.append(train_teacher(one, where, resume, overwrite, splits, reporter))
    return summaries


def _left_out(config: TeacherConfig, train: ImageDataset) -> Tensor:
    """int64: the samples that are skipped, and those of the fold that a teacher is not shown."""
    if config.folds is None or config.fold is None:
        return train.skipped
    fold_of = fold_map(train.labels, config.folds, config.seed.data)
    unseen = fold_of.eq(config.fold).nonzero().squeeze(1)
    left_out: Tensor = torch.cat([train.skipped, unseen]).unique()
    return left_out


def _check_fold(config: TeacherConfig) -> None:
    if config.fold is not None and config.fold >= (config.folds or 0):
        raise ConfigError(
            f"fold {config.fold} is none of {config.folds or 0} folds",
            "Give --folds as well, and a --fold from 0 to folds - 1.",
        )
