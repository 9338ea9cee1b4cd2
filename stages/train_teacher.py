"""Ordinary training on hard labels: a teacher, or a baseline.

pipeline train-teacher --dataset digits --model resnet20 --augment pad-crop:pad=2 --out runs/t
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from stages.data import Splits, chosen_policy, load_data, split_digests
from stages.inputs.feed import Batch
from stages.objectives.losses import mixed_ce
from stages.order import view_order
from stages.reporting import Reporter, Silent
from stages.settings import TeacherConfig
from stages.training.learner import Learner
from stages.training.models import build, check_models
from stages.training.run_directory import RunDirectory
from stages.training.stream import open_stream
from stages.training.trainer import Trainer


class LabelTask:
    """Hard labels, both of them where samples are mixed, on a view that no two epochs share, as far
    as the policy has views.
    """

    learned = None

    def __init__(self, labels: Tensor, num_views: int | None, seed: int) -> None:
        self._labels, self._num_views, self._seed = labels, num_views, seed

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        if self._num_views is None:
            return (epoch,)
        return (view_order(self._seed, epoch, self._num_views),)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": mixed_ce(logits, *batch.hard_labels(self._labels))}

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
    run, reporter = RunDirectory(out, resume, overwrite), reporter or Silent()
    # 1) the images
    splits = splits or load_data(config.data)
    splits.tell(reporter)

    # 2) the model, and the batches that it is shown
    models = build([config], splits.train, None, reporter)
    size = models[0].settings.image_size
    policy = chosen_policy(config.augment, config.seed.data, size, config.data.resize)
    stream = open_stream(config, splits, policy, size)
    check_models(models, stream)

    # 3) train
    task = LabelTask(stream.labels, policy.count, config.seed.data)
    learner = Learner(config, models[0], task, run, stream, split_digests(splits))
    return Trainer([learner], stream, reporter).fit()
