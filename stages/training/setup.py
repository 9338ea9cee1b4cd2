"""What teachers and students need before the first step: images, model, evaluations."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from stages.data import Splits, normalisation, small_image_notes
from stages.errors import ConfigError
from stages.inputs.datasets import (
    ImageDataset,
    Statistics,
)
from stages.inputs.feed import Normalise, ViewFeed, plain_view
from stages.inputs.models import Model, build_model, load_model
from stages.inputs.views import ViewPolicy
from stages.settings import (
    DataSettings,
    ModelSettings,
    SeedSettings,
)
from stages.training.learner import Evaluation


def make_model(
    settings: ModelSettings, dataset: ImageDataset, seeds: SeedSettings, image_size: int | None
) -> tuple[Model, ModelSettings]:
    """A model with seeded first weights, or those of `init`; and its settings, resolved: with the
    normalisation and the input size that it will use. image_size: where settings name none.
    """
    torch.manual_seed(seeds.init)
    channels, classes = dataset.shape[0], len(dataset.class_names)
    if settings.init is None:
        model = build_model(settings.architecture, classes, channels)
    else:
        model = load_model(settings.architecture, settings.init, classes, channels, new_head=True)
    mean, std = normalisation(model, dataset, settings.mean, settings.std)
    size = settings.image_size or image_size or model.image_size
    notes = small_image_notes(model.architecture, dataset, size)
    model = replace(model, notes=(*model.notes, *notes))
    resolved = ModelSettings(
        architecture=model.architecture,
        mean=mean,
        std=std,
        image_size=size,
        init=settings.init,
    )
    return model, resolved


def make_evaluations(
    data: DataSettings,
    splits: Splits,
    image_size: int | None,
    validation: Tensor,
    device: torch.device,
) -> dict[str, Evaluation]:
    """The clean test split, and the held-out samples where there are any."""
    plain = plain_view(image_size, data.resize)
    test = ViewFeed(splits.test, plain, device, image_size, data.workers)
    evaluations = {"test": Evaluation(test, splits.test.shown, splits.test.labels)}
    if len(validation):
        clean = ViewFeed(splits.train, plain, device, image_size, data.workers)
        evaluations["val"] = Evaluation(clean, validation, splits.train.labels)
    return evaluations


def check_batch_of_one(
    model: Model,
    statistics: Statistics,
    dataset: ImageDataset,
    policy: ViewPolicy,
    image_size: int | None,
) -> None:
    """Raise ConfigError where a model cannot train on one image at a time, as with batch norm over
    a single value a channel. Weights and generators stay as they are.
    """
    cpu = torch.device("cpu")
    feed = ViewFeed(dataset, policy, cpu, image_size, workers=0)
    normalise = Normalise(*statistics, model.channels, cpu, channels_last=False)
    batch = next(feed.batches(torch.arange(1), 0, 1))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            copy.deepcopy(model.module).train()(normalise(batch.pixels))
    except ValueError as error:
        raise ConfigError(
            f"{model.architecture} cannot train on batches of one image: {error}",
            "Give --batch-size 2 or more for every process.",
        ) from error
