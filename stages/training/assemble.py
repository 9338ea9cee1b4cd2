"""From settings to a trainer: models, images and run directories, checked before any is written."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import yaml
from torch import Tensor

from stages.cache.identity import weights_digest
from stages.data import Splits, check_output, held_out, split_digests
from stages.distributed import ALONE, Ranks, device_of_rank, first_rank_does
from stages.errors import ConfigError
from stages.inputs.datasets import Statistics
from stages.inputs.feed import Normalise, ViewFeed
from stages.inputs.models import Model
from stages.inputs.views import ViewPolicy
from stages.reporting import Reporter
from stages.settings import ModelSettings, RunConfig
from stages.training.compiled import prepare_compiler
from stages.training.learner import Learner, RandomState, Task
from stages.training.order import SampleOrder, sample_order
from stages.training.run_directory import RunDirectory
from stages.training.same_run import MADE_FROM
from stages.training.setup import check_batch_of_one, make_evaluations, make_model
from stages.training.trainer import Trainer, steps_per_epoch


@dataclass(frozen=True)
class Destination:
    """Where a run goes, and what to do with a run that is there."""

    out: Path
    kind: Literal["teacher", "student"]
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class Planned:
    """A run that is to be trained. make_task: labels int64 (N,) on the device, and the policy ->
    what is learned. views: how many views of a sample it sees at once. made_from: digests of what
    it reads beside the images, see `stages.training.same_run`.
    """

    config: RunConfig
    destination: Destination
    make_task: Callable[[Tensor, ViewPolicy], Task]
    views: int = 1
    made_from: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """Of the samples in an epoch. shown: how many of them it shows, None for all."""

    of_epoch: SampleOrder = sample_order
    shown: int | None = None


def make_trainer(
    planned: Sequence[Planned],
    splits: Splits,
    choose_policy: Callable[[int | None], ViewPolicy],
    reporter: Reporter,
    teacher_size: int | None = None,
    order: Order | None = None,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Everything ready for `fit`; nothing is written before all of it is checked.

    planned: one run or several that are shown the same stream of batches, by the settings of the
    first. choose_policy: input size -> the views to show. teacher_size: the input size where
    nothing else gives one. ranks: of a launch on several processes.
    """
    order, config = order or Order(), planned[0].config
    train, data, settings = splits.train, config.data, config.train
    _check_divisible(planned[0], ranks)
    device = device_of_rank(ranks, config.device)
    if any(run.config.train.compile for run in planned):
        prepare_compiler(device, len(planned))
    models = [
        _model(run.config, splits, data.image_size or teacher_size, device) for run in planned
    ]
    for note in (note for made in models for note in made.model.notes):
        reporter.say(note)
    image_size = _one_image_size(models)
    policy = choose_policy(image_size)
    feed = ViewFeed(train, policy, device, image_size, data.workers)
    feeds = [feed, *(feed.another() for _ in range(planned[0].views - 1))]
    for model in models:
        check_output(model.model, model.statistics, train, policy, image_size)
        if settings.batch_size == ranks.world:
            check_batch_of_one(model.model, model.statistics, train, policy, image_size)
    samples, validation = held_out(len(train), data.val_fraction, config.seed.data, train.skipped)
    if policy.mixes and len(validation):
        raise ConfigError(
            f"data.val_fraction holds samples out, and '{policy.name}' shows them as partners",
            "Train on all samples with --val-fraction 0, or without mixup and cutmix.",
        )
    labels = train.labels.to(device)
    evaluations = make_evaluations(data, splits, image_size, validation, device)
    steps = steps_per_epoch(order.shown or len(samples), settings.batch_size, ranks)
    tasks = [run.make_task(labels, policy) for run in planned]
    with contextlib.ExitStack() as held:  # where one cannot be had, the others are let go
        runs = []
        for run, model in zip(planned, models, strict=True):
            runs.append(_run_directory(run, model, splits, reporter, ranks))
            held.callback(runs[-1].release)
        learners = [
            Learner(
                module=model.model.module,
                normalise=model.normalise(device, settings.channels_last),
                task=task,
                evaluations=evaluations,
                settings=run.config.train,
                run=directory,
                device=device,
                steps=steps,
                random_state=model.random_state if len(planned) > 1 else None,
                ranks=ranks,
                views=run.views,
            )
            for run, model, task, directory in zip(planned, models, tasks, runs, strict=True)
        ]
        held.pop_all()
    return Trainer(
        learners=learners,
        feeds=feeds,
        samples=samples,
        settings=settings,
        seeds=config.seed,
        reporter=reporter,
        device=device,
        order=order.of_epoch,
        ranks=ranks,
    )


def _check_divisible(run: Planned, ranks: Ranks) -> None:
    batch_size = run.config.train.batch_size
    if batch_size % ranks.world:
        raise ConfigError(
            f"a batch of {batch_size} cannot be divided among {ranks.world} processes",
            f"Give a --batch-size that is a multiple of {ranks.world}.",
        )
    if run.views > 1 and ranks.world > 1:
        raise ConfigError(
            "a loss that sees two views of a sample at once is trained in one process",
            "Start it without torchrun, or use another loss.",
        )


@dataclass(frozen=True)
class _Made:
    """A model, its settings with normalisation and input size, and the generators after it.
    init_digest: of the weights it starts from, None where these are drawn.
    """

    model: Model
    settings: ModelSettings
    random_state: RandomState
    init_digest: str | None

    @property
    def statistics(self) -> Statistics:
        mean, std = self.settings.mean, self.settings.std
        assert mean is not None
        assert std is not None
        return mean, std

    def normalise(self, device: torch.device, channels_last: bool) -> Normalise:
        return Normalise(*self.statistics, self.model.channels, device, channels_last)


def _model(config: RunConfig, splits: Splits, size: int | None, device: torch.device) -> _Made:
    model, settings = make_model(config.model, splits.train, config.seed, size)
    starts_from = None if settings.init is None else weights_digest(model.module.state_dict())
    return _Made(model, settings, RandomState.now(device), starts_from)


def _one_image_size(models: Sequence[_Made]) -> int | None:
    if len(sizes := {model.settings.image_size for model in models}) > 1:
        raise ConfigError(
            f"students trained together want images of {' and '.join(map(str, sizes))} pixels",
            "Give all of them one --image-size, or train them apart.",
        )
    return models[0].settings.image_size


def _run_directory(
    run: Planned, made: _Made, splits: Splits, reporter: Reporter, ranks: Ranks
) -> RunDirectory:
    to, config = run.destination, msgspec.structs.replace(run.config, model=made.settings)
    of = {**split_digests(splits), **run.made_from, "init": made.init_digest}
    settings = {"kind": to.kind, **msgspec.to_builtins(config)}
    plain = {**settings, "classes": [*splits.train.class_names], MADE_FROM: of}
    prepared: list[RunDirectory] = []

    def prepare() -> bool:
        prepared.append(RunDirectory.prepare(to.out, plain, to.resume, to.overwrite))
        return prepared[0].goes_on

    goes_on = first_rank_does(ranks, prepare)
    directory = prepared[0] if prepared else RunDirectory(to.out, plain, goes_on)
    reporter.say(yaml.safe_dump(settings, sort_keys=False))  # not a thousand names
    return directory
