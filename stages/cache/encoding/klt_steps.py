"""Which step, and how many refined classes, an encoding of the `klt-top` family has."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stages.cache.encoding.base import DEFAULT_BUDGET, Budget, check_range
from stages.cache.encoding.fidelity import coarsest
from stages.errors import CacheError
from stages.sizes import budget_in_words

COARSEST_STEP = 64.0
_MARGIN = 0.97
"""Of the KL budget: rows beyond the calibration differ a little."""
_SEARCHED = 2**21
"""Logits that the step is searched on."""
_STEPS_PER_OCTAVE, _OCTAVES, _SEARCHED_FROM = 32, 12, 16.0
_FEW, _LEADING = 256, (8, 16)
"""How many classes are refined, up to so many classes and above."""


def checked(name: str, logits: Tensor, given: Mapping[str, Any]) -> tuple[int, float | None]:
    """How many classes are refined, and the step that is asked for. Raises CacheError where they
    cannot be, or rows cannot.
    """
    classes, step = logits.shape[1], given.get("step")
    top = given.get("top", min(_LEADING[classes > _FEW], classes))
    if not 1 <= top <= classes:
        raise CacheError(
            f"{name} refines 1 to {classes} classes of {classes}, not {top}",
            f"Give --encoding {name}:top=NUMBER.",
        )
    check_step(name, step)
    check_range(logits, torch.finfo(torch.float32).max, name)
    return int(top), step


def searched_rows(logits: Tensor) -> int:
    """On how many of the rows the step is searched."""
    return max(1, _SEARCHED // logits.shape[1])


def coarsest_step(
    excess: Callable[[float, Budget], float], name: str, budget: Budget | None
) -> float:
    """The coarsest step that holds a budget, with a margin; the default budget if None. excess: as
    `kl_excess`, of a step and what is aimed at. Raises CacheError if there is none.
    """
    budget = DEFAULT_BUDGET if budget is None else budget
    aimed = {t: _MARGIN * kl for t, kl in budget.items()}
    found = coarsest(
        lambda exponent: excess(_step(exponent), aimed),
        _STEPS_PER_OCTAVE * _OCTAVES,
        _STEPS_PER_OCTAVE / 2,  # the KL falls with the square of the step
    )
    if found is None:
        raise CacheError(
            f"no step of the encoding {name} holds a KL of {budget_in_words(budget)}",
            "Use --encoding float32.",
        )
    return _step(found)


def _step(exponent: int) -> float:
    return float(_SEARCHED_FROM * 2 ** (-exponent / _STEPS_PER_OCTAVE))


def check_step(name: str, step: float | None) -> None:
    """Raise CacheError for a step that an encoding cannot have."""
    if step is not None and not 0 < step <= COARSEST_STEP:
        raise CacheError(
            f"{name} takes a step above 0 and up to {COARSEST_STEP:g}, not {step}",
            f"Give --encoding {name}:step=NUMBER.",
        )
