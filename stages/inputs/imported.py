"""What `module:callable` names, for datasets and models alike."""

import importlib
from typing import Any

from stages.errors import PipelineError

_OWN_KINDS = ("folder", "hf", "timm")
"""What may stand before a colon and names no module."""


def names_code(spec: str) -> bool:
    """Whether the name of a dataset or a model is a `module:callable`."""
    return ":" in spec and spec.partition(":")[0] not in _OWN_KINDS


def imported(spec: str, kind: str, error: type[PipelineError]) -> Any:
    """The object that `spec` names. Raises `error`, which says what `kind` of thing it was for."""
    module, _, attribute = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as cause:
        raise error(
            f"cannot import {kind} '{spec}': {cause}",
            "module:callable must be importable from the current directory.",
        ) from cause
