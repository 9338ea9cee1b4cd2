"""What a student minimises against its teacher's logits: one idea a file.

Every loss takes (student_logits, teacher_logits, labels) and its own parameters, and returns the
mean over the batch, or with reduction="none" one number a row, so that bias-aware weights can be
put on rows. Losses that couple rows (`dist`, `mlkd`) take those weights instead. `standardised`
brings logits to one scale, before any loss.

`build_loss("kd", temperature=4)` makes one for a training loop: a callable of (student_logits,
teacher_logits, labels). Two need more of the loop, and raise ConfigError without: `ctkd` learns a
temperature, so it is a module with parameters for the optimiser and a `start_epoch`; `mlkd` takes
the rows of two views.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from stages.errors import ConfigError
from stages.objectives.losses.corrections import ka_lsr, la, lr, rc
from stages.objectives.losses.ctkd import CTKD
from stages.objectives.losses.dist import dist
from stages.objectives.losses.dkd import dkd, nkd
from stages.objectives.losses.hard import ce, mixed_ce
from stages.objectives.losses.kd import kd
from stages.objectives.losses.mlkd import mlkd
from stages.objectives.losses.rld import rld
from stages.objectives.losses.rows import TeacherRows, TemperedRows, changed, lump
from stages.objectives.losses.standardise import standardised
from stages.objectives.losses.ttm import ttm, wttm
from stages.objectives.losses.wsld import wsld

__all__ = [
    "CTKD",
    "DEFINITIONS",
    "LOSSES",
    "LSKD",
    "PARAMETERS",
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
    "temperatures_read",
]


PARAMETERS = (
    "temperature", "alpha", "beta", "gamma", "epsilon", "sure_temperature", "average"
)  # fmt: skip
"""What losses may have to be set; each has some of them."""


@dataclass(frozen=True)
class Definition:
    """A loss as it is trained with: L = ce_weight * CE + weight * min(epoch / warmup, 1) * loss.

    The numbers are the official defaults; epochs count from 1, warmup 0 is none. couples_rows: the
    loss takes the weights of rows, as it is no mean of row losses. views: how many views of a
    sample it sees at once. standardises: the loss standardises logits itself, only where it should.
    """

    loss: Callable[..., Any]
    ce_weight: float
    weight: float
    warmup: int = 0
    couples_rows: bool = False
    views: int = 1
    standardises: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """Its own parameters, temperature among them: numbers, words, or None, see the loss."""
        parameters = inspect.signature(self.loss).parameters
        return {name: p.default for name, p in parameters.items() if name in PARAMETERS}

    def make(self, parameters: Mapping[str, Any]) -> Callable[..., Tensor]:
        """A callable of (student_logits, teacher_logits, labels) with its parameters set."""
        if inspect.isclass(self.loss):
            learning: Any = self.loss(**parameters)
            return cast(Callable[..., Tensor], learning)
        return functools.partial(self.loss, **parameters)


DEFINITIONS: dict[str, Definition] = {
    "ce": Definition(ce, 1.0, 0.0),
    "kd": Definition(kd, 0.1, 0.9),
    "dkd": Definition(dkd, 1.0, 1.0, warmup=20),
    "nkd": Definition(nkd, 1.0, 1.0),
    "dist": Definition(dist, 1.0, 2.0, couples_rows=True),
    # CE .1 on either view
    "mlkd": Definition(mlkd, 0.2, 0.9, couples_rows=True, views=2, standardises=True),
    "ctkd": Definition(CTKD, 0.1, 0.9),
    "ttm": Definition(ttm, 1.0, 45.0),
    "wttm": Definition(wttm, 1.0, 4.0),
    "rld": Definition(rld, 1.0, 1.0, warmup=20),
    "la": Definition(la, 0.0, 1.0),
    "ka_lsr": Definition(ka_lsr, 0.1, 0.9),
    "lr": Definition(lr, 0.0, 1.0),
    "rc": Definition(rc, 1.0, 1.0),
    "wsld": Definition(wsld, 1.0, 2.25),
}

LOSSES: dict[str, Callable[..., Any]] = {name: d.loss for name, d in DEFINITIONS.items()}
"""The functions themselves, by their names on the command line: (student_logits, teacher_logits,
labels, ...) -> a loss; `ctkd`, which learns, is a module's class.
"""

LSKD: dict[str, dict[str, float]] = {
    "kd": {"temperature": 2.0, "weight": 9.0},
    "dkd": {"temperature": 2.0, "weight": 9.0},
    "mlkd": {"temperature": 2.0, "weight": 9.0},
    "ctkd": {"weight": 9.0},
    "rld": {"temperature": 2.0, "weight": 9.0},
    "rc": {"temperature": 2.0, "weight": 9.0},
    "la": {"temperature": 2.0},
}
"""What `--logit-stand` changes in the code of LSKD and of RLD: --base-temp 2, --kd-weight 9 (for
`dkd`, `rld` and `rc` a factor on both parts). Other losses keep their own defaults.
"""


def build_loss(name: str, **parameters: Any) -> Callable[..., Tensor]:
    """A loss by its name, with its own defaults where nothing is said.

    Returns a callable of student_logits float (B, C), teacher_logits float (B, C) and labels int64
    (B,): float32, (). Raises ConfigError for an unknown loss, or a parameter that it does not have.
    """
    return definition_of(name, parameters).make(parameters)


def definition_of(name: str, parameters: Mapping[str, Any]) -> Definition:
    """Raises ConfigError for an unknown loss, or a parameter that it does not have."""
    if name not in DEFINITIONS:
        raise ConfigError(f"unknown loss '{name}'", f"Known: {', '.join(DEFINITIONS)}.")
    own = DEFINITIONS[name].defaults
    if unknown := set(parameters) - set(own):
        has = f"It has: {', '.join(own)}." if own else "It has no parameters."
        raise ConfigError(f"the loss '{name}' has no {' and no '.join(sorted(unknown))}", has)
    return DEFINITIONS[name]


def temperatures_read(loss: Callable[..., Tensor]) -> list[float]:
    """At which temperatures a loss reads teacher rows that are known in part: it is asked.

    Raises ConfigError for a loss that needs whole rows.
    """
    asked: list[float] = []

    def at(temperature: float) -> Tensor:
        asked.append(temperature)
        return torch.zeros(2, 3)

    labels = torch.tensor([0, 1])
    rows = TemperedRows(at, kept=torch.tensor([[0, 1], [0, 1]]))
    loss(torch.zeros(2, 3), rows, labels)
    return sorted(set(asked))
