"""Models of torchvision and timm by name, untrained or with the weights that these publish."""

import difflib
from dataclasses import dataclass
from typing import Any

from torch import nn

from stages.errors import ModelError
from stages.inputs.cifar_models import cifar_model_names
from stages.inputs.datasets import Statistics
from stages.inputs.views.boxes import FILTERS

_INITIALISED = ("googlenet", "inception_v3")
"""torchvision warns where these are not told that they shall be; their published weights take
images that the model itself normalises again."""


@dataclass(frozen=True)
class Pretrained:
    """A model with published weights, and how its images were normalised.

    fresh: the parameters that are new, where it was given another number of classes. aliases: the
    names of its outputs, None where they are not known. zoom, interpolation: as `Model`
    has them.
    """

    module: nn.Module
    statistics: Statistics
    image_size: int
    fresh: tuple[str, ...]
    classes: int
    aliases: tuple[tuple[str, ...], ...] | None = None
    zoom: float | None = None
    interpolation: str = ""


def torchvision_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """An untrained model of torchvision. Raises ModelError, suggesting the nearest name."""
    from torchvision.models import get_model, list_models

    if name not in list_models():
        known = [*cifar_model_names(), *list_models()]
        near = difflib.get_close_matches(name, known, n=1)
        raise ModelError(
            f"unknown model '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            "Known: the CIFAR families (resnet8x4, wrn_16_2, vgg8, resnet9_w8, ...), torchvision's "
            "names, timm:NAME, module:callable.",
        )
    if name in _INITIALISED:
        options["init_weights"] = True
    module: nn.Module = get_model(name, weights=None, num_classes=num_classes, **options)
    return module


def timm_model(name: str, num_classes: int | None, pretrained: bool = False) -> Any:
    """A model of timm, without weights or with its own. num_classes: None for its own. Raises
    ModelError.
    """
    timm = _timm(name)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        return timm.create_model(name, pretrained=pretrained, **classes)
    except RuntimeError as error:
        raise ModelError(f"timm has no model '{name}': {error}") from error


def pretrained_model(name: str, num_classes: int | None, new_head: bool) -> Pretrained:
    """A model with its published weights. num_classes: None for those that it was trained on.
    new_head: give it an untrained last layer where it was trained on another number of classes.

    Raises ModelError where there are none, they cannot be downloaded, or the classes differ.
    """
    kind, _, argument = name.partition(":")
    try:
        if kind == "timm":
            return _of_timm(argument, num_classes, new_head)
        return _of_torchvision(name, num_classes, new_head)
    except OSError as error:
        raise ModelError(
            f"the pretrained weights of {name} cannot be downloaded: {error}",
            "Download them elsewhere and give the file with --weights.",
        ) from error
    except (ValueError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"there are no pretrained weights for '{name}'", "Give a run directory or a file."
        ) from error


# ---- details --------------------------------------------------------------------------------


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            f"timm:{name} needs timm", "Install it: pip install 'teacher-cache[timm]'."
        ) from error
    return timm


def _of_timm(name: str, num_classes: int | None, new_head: bool) -> Pretrained:
    published = _timm(name).get_pretrained_cfg(name)
    if published is not None:  # before anything is downloaded
        _check_classes(f"timm:{name}", published.num_classes, num_classes, new_head)
    module = timm_model(name, num_classes, pretrained=True)
    config = module.pretrained_cfg
    theirs = int(config.get("num_classes") or num_classes or module.num_classes)
    _check_classes(f"timm:{name}", theirs, num_classes, new_head)
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    fresh = [n for n in module.state_dict() if n.startswith(tuple(f"{head}." for head in heads))]
    return Pretrained(
        module,
        (tuple(config["mean"]), tuple(config["std"])),
        config["input_size"][-1],
        tuple(fresh) if num_classes not in (None, theirs) else (),
        theirs,
        _timm_aliases(config, theirs),
        _timm_zoom(config),
        _filter(str(config.get("interpolation", ""))),
    )


def _timm_zoom(config: Any) -> float | None:
    """As its evaluation crops: the shorter side goes to size / crop_pct, or the whole image is
    resized where `crop_mode` is squash.
    """
    if config.get("crop_mode") == "squash":
        return 0.0
    return max(1.0, 1 / float(config.get("crop_pct") or 1.0))


def _timm_aliases(config: Any, classes: int) -> tuple[tuple[str, ...], ...] | None:
    """WordNet ids and words of the subset of ImageNet that a model was trained on, if it was."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(config)
    info = ImageNetInfo(subset) if subset else None
    if info is None or info.num_classes() != classes:
        return None
    return tuple(
        (info.index_to_label_name(i), info.index_to_description(i)) for i in range(classes)
    )


def _of_torchvision(name: str, num_classes: int | None, new_head: bool) -> Pretrained:
    from torchvision.models import get_model, get_model_weights

    available: Any = get_model_weights(name)
    chosen = available.DEFAULT
    theirs = len(chosen.meta["categories"])
    _check_classes(name, theirs, num_classes, new_head)
    fresh: list[str] = []
    if num_classes is None or theirs == num_classes:
        module = get_model(name, weights=chosen)
    else:
        options = {"transform_input": True} if name in _INITIALISED else {}
        module = torchvision_model(name, num_classes, **options)
        own, state = module.state_dict(), chosen.get_state_dict(progress=False, check_hash=True)
        fresh = [n for n in own if n not in state or own[n].shape != state[n].shape]
        module.load_state_dict(
            {n: t for n, t in state.items() if n in own and n not in fresh}, strict=False
        )
    transform = chosen.transforms()
    statistics = (tuple(transform.mean), tuple(transform.std))
    aliases = tuple((str(category),) for category in chosen.meta["categories"])
    side = transform.crop_size[0]
    zoom = max(1.0, transform.resize_size[0] / side)
    filter_ = _filter(str(transform.interpolation.value))
    return Pretrained(module, statistics, side, tuple(fresh), theirs, aliases, zoom, filter_)


def _filter(name: str) -> str:
    """A filter that views know; empty for another."""
    return name if name in FILTERS else ""


def _check_classes(name: str, theirs: int, ours: int | None, new_head: bool) -> None:
    if ours not in (None, theirs) and not new_head:
        raise ModelError(
            f"pretrained {name} has {theirs} classes, the dataset has {ours}",
            "Say which of them the dataset's are with --classes; or fine-tune it first "
            "(train-teacher --init pretrained) and give the run.",
        )
