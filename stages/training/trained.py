"""All that training changes of a model: its weights, its optimiser and the rate of that."""

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from stages.distributed import Ranks, summed
from stages.settings import TrainSettings
from stages.training.graphs import all_tensors
from stages.training.optimise import (
    Schedule,
    make_optimizer,
    read_rate_from,
    restore_optimizer,
    state_of,
    states_of,
)
from stages.training.passes import WorkingWeights


class Trained:
    """module: the model, placed. learned: what the loss learns itself, else None. optimizer: of
    both, stepped at the rate of `schedule`. scaler: of float16's gradients. working: the weights
    that the model may be called with, None for its own.
    """

    def __init__(
        self, module: nn.Module, learned: nn.Module | None, settings: TrainSettings, steps: int
    ) -> None:
        """steps: of an epoch."""
        self.module, self.learned = module, learned
        self.working = WorkingWeights.of(module, settings)
        self.optimizer = make_optimizer(module, settings, learned)
        self.schedule = Schedule(self.optimizer, settings, steps)
        device = next(module.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "float16")

    def descend(self, loss: Tensor, ranks: Ranks) -> None:
        """A step down the gradient of a loss, at the optimiser's rate."""
        self.scaler.scale(loss).backward()
        if self.working is not None:
            self.working.hand_back()
        self._average_learned(ranks)
        self.scaler.step(self.optimizer)
        # Now, so that gradients take no memory while another learner steps.
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def _average_learned(self, ranks: Ranks) -> None:
        """The gradients of what the loss learns, as those of the model, over all ranks."""
        if ranks.world > 1 and self.learned is not None:
            for parameter in self.learned.parameters():
                if parameter.grad is not None:
                    parameter.grad = summed(ranks, parameter.grad) / ranks.world

    def largest(self) -> Tensor:
        """The largest magnitude of a weight, (); NaN and infinities stay what they are."""
        return get_total_norm(
            [p for p in self.module.parameters() if p.is_floating_point()], math.inf
        )

    def rate_from_host(self) -> None:
        """Let the optimiser read the rate from the schedule, and not from the device."""
        read_rate_from(self.optimizer, self.schedule.rate)

    def changed(self) -> dict[Hashable, Tensor]:
        """Every tensor that a step changes."""
        states = states_of(self.optimizer)
        found: dict[Hashable, Tensor] = {name: value for name, value in states.items()}  # noqa: C416
        for of, module in (("model", self.module), ("loss", self.learned)):
            for name, tensor in () if module is None else all_tensors(module):
                found[of, name] = tensor
        return found

    def states(self) -> dict[str, Any]:
        """For a checkpoint."""
        learned = {} if self.learned is None else {"learned": self.learned.state_dict()}
        return {
            "model": self.module.state_dict(),
            "optimizer": state_of(self.optimizer, self.schedule.rate),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            **learned,
        }

    def load(self, states: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises what torch raises for states of something else."""
        self.module.load_state_dict(states["model"])
        restore_optimizer(self.optimizer, states["optimizer"])
        self.schedule.load_state_dict(states["schedule"])
        self.scaler.load_state_dict(states["scaler"])
        if self.learned is not None:
            self.learned.load_state_dict(states["learned"])
