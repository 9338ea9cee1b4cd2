"""The table of losses: what each is trained with, as its own file says it."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor, nn

from stages.errors import ConfigError
from stages.objectives.losses.rows import TeacherRows, needs_whole_rows

Function = TypeVar("Function", bound=Callable[..., Any])
_OF_THE_LOOP = ("reduction", "weights", "standardise")
"""Arguments of losses that the training loop gives; they are not settings."""


class LearningLoss(nn.Module):
    """A loss with parameters of its own, which the student's optimiser has as well."""

    def start_epoch(self, epoch: int) -> None:
        """Called at the start of every epoch, from 0."""
        raise NotImplementedError


class Loss(Protocol):
    """How every loss is called, once its parameters are set.

    Returns the mean over the batch, float32 (). Raises ConfigError where it needs more than this.
    """

    def __call__(
        self, student_logits: Tensor, teacher_logits: TeacherRows, labels: Tensor
    ) -> Tensor:
        """student_logits, teacher_logits: float (B, C). labels: int64 (B,)."""


@dataclass(frozen=True)
class Definition:
    """A loss as it is trained with: L = ce_weight * CE + weight * min(epoch / warmup, 1) * loss.

    The numbers are the official defaults; epochs count from 1, warmup 0 is none. reads: at which
    temperatures it reads teacher rows, as numbers and names of its parameters (one that is None is
    passed over); None for a loss that needs whole rows. couples_rows: it takes the weights of rows,
    as it is no mean of row losses. views: how many views of a sample it sees at once. standardises:
    it standardises logits itself, only where it should. reads_offset: a constant that is added to
    a teacher's row changes it. weighs_rows: rows can be given weights. reads_labels: it needs the
    labels of samples. on_host: it takes steps on the host, or may, so that steps are not recorded.
    lskd: what standardised logits change in its defaults, see `LSKD`.
    """

    name: str
    loss: Callable[..., Any]
    ce_weight: float
    weight: float
    warmup: int = 0
    reads: tuple[float | str, ...] | None = None
    couples_rows: bool = False
    views: int = 1
    standardises: bool = False
    reads_offset: bool = False
    weighs_rows: bool = True
    reads_labels: bool = True
    on_host: bool = False
    lskd: Mapping[str, float] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether it is a module with parameters of its own, made anew for each student."""
        return inspect.isclass(self.loss)

    @property
    def defaults(self) -> dict[str, Any]:
        """Its own parameters, temperature among them: numbers, words, or None, see the loss."""
        parameters = inspect.signature(self.loss).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.default is not p.empty and p.name not in _OF_THE_LOOP
        }

    def check(self, parameters: Iterable[str]) -> None:
        """Raise ConfigError for parameters that it does not have."""
        own = self.defaults
        if unknown := set(parameters) - set(own):
            has = f"It has: {', '.join(own)}." if own else "It has no parameters."
            raise ConfigError(
                f"the loss '{self.name}' has no {' and no '.join(sorted(unknown))}", has
            )

    def make(self, parameters: Mapping[str, Any]) -> Loss:
        """The loss with these parameters set."""
        if self.learns:
            return cast(Loss, self.loss(**parameters))
        return functools.partial(self.loss, **parameters)

    def temperatures(self, parameters: Mapping[str, Any]) -> list[float]:
        """At which temperatures it reads teacher rows, ascending, with these parameters set.

        Raises ConfigError for a loss that needs whole rows.
        """
        if self.reads is None:
            raise needs_whole_rows(self.name)
        values = self.defaults | dict(parameters)
        read = (values[part] if isinstance(part, str) else part for part in self.reads)
        return sorted({temperature for temperature in read if temperature is not None})


REGISTERED: dict[str, Definition] = {}


def loss(name: str, **trained_with: Any) -> Callable[[Function], Function]:
    """Register a function, or a module's class, as a loss. trained_with: of its `Definition`."""

    def register(function: Function) -> Function:
        REGISTERED[name] = Definition(name, function, **trained_with)
        return function

    return register
