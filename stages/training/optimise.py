"""The optimiser of a run, stepped once a batch: torch's own."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stages.settings import TrainSettings

_FUSED = ("cpu", "cuda")


def make_optimizer(
    module: nn.Module, settings: TrainSettings, learned: nn.Module | None = None
) -> Optimizer:
    """SGD with momentum, Adam or AdamW over all parameters, and those that the loss has itself.

    All parameters are stepped by one kernel (`fused`) where there is one. A checkpoint of a run
    that was stepped otherwise says so, and the run goes on as it began.
    """
    every = [*module.parameters(), *(learned.parameters() if learned is not None else ())]
    parameters = [p for p in every if p.requires_grad]
    fused = all(p.device.type in _FUSED and p.is_floating_point() for p in parameters)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
            fused=fused,
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Go on from a checkpoint's state, stepped as it was: fused, or by what came before."""
    optimizer.load_state_dict(state)
    # What GradScaler goes by is set when an optimiser is made, and is no part of its state.
    fused = all(group.get("fused") for group in optimizer.param_groups)
    optimizer._step_supports_amp_scaling = fused  # type: ignore[attr-defined]
