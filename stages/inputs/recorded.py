"""The normalisation that weights were trained with, where their file or their model records it."""

import argparse
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stages.inputs.checkpoints import Checkpoint
from stages.inputs.datasets import Statistics

_SETTINGS = ("args", "pretrained_cfg", "default_cfg", "config", "opt")
"""Where training scripts put what they were called with."""


def checkpoint_statistics(
    checkpoint: Checkpoint, module: nn.Module, architecture: str
) -> tuple[Statistics, str] | None:
    """What a checkpoint of this model records, and where; None where it does not. timm's training
    script leaves it to the model where nothing else was given.
    """
    document = checkpoint.document
    if found := recorded_statistics(document, checkpoint.path):
        return found, f"{checkpoint.path.name}'s own configuration"
    script = document.get("args") if isinstance(document, Mapping) else None
    if architecture.startswith("timm:") and hasattr(script, "mean"):
        return own_statistics(module, architecture)
    return None


def own_statistics(module: nn.Module, source: str) -> tuple[Statistics, str] | None:
    """What the `pretrained_cfg` says that timm's models have, where the user's callable returns
    one. source: of the model, in words.
    """
    found = recorded_statistics({"pretrained_cfg": getattr(module, "pretrained_cfg", None)})
    return (found, f"{source}'s pretrained_cfg") if found else None


def recorded_statistics(document: Any, path: Path | None = None) -> Statistics | None:
    """Mean and standard deviation a channel, where a checkpoint records how its images were
    normalised: in the arguments of its training script, in timm's pretrained_cfg, or in the
    config.json that lies beside the file. None where it does not, or not on the scale of 0 to 1.
    """
    places = [document.get(key) for key in _SETTINGS] if isinstance(document, Mapping) else []
    if path is not None and (beside := path.with_name("config.json")).is_file():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            places.append(json.loads(beside.read_text()).get("pretrained_cfg"))
    for place in places:
        values = vars(place) if isinstance(place, argparse.Namespace) else place
        if isinstance(values, Mapping):
            mean, std = _numbers(values.get("mean")), _numbers(values.get("std"))
            if mean and std and len(mean) == len(std) and min(std) > 0:
                return mean, std
    return None


def _numbers(values: Any) -> tuple[float, ...]:
    """Numbers from 0 to 1; empty for anything else."""
    if not isinstance(values, (list, tuple)):
        return ()
    fine = all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in values)
    return tuple(map(float, values)) if fine else ()
