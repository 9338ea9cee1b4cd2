"""What a model is trained for, and how far it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stages.inputs.feed import Batch


class Task(Protocol):
    """What an epoch shows and what its loss is."""

    @property
    def learned(self) -> nn.Module | None:
        """What the loss learns itself, trained and saved with the model."""

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        """Get ready; return the view that this epoch shows, or those of a sample seen at once; in a
        round of several epochs (`stages.order.Rounds`) those of every one, epoch after epoch.
        """

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """float32 logits (B, C) and the batch they are of -> named scalars.

        `loss` is what is minimised; the others are reported.
        """

    def epoch_metrics(self) -> dict[str, float]:
        """Numbers about the epoch that has just ended, for metrics.jsonl."""


@runtime_checkable
class TaskInPlace(Protocol):
    """A task whose steps can be recorded: what its loss reads can lie in the same memory in every
    epoch, and it does nothing on the host.
    """

    def keep_in_place(self) -> str | None:
        """From the epoch at hand on it does. Returns why it cannot: a sentence without its end."""


@runtime_checkable
class TaskLookingBack(Protocol):
    """A task that depends on how good the model was in the epochs before."""

    def look_back(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """Called before every epoch. history: the lines of metrics.jsonl of those before. Returns
        what is different from now on, in words, once.
        """


@runtime_checkable
class TaskToCompile(Protocol):
    """A task whose loss can be compiled."""

    def compile(self, batch_size: int) -> None:
        """From now on it is, for batches of this size, where it can be."""


@dataclass
class Position:
    """How far a run is: `step` batches into `epoch`, with the sums of its losses so far."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, parts: Mapping[str, Tensor], images: int) -> None:
        """Add the scalars of a batch of so many images, () each, to the sums."""
        for name, value in parts.items():
            if name not in self.totals:
                self.totals[name] = torch.zeros_like(value)
        values = [value.detach() for value in parts.values()]
        torch._foreach_add_([self.totals[name] for name in parts], values, alpha=images)

    def infinite(self) -> list[str]:
        """The sums that are not finite; the device is asked once where all of them are."""
        if bool(torch.isfinite(torch.stack([*self.totals.values()])).all()):
            return []
        return [name for name, total in self.totals.items() if not math.isfinite(float(total))]

    def next_epoch(self) -> None:
        """Begin the next epoch; the sums stay where they are, and are 0."""
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        for total in self.totals.values():
            total.zero_()

    def moved_to(self, other: "Position") -> "Position":
        """The other one, with its sums where these are; others of these are 0."""
        for name, total in self.totals.items():
            total.copy_(other.totals[name]) if name in other.totals else total.zero_()
        return replace(other, totals=other.totals | self.totals)
