"""A user's own loss: `module:callable`, a function of (student_logits, teacher_logits, labels).

Further parameters have defaults: they are the loss's own, `temperature` among them. The function
returns the mean over the batch, or, where it takes `reduction="none"`, one number a row, or takes
`weights`, float32 (B,) or None, of the rows. Bias-aware weights need one of the two. A function
whose attribute `reads_labels` is False is used without labels as well: they are then all -1.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.errors import ConfigError, PipelineError
from stages.objectives.losses.registry import Definition
from stages.objectives.losses.rows import Reduction, TeacherRows, whole
from stages.user_code import error_line

_FORM = (
    "A loss is a function of (student_logits, teacher_logits, labels); whatever else it takes has "
    "a default."
)
_ROWS = "It is the mean over the batch, or, where it takes reduction='none', one number a row."


def user_loss(spec: str, function: Any) -> Definition:
    """A user's function as a loss, with weights of 1 on it and on cross-entropy. spec: its name,
    `module:callable`. Raises ConfigError where it cannot be called like a loss.
    """
    if not callable(function) or inspect.isclass(function):
        raise ConfigError(f"the loss '{spec}' is a {type(function).__name__}", _FORM)
    signature = inspect.signature(function)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ConfigError(f"the loss '{spec}' takes {signature}: {error}", _FORM) from None
    takes = {"reduction", "weights"} & set(signature.parameters)
    called: Callable[..., Tensor] = _Called(spec, function, frozenset(takes))
    functools.update_wrapper(called, function)
    return Definition(
        spec,
        called,
        ce_weight=1.0,
        weight=1.0,
        reads_offset=True,  # that is not known of it
        couples_rows="reduction" not in takes,
        weighs_rows=bool(takes),
        reads_labels=bool(getattr(function, "reads_labels", True)),
        on_host=True,  # that is not known of it either
    )


class _Called:
    """A function, called with whole rows; what it returns is checked."""

    def __init__(self, spec: str, function: Callable[..., Any], takes: frozenset[str]) -> None:
        self._spec, self._function, self._takes = spec, function, takes
        temperature = inspect.signature(function).parameters.get("temperature")
        self._temperature = temperature.default if temperature else 1.0

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherRows,
        labels: Tensor,
        reduction: Reduction = "mean",
        weights: Tensor | None = None,
        **parameters: Any,
    ) -> Tensor:
        teacher = whole(
            teacher_logits, self._spec, parameters.get("temperature", self._temperature) or 1.0
        )
        if weights is not None and "weights" not in self._takes:
            raise ConfigError(f"the loss '{self._spec}' takes no `weights` of rows", _ROWS)
        given = {"reduction": reduction, "weights": weights}
        parameters |= {name: given[name] for name in self._takes}
        try:
            value = self._function(student_logits.float(), teacher, labels, **parameters)
        except (PipelineError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"the loss '{self._spec}' failed: {error_line(error)}", _FORM
            ) from error
        shape = (len(labels),) if reduction == "none" and "reduction" in self._takes else ()
        if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
            what = (
                f"{value.dtype} of shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise ConfigError(
                f"the loss '{self._spec}' returned {what}, not floats of shape {shape}",
                _ROWS,
            )
        return value
