"""A network of the user's own: `module:callable`, called with the number of classes."""

import contextlib
import inspect
from typing import Any

from torch import nn

from stages.errors import ModelError, PipelineError
from stages.user_code import error_line, imported


def user_model(spec: str, num_classes: int | None) -> nn.Module:
    """What the callable `spec` builds; num_classes: None for the outputs that it was trained with.
    Raises ModelError where it cannot be imported or called, or builds something else.
    """
    make = imported(spec, "model", ModelError)
    try:
        built = _called(make, spec, num_classes)
    except PipelineError:
        raise
    except Exception as error:
        raise ModelError(
            f"'{spec}' failed: {error_line(error)}", "Mend it, or name another."
        ) from error
    if not isinstance(built, nn.Module):
        raise ModelError(f"'{spec}' returned a {type(built).__name__}, not a torch.nn.Module")
    return built


def _called(make: Any, spec: str, num_classes: int | None) -> Any:
    """What a callable returns: for num_classes, by name where it takes that; for nothing at all
    where it takes no argument, or shall have the outputs that it was trained with.
    """
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # not written in Python
        return make() if num_classes is None else make(num_classes)
    if num_classes is None:
        try:
            signature.bind()
        except TypeError as error:
            raise ModelError(
                f"'{spec}' takes {signature}; with --classes it has to build the network with the "
                "outputs that it was trained with",
                "Name a callable that needs no argument.",
            ) from error
        return make()
    takes = signature.parameters.values()
    if any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in takes):
        return make(num_classes=num_classes)
    for arguments in ((num_classes,), ()):
        with contextlib.suppress(TypeError):
            signature.bind(*arguments)
            break
    else:
        raise ModelError(
            f"'{spec}' takes {signature}, not the number of classes alone",
            "Name a callable that takes num_classes, or nothing.",
        )
    return make(*arguments)
