"""Teachers and students by name or import path, and their weights without unpickling code.

A name is looked up among the CIFAR families of the distillation literature, then in torchvision;
`timm:NAME` and `module:callable` (called with num_classes) say where to look.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stages.errors import ModelError, RunError
from stages.inputs.checkpoints import (
    Checkpoint,
    check_tensors,
    fitted,
    read_checkpoint,
    weights_file,
)
from stages.inputs.cifar_models import cifar_model, cifar_name, resolved_name
from stages.inputs.datasets import Statistics
from stages.inputs.library_models import pretrained_model, timm_model, torchvision_model
from stages.inputs.recorded import checkpoint_statistics, own_statistics
from stages.inputs.run_files import check_file, read_config
from stages.inputs.user_models import user_model
from stages.user_code import BROUGHT, check_trusted, names_code


@dataclass(frozen=True)
class Model:
    """A network and what belongs to it.

    channels: what its input takes. statistics: the normalisation it was trained with, and source:
    whose that is; image_size: the side of its input in pixels; None where they are unknown. notes:
    what was chosen when its weights were read, for people, a line each. classes: the names of its
    outputs in order, which must be the dataset's; None where they are unknown. aliases: all names
    that each output goes by, for `class_groups`. zoom: how its clean images are cropped: the
    shorter side is brought to zoom times image_size and the centre is cut out; 0 for the whole
    image, None where that is unknown. interpolation: the filter that they were resized
    with, bilinear or bicubic; empty where that is unknown, or another. digest: of the weights,
    where the state dict is not all there is.
    """

    module: nn.Module
    architecture: str
    channels: int
    statistics: Statistics | None = None
    image_size: int | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    aliases: tuple[tuple[str, ...], ...] | None = None
    zoom: float | None = None
    interpolation: str = ""
    digest: str = ""

    @property
    def output_names(self) -> tuple[tuple[str, ...], ...] | None:
        """The names that each of its outputs goes by; None where they are unknown."""
        if self.aliases is None and self.classes is not None:
            return tuple((name,) for name in self.classes)
        return self.aliases


def build_model(name: str, num_classes: int, channels: int) -> Model:
    """An untrained model. Raises ModelError for an unknown name, suggesting the nearest.

    channels: of the dataset; models outside the CIFAR families take three, grey is repeated.
    """
    kind, _, argument = name.partition(":")
    if name.startswith(BROUGHT):
        raise ModelError(
            f"'{name}' brings its weights: it can be cached as a teacher, and not be trained",
            "Name another model; timm:NAME has most architectures.",
        )
    if kind == "timm":
        return Model(timm_model(argument, num_classes), name, 3)
    if argument:
        return Model(user_model(name, num_classes), name, 3)
    if (spelled := cifar_name(name)) is not None:
        return Model(cifar_model(spelled, num_classes, channels), spelled, channels)
    return Model(torchvision_model(name, num_classes), name, 3)


def load_model(
    name: str | None,
    weights: str | None,
    num_classes: int,
    channels: int,
    new_head: bool = False,
    own_head: bool = False,
) -> Model:
    """A model with its weights.

    weights: a run directory (brings its architecture and normalisation; `name` may be None), a file
    as `stages.inputs.checkpoints` reads them, with `#KEY` for one of several, or `pretrained`; None
    for a `module:callable` that brings its own. new_head: published weights of another number of
    classes do, with a last layer that is not trained. own_head: it has the outputs that it was
    trained with, however many.

    Raises ModelError if they are missing or do not fit.
    """
    if weights == "pretrained":
        return _published(name or "", None if own_head else num_classes, new_head)
    if weights is None:
        if name is None or not names_code(name):
            raise ModelError(
                "no weights given", "Give --weights: a run directory, a file, or 'pretrained'."
            )
        module = user_model(name, None if own_head else num_classes)
        built = Model(module, name, 3)
        note = f"no --weights: {name} is used with those that it was made with"
        return _with_statistics(replace(built, notes=(note,)), own_statistics(module, name))
    path, key = weights_file(weights)
    if not path.exists():
        raise ModelError(f"no weights at {path}", "Give a run directory, a file, or 'pretrained'.")
    run = _run_config(path) if path.is_dir() else {}
    if run and name is None:
        check_trusted(f"run {path}", name=run["architecture"])
    name = name or run.get("architecture")
    if name is None:
        raise ModelError(
            f"{path} does not say which model it is for", "Give the model's name: --teacher NAME."
        )
    if run and resolved_name(name) != resolved_name(run["architecture"]):
        raise ModelError(
            f"run {path} holds a {run['architecture']}, not a {name}", "Leave the model's name out."
        )
    name = run.get("architecture", name)
    built = build_model(name, num_classes, channels)
    checkpoint = read_checkpoint(path / "model.safetensors" if run else path, key)
    if own_head and (theirs := _trained_outputs(built, checkpoint, num_classes)) != num_classes:
        built, num_classes = build_model(name, theirs, channels), theirs
    loaded = _with_weights(built, checkpoint, num_classes)
    if not run:
        return _with_recorded(loaded, checkpoint)
    return replace(
        loaded,
        statistics=(run["mean"], run["std"]),
        source=f"run {path}",
        image_size=run.get("image_size"),
        classes=run.get("classes"),
    )


def with_weights_file(built: Model, weights: str) -> Model:
    """The model with the weights of a file, FILE or FILE#KEY. Raises ModelError."""
    path, key = weights_file(weights)
    checkpoint = read_checkpoint(path, key)
    return _with_recorded(_with_weights(built, checkpoint, -1), checkpoint)


# ---- by name --------------------------------------------------------------------------------


def _published(name: str, num_classes: int | None, new_head: bool) -> Model:
    """A model with the weights that torchvision or timm publish."""
    found = pretrained_model(name, num_classes, new_head)
    notes: tuple[str, ...] = ()
    if found.fresh:
        new = f"{', '.join(found.fresh[:4])}{', ...' if len(found.fresh) > 4 else ''}"
        notes = (f"pretrained {name} has {found.classes} classes: new and untrained are {new}",)
    return Model(
        module=found.module,
        architecture=name,
        channels=3,
        statistics=found.statistics,
        image_size=found.image_size,
        source=f"the pretrained {name}",
        notes=notes,
        aliases=found.aliases,
        zoom=found.zoom,
        interpolation=found.interpolation,
    )


# ---- weights --------------------------------------------------------------------------------


def _run_config(path: Path) -> dict[str, Any]:
    """Architecture and normalisation of a run directory, from its config.yaml.

    Raises ModelError where there is none, or it or the weights of a finished run are damaged.
    """
    try:
        config = read_config(path)
        check_file(path, "model.safetensors")
    except RunError as error:
        raise ModelError(error.cause, error.remedy) from error
    try:
        model, classes = config["model"], config.get("classes")
        known = {key: model[key] for key in ("architecture", "mean", "std", "image_size")}
        known["classes"] = None if classes is None else tuple(map(str, classes))
        known |= {"mean": tuple(known["mean"]), "std": tuple(known["std"])}
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not a run directory: {error}",
            "A run directory holds config.yaml and model.safetensors.",
        ) from error
    return known


def _with_weights(built: Model, checkpoint: Checkpoint, num_classes: int) -> Model:
    """The model with a checkpoint's weights in it."""
    module, path = built.module, checkpoint.path
    found = fitted(module.state_dict(), checkpoint)
    if found.without_auxiliary:
        if ":" in built.architecture:
            raise ModelError(
                f"{path} lacks the auxiliary heads of {built.architecture}",
                "Name a callable that builds the model without them.",
            )
        module = torchvision_model(built.architecture, num_classes, aux_logits=False)
    own = module.state_dict()
    tensors = {name: found.tensors[name] for name in own}
    _check_shapes(own, tensors, path, num_classes)
    check_tensors(own, tensors, path)
    module.load_state_dict(tensors)
    said = [*checkpoint.notes, *found.notes]
    notes = (f"weights of {path.name}: {', '.join(said)}",) if said else ()
    return replace(built, module=module, notes=notes)


def _with_recorded(loaded: Model, checkpoint: Checkpoint) -> Model:
    """The model with the normalisation that a checkpoint records."""
    return _with_statistics(
        loaded, checkpoint_statistics(checkpoint, loaded.module, loaded.architecture)
    )


def _with_statistics(model: Model, found: tuple[Statistics, str] | None) -> Model:
    """The model with this normalisation, and where it comes from; None for no other."""
    return model if found is None else replace(model, statistics=found[0], source=found[1])


def _trained_outputs(built: Model, checkpoint: Checkpoint, num_classes: int) -> int:
    """How many outputs a checkpoint's last layer has, of a model built for `num_classes`."""
    own, theirs = built.module.state_dict(), fitted(built.module.state_dict(), checkpoint).tensors
    reshaped = [n for n in own if n in theirs and own[n].shape != theirs[n].shape]
    heads = {
        theirs[n].shape[0]
        for n in reshaped
        if own[n].shape[:1] == (num_classes,) and own[n].shape[1:] == theirs[n].shape[1:]
    }
    return int(heads.pop()) if len(heads) == 1 else num_classes


def _check_shapes(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, num_classes: int
) -> None:
    reshaped = [n for n in own if own[n].shape != state[n].shape]
    if reshaped:
        name = reshaped[-1]
        theirs, ours = tuple(state[name].shape), tuple(own[name].shape)
        last_only = all(state[n].shape[1:] == own[n].shape[1:] for n in reshaped)
        if last_only and ours[0] == num_classes:
            raise ModelError(
                f"{path} has {theirs[0]} classes, the dataset has {num_classes}",
                "Give weights that were trained on this dataset's classes.",
            )
        raise ModelError(
            f"{path} belongs to another architecture: {name} is {theirs}, not {ours}",
            "Name the model the weights were trained with.",
        )
