"""The models that are trained: first weights, input, and whether training them can work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stages.cache.identity import weights_digest
from stages.device import RandomState
from stages.errors import ConfigError
from stages.inputs.datasets import ImageDataset, Statistics
from stages.inputs.feed import Normalise
from stages.inputs.model_input import normalisation, small_image_notes
from stages.inputs.model_outputs import check_output, check_trained_on_one, sample_pixels
from stages.inputs.models import Model, build_model, load_model
from stages.reporting import Reporter
from stages.settings import ModelSettings, RunConfig, SeedSettings
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


def build(
    configs: Sequence[RunConfig],
    dataset: ImageDataset,
    image_size: int | None,
    reporter: Reporter,
    device: torch.device,
) -> list[InitialModel]:
    """The models of runs that are trained together, on the CPU. image_size: the teacher's, where
    the settings name none. device: where they will be trained.

    Raises ModelError for one that cannot be built, ConfigError where their input sizes differ.
    """
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
    size = settings.image_size or image_size or model.image_size
    notes = small_image_notes(model.architecture, dataset, size)
    mean, std = normalisation(model, dataset, settings.mean, settings.std)
    resolved = ModelSettings(
        architecture=model.architecture, mean=mean, std=std, image_size=size, init=settings.init
    )
    return InitialModel(
        replace(model, notes=(*model.notes, *notes)),
        resolved,
        RandomState.now(device),
        None if settings.init is None else weights_digest(model.module.state_dict()),
    )


def check_model(made: InitialModel, stream: BatchStream) -> None:
    """Raise ModelError or ConfigError for a model, on the CPU, that cannot be trained on the images
    that it will be shown, or not on as few at a time.
    """
    dataset, policy = stream.feed.dataset, stream.feed.policy
    pixels = sample_pixels(dataset, policy, made.settings.image_size)
    normalise = Normalise(*made.statistics, made.model.channels, pixels.device, False)
    check_output(made.model, pixels, normalise, len(dataset.class_names))
    if stream.batch_size == stream.ranks.world:
        check_trained_on_one(made.model, normalise(pixels[:1]))
