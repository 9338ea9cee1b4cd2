"""What a student minimises against its teacher's logits: one idea a file.

Every loss takes (student_logits, teacher_logits, labels) and its own parameters, and returns the
mean over the batch, or with reduction="none" one number a row, so that bias-aware weights can be
put on rows. Losses that couple rows (`dist`, `mlkd`) take those weights instead. `ctkd` learns a
temperature and is a module: call it once to make one. `standardised` brings logits to one scale,
before any loss.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

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
    "LSKD_LOSSES",
    "LSKD_TEMPERATURE",
    "LSKD_WEIGHT",
    "TeacherRows",
    "TemperedRows",
    "ce",
    "changed",
    "kd",
    "lump",
    "mixed_ce",
    "standardised",
    "temperatures_read",
]


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
    def defaults(self) -> dict[str, float]:
        """Its own parameters, temperature among them."""
        parameters = inspect.signature(self.loss).parameters.values()
        return {p.name: p.default for p in parameters if isinstance(p.default, float)}

    def make(self, parameters: Mapping[str, float]) -> Callable[..., Tensor]:
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
"""Every loss by its name on the command line."""

LSKD_LOSSES = ("kd", "dkd", "mlkd", "ctkd")
LSKD_TEMPERATURE, LSKD_WEIGHT = 2.0, 9.0
"""LSKD's --base-temp and --kd-weight, for the losses that it standardises; others keep theirs."""


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
