"""The models that are trained: first weights, input, and whether training them can work."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stages.cache.identity import weights_digest
from stages.data import normalisation, small_image_notes
from stages.device import check_precision
from stages.distributed import ALONE, Ranks, device_of_rank
from stages.errors import ConfigError
from stages.inputs.datasets import ImageDataset, Statistics
from stages.inputs.feed import Normalise, ViewFeed
from stages.inputs.model_outputs import check_output
from stages.inputs.models import Model, build_model, load_model
from stages.reporting import Reporter
from stages.settings import ModelSettings, RunConfig, SeedSettings
from stages.training.captured import check_capture
from stages.training.compiled import prepare_compiler
from stages.training.random_state import RandomState
from stages.training.stream import BatchStream


@dataclass(frozen=True)
class InitialModel:
    """A model before its first step.

    settings: resolved, with the normalisation and the input size that it will use. random_state:
    of the generators after it was built. init_digest: of the weights that it starts from, None
    where these are drawn.
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


def build(
    configs: Sequence[RunConfig],
    dataset: ImageDataset,
    image_size: int | None,
    reporter: Reporter,
    ranks: Ranks = ALONE,
) -> list[InitialModel]:
    """The models of runs that are trained together, on the CPU. image_size: the teacher's, where
    the settings name none.

    Raises ModelError for one that cannot be built, ConfigError where their input sizes differ.
    """
    device = device_of_rank(ranks, configs[0].device)
    for config in configs:
        check_precision(device, config.train.tf32)
        if config.train.capture:
            check_capture(device)
    if any(config.train.compile for config in configs):
        prepare_compiler(device, len(configs))
    size = configs[0].data.image_size or image_size
    models = [_initial(c.model, dataset, c.seed, size, device) for c in configs]
    for note in (note for made in models for note in made.model.notes):
        reporter.say(note)
    if len(sizes := {made.settings.image_size for made in models}) > 1:
        raise ConfigError(
            f"students trained together want images of {' and '.join(map(str, sizes))} pixels",
            "Give all of them one --image-size, or train them apart.",
        )
    return models


def _initial(
    settings: ModelSettings,
    dataset: ImageDataset,
    seeds: SeedSettings,
    image_size: int | None,
    device: torch.device,
) -> InitialModel:
    torch.manual_seed(seeds.init)
    channels, classes = dataset.shape[0], len(dataset.class_names)
    if settings.init is None:
        model = build_model(settings.architecture, classes, channels)
    else:
        model = load_model(settings.architecture, settings.init, classes, channels, new_head=True)
    mean, std = normalisation(model, dataset, settings.mean, settings.std)
    size = settings.image_size or image_size or model.image_size
    notes = small_image_notes(model.architecture, dataset, size)
    resolved = ModelSettings(
        architecture=model.architecture, mean=mean, std=std, image_size=size, init=settings.init
    )
    return InitialModel(
        replace(model, notes=(*model.notes, *notes)),
        resolved,
        RandomState.now(device),
        None if settings.init is None else weights_digest(model.module.state_dict()),
    )


def check_models(models: Sequence[InitialModel], stream: BatchStream) -> None:
    """Raise ModelError or ConfigError for a model that cannot be trained on these images."""
    dataset, policy = stream.feed.dataset, stream.feed.policy
    for made in models:
        check_output(made.model, made.statistics, dataset, policy, made.settings.image_size)
        if stream.batch_size == stream.ranks.world:
            _check_batch_of_one(made, stream.feed)


def _check_batch_of_one(made: InitialModel, feed: ViewFeed) -> None:
    """Raise ConfigError where a model cannot train on one image at a time, as with batch norm over
    a single value a channel. Weights and generators stay as they are.
    """
    cpu = torch.device("cpu")
    tried = ViewFeed(feed.dataset, feed.policy, cpu, feed.image_size, workers=0)
    batch = next(tried.batches(torch.arange(1), 0, 1))
    module = copy.deepcopy(made.model.module).train()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module(made.normalise(cpu, channels_last=False)(batch.pixels))
    except ValueError as error:
        raise ConfigError(
            f"{made.model.architecture} cannot train on batches of one image: {error}",
            "Give --batch-size 2 or more for every process.",
        ) from error
