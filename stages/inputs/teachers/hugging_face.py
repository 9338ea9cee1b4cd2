"""Image classifiers of Hugging Face's transformers: `hf-model:DIR`, as `save_pretrained` left them.

The processor that lies beside the weights says how images are normalised, resized and cropped, the
configuration's `id2label` what the outputs are. Nothing is downloaded, and no code of the folder
is run. Fails when: the processor makes images that are not square.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import ModelError
from stages.inputs.datasets import Statistics
from stages.inputs.models import Model
from stages.inputs.teachers.registry import Asked, first_line, needed, teacher

_UNNAMED = re.compile(r"LABEL_\d+")
_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Of Pillow's numbers, which processors keep as `resample`."""
_SQUASHED_FROM = 384
"""From this side on processors with a `crop_pct` resize the whole image: transformers' ConvNext."""


@dataclass(frozen=True)
class Processing:
    """What is done to images: fields as `Model` has them."""

    image_size: int | None
    zoom: float | None
    statistics: Statistics
    interpolation: str = ""


@teacher("hf-model:")
def hf_model(asked: Asked) -> Model:
    """A folder, or a name that lies in Hugging Face's cache. Raises ModelError."""
    transformers = needed("transformers", "transformers", asked.name)
    given = Path(asked.argument).expanduser()
    place = str(given if given.exists() else asked.argument)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module, info = transformers.AutoModelForImageClassification.from_pretrained(
                place, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # of json, safetensors, tokenisers and the hub: many kinds
        raise ModelError(
            f"cannot load {asked.name}: {first_line(error)}",
            "Give a folder that save_pretrained wrote, of an image classifier and its processor.",
        ) from error
    if missing := sorted(str(key) for key in info["missing_keys"]):
        raise ModelError(
            f"the weights of {asked.name} have nothing for {', '.join(missing[:3])}",
            "It is no finished classifier: fine-tune it first.",
        )
    if wrong := info.get("mismatched_keys"):
        raise ModelError(
            f"the weights of {asked.name} are of another shape than its config.json says: "
            f"{', '.join(str(key) for key in [*wrong][:3])}",
            "Give the folder that save_pretrained wrote.",
        )
    done = _processing(transformers, place, asked.name)
    names = tuple(str(module.config.id2label[i]) for i in range(module.config.num_labels))
    named = not all(map(_UNNAMED.fullmatch, names))
    return Model(
        module=module.float(),
        architecture=asked.name,
        channels=int(getattr(module.config, "num_channels", 3)),
        statistics=None if done is None else done.statistics,
        image_size=getattr(module.config, "image_size", None) if done is None else done.image_size,
        source=f"{asked.name}'s processor",
        notes=(f"{asked.name} has no processor: give --mean and --std",) if done is None else (),
        classes=names if named else None,
        zoom=None if done is None else done.zoom,
        interpolation="" if done is None else done.interpolation,
    )


def _processing(transformers: Any, place: str, name: str) -> Processing | None:
    """What the processor beside the weights does; None where there is none."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    return processing_of(processor.to_dict(), name)


def processing_of(config: Mapping[str, Any], name: str) -> Processing:
    """What a processor does, by its settings. Raises ModelError for images that are not square."""
    rest = _statistics(config), _FILTERS.get(int(config.get("resample") or 0), "")
    resized = dict(config.get("size") or {}) if config.get("do_resize", True) else {}
    crops = config.get("do_center_crop", False)
    side = _square(config.get("crop_size"), name) if crops else None
    edge = resized.get("shortest_edge")
    whole = None if edge is not None else _square(resized, name)
    if (share := config.get("crop_pct")) is not None and edge is not None and side is None:
        zoom = 1 / share if edge < _SQUASHED_FROM else 0.0
        return Processing(int(edge), zoom, *rest)
    if side is None:  # the whole image, or the square at its centre
        size = edge if edge is not None else whole
        zoom = None if size is None else float(edge is not None)
        return Processing(size, zoom, *rest)
    return Processing(side, max(1.0, (edge or whole or side) / side), *rest)


def _square(size: Any, name: str) -> int | None:
    """The side of {"height": side, "width": side}; None for nothing."""
    if isinstance(size, int):
        return size
    if not size:
        return None
    height, width = size.get("height"), size.get("width")
    if height is None or height != width:
        raise ModelError(
            f"{name} takes images of {height} x {width} pixels", "Only square images can be cached."
        )
    return int(height)


def _statistics(config: Mapping[str, Any]) -> Statistics:
    """Mean and standard deviation on the scale of 0 to 1, of what is rescaled, moved by 1 where
    `rescale_offset` says so, and then normalised; for EfficientNet (`include_top`) once more by the
    deviation alone.
    """
    scale = 255 * (config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1)
    offset = 1.0 if config.get("rescale_offset", False) else 0.0
    normalises = config.get("do_normalize", True) and config.get("image_mean") is not None
    mean = config["image_mean"] if normalises else [0.0]
    std = config["image_std"] if normalises else [1.0]
    mean, std = (list(x) if isinstance(x, list | tuple) else [x] for x in (mean, std))
    if config.get("include_top", False):
        std = [s**2 for s in std]
    return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std)
