"""What a student minimises against its teacher's logits: one idea a file, found here by itself.

Every loss takes (student_logits, teacher_logits, labels) and its own parameters, and returns the
mean over the batch, or with reduction="none" one number a row, so that bias-aware weights can be
put on rows. Losses that couple rows (`dist`, `mlkd`, `crld`) take those instead. `standardised`
brings logits to one scale, before any loss.

A new loss is a new file with a function under `@loss("name", ce_weight=..., weight=...)`; see
`registry.Definition`. `module:callable` names one that lies elsewhere, see `user.py`.

`build_loss("kd", temperature=4)` makes one for a training loop: a callable of (student_logits,
teacher_logits, labels). Three need more of the loop, and raise ConfigError without: `ctkd` learns a
temperature, so it is a module with parameters for the optimiser and a `start_epoch`; `mlkd` and
`crld` take the rows of two views.
"""

from collections.abc import Callable
from typing import Any

from stages.errors import ConfigError
from stages.objectives.losses.ctkd import CTKD
from stages.objectives.losses.hard import ce, mixed_ce
from stages.objectives.losses.kd import kd
from stages.objectives.losses.registry import REGISTERED, Definition, LearningLoss, Loss
from stages.objectives.losses.rows import Rows, TeacherRows, TemperedRows, changed, lump
from stages.objectives.losses.standardise import standardised
from stages.objectives.losses.user import user_loss
from stages.registry import import_all
from stages.user_code import imported, names_code

__all__ = [
    "CTKD",
    "DEFINITIONS",
    "LOSSES",
    "LSKD",
    "PARAMETERS",
    "Definition",
    "LearningLoss",
    "Loss",
    "Rows",
    "TeacherRows",
    "TemperedRows",
    "build_loss",
    "ce",
    "changed",
    "definition_of",
    "kd",
    "lump",
    "mixed_ce",
    "standardised",
]

import_all(__name__)

DEFINITIONS: dict[str, Definition] = dict(sorted(REGISTERED.items()))
"""Every loss of this package by its name on the command line."""

PARAMETERS = tuple(dict.fromkeys(key for d in DEFINITIONS.values() for key in d.defaults))
"""What losses may have to be set; each has some of them."""

LOSSES: dict[str, Callable[..., Any]] = {name: d.loss for name, d in DEFINITIONS.items()}
"""The functions themselves, by their names on the command line: (student_logits, teacher_logits,
labels, ...) -> a loss; `ctkd`, which learns, is a module's class.
"""

LSKD = {name: d.lskd for name, d in DEFINITIONS.items() if d.lskd}
"""What `--logit-stand` changes in the code of LSKD and of RLD: --base-temp 2, --kd-weight 9 (for
`dkd`, `rld` and `rc` a factor on both parts). Other losses keep their own defaults.
"""


def build_loss(name: str, **parameters: Any) -> Loss:
    """A loss by its name, with its own defaults where nothing is said.

    Parameters
    ----------
    name : of the table, or `module:callable`.
    parameters : of this loss, for example `temperature`.

    Returns
    -------
    A callable of student_logits float (B, C), teacher_logits float (B, C) and labels int64 (B,):
    the mean over the batch, float32 ().

    Raises
    ------
    ConfigError : for an unknown loss, a parameter that it does not have, or a callable that is no
        loss; and by the loss, where it needs more than these three.
    """
    definition = definition_of(name)
    definition.check(parameters)
    return definition.make(parameters)


def definition_of(name: str) -> Definition:
    """The loss of this name. Raises ConfigError where there is none."""
    if names_code(name):
        return user_loss(name, imported(name, "loss", ConfigError))
    if name not in DEFINITIONS:
        raise ConfigError(
            f"unknown loss '{name}'", f"Known: {', '.join(DEFINITIONS)}, module:callable."
        )
    return DEFINITIONS[name]
