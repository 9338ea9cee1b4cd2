"""Teachers that bring their weights, as other libraries and exporters leave them.

    hf-model:DIR    clip:MODEL/WEIGHTS    torchscript:FILE    export:FILE    hub:REPO:NAME

Each kind is one file, which registers itself; any other name is `stages.inputs.models`'s.
"""

from collections.abc import Sequence

from stages.errors import ConfigError
from stages.inputs.models import Model, load_model
from stages.inputs.teachers.registry import KINDS, TAKES_WEIGHTS, Asked
from stages.registry import import_all
from stages.settings import TeacherSettings

__all__ = ["KINDS", "load_teacher"]

import_all(__name__)


def load_teacher(settings: TeacherSettings, class_names: Sequence[str], channels: int) -> Model:
    """The teacher that is to be cached. class_names: of the dataset, empty where images have no
    labels: it then has its own outputs. channels: of the dataset's images.

    Raises ModelError if it cannot be loaded, ConfigError for settings that are not for it.
    """
    name = settings.architecture or ""
    kind, colon, argument = name.partition(":")
    load = KINDS.get(f"{kind}{colon}") if colon else None
    if settings.prompts is not None and kind != "clip":
        raise ConfigError("--prompts is for clip:MODEL/WEIGHTS", "Leave it out.")
    if load is None:
        own_head = settings.classes is not None or not class_names
        return load_model(
            settings.architecture,
            settings.weights,
            len(class_names) or 2,  # of its own, where images have none
            channels,
            own_head=own_head,
        )
    if settings.weights is not None and f"{kind}:" not in TAKES_WEIGHTS:
        raise ConfigError(
            f"{name} brings its weights, and --weights {settings.weights} are others",
            "Leave --weights out.",
        )
    asked = Asked(f"{kind}:", argument, settings.weights, class_names, settings.prompts)
    return load(asked)
