"""The optimiser of a run, stepped once a batch: torch's own."""

from typing import Any

import torch
from torch import Tensor, nn
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
    """Go on from a checkpoint's state, stepped as it was: fused, or by what came before. Tensors
    that there are already take its values.
    """
    before = states_of(optimizer)
    optimizer.load_state_dict(state)
    for name, value in states_of(optimizer).items():
        if (kept := before.get(name)) is not None and kept.shape == value.shape:
            number, key = name
            optimizer.state[_parameters(optimizer)[number]][key] = kept.copy_(value)
    # What GradScaler goes by is set when an optimiser is made, and is no part of its state.
    fused = all(group.get("fused") for group in optimizer.param_groups)
    optimizer._step_supports_amp_scaling = fused  # type: ignore[attr-defined]


def states_of(optimizer: Optimizer) -> dict[tuple[int, str], Tensor]:
    """What it keeps of each parameter, by the parameter's number and the value's name."""
    return {
        (number, key): value
        for number, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def state_of(optimizer: Optimizer, rate: float) -> dict[str, Any]:
    """Its state for a checkpoint, at this rate, as if it read the rate from the host."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = False
    return state


def read_rate_from(optimizer: Optimizer, rate: Tensor | float) -> None:
    """Let it step at a rate that lies on the device, float32 (), so that steps can be recorded; or
    at one of the host's again.
    """
    on_device = isinstance(rate, Tensor)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = on_device
    for parameter in _parameters(optimizer) if on_device else ():
        state = optimizer.state.get(parameter, {})
        if isinstance(step := state.get("step"), Tensor):
            state["step"] = step.to(parameter.device)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
