"""Optimiser and learning-rate schedule of a run, both stepped once a batch; torch's own."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

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


def make_schedule(
    optimizer: Optimizer, settings: TrainSettings, steps_per_epoch: int
) -> LRScheduler:
    """multistep: times gamma after each milestone epoch. cosine: to zero at the end. onecycle: up
    for `warmup` of the steps, then down (Smith, Topin 2017; momentum is left alone).
    """
    total = settings.epochs * steps_per_epoch
    if settings.schedule == "multistep":
        milestones = [epoch * steps_per_epoch for epoch in settings.milestones]
        return MultiStepLR(optimizer, milestones, settings.gamma)
    if settings.schedule == "cosine":
        return CosineAnnealingLR(optimizer, total)
    if settings.schedule == "onecycle":
        # torch divides by the length of either phase minus one: keep both longer than a step.
        warmup = min(max(settings.warmup, 2 / total), 1 - 1 / total) if total > 3 else 0.0
        return OneCycleLR(optimizer, settings.lr, total, pct_start=warmup, cycle_momentum=False)
    return ConstantLR(optimizer, factor=1.0)
