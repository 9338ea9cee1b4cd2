"""How a model is given images: their normalisation, and hints where it was made for others."""

import math
from collections.abc import Sequence

from stages.errors import ConfigError
from stages.inputs.cifar_models import SMALL, counterpart
from stages.inputs.datasets import ImageDataset
from stages.inputs.models import Model
from stages.inputs.views import ViewPolicy
from stages.schema import check_bounds


def normalisation(
    model: Model,
    dataset: ImageDataset,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What was asked for, else the model's own, else the dataset's: mean and std per channel."""
    if (mean is None) != (std is None):
        raise ConfigError("mean and std belong together", "Give both --mean and --std, or neither.")
    if mean is not None and std is not None:
        given = mean, std
    else:
        given = model.statistics or dataset.statistics()
    chosen = tuple(map(float, given[0])), tuple(map(float, given[1]))
    for name, values in zip(("mean", "std"), chosen, strict=True):
        if len(values) not in (1, dataset.shape[0], model.channels):
            raise ConfigError(
                f"{name} has {len(values)} numbers, the images have {dataset.shape[0]} channel(s)"
            )
    if not all(map(math.isfinite, chosen[0])):
        raise ConfigError(f"mean must be finite, was {chosen[0]}")
    for value in chosen[1]:
        check_bounds("std", value, above=0)
    return chosen


def normalisation_source(model: Model, given: bool) -> str:
    """Where a model's normalisation comes from, for people. given: it was asked for."""
    if given:
        return "as given"
    if model.statistics is not None:
        return f"of {model.source}"
    return "of the dataset's images: the weights do not say theirs"


def filter_notes(model: Model, policy: ViewPolicy, image_size: int | None) -> tuple[str, ...]:
    """A hint where a teacher was trained on images resized with another filter than its views."""
    if image_size is None or model.interpolation in ("", "bilinear"):
        return ()
    if any(str(value) == model.interpolation for value in policy.parameters.values()):
        return ()
    return (
        f"{model.architecture} was trained on images resized with a {model.interpolation} filter, "
        f"these views are resized with a bilinear one: BASE:interpolation={model.interpolation} in "
        "--augment takes the same",
    )


def small_image_notes(
    architecture: str, dataset: ImageDataset, image_size: int | None
) -> tuple[str, ...]:
    """A hint where a network for large images is given small ones, and one for those exists."""
    side = image_size or max(dataset.shape[1:])
    named = counterpart(architecture)
    if side > SMALL or named is None:
        return ()
    return (
        f"{architecture} is made for images of 224 pixels, these have {side}: the CIFAR network "
        f"is '{named}'",
    )
