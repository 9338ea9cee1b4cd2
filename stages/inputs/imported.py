"""What `module:callable` names, for datasets and models alike."""

import importlib
from typing import Any

from stages.errors import PipelineError


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
