"""The optimiser of a run, stepped once a batch: torch's own, at a rate in plain arithmetic.

torch's schedulers take some ten microseconds of Python a step, and give one rate at a time; a step
that is captured as a graph reads those of a whole epoch from a table.
"""

import math
from collections import Counter
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


_START, _END = 25.0, 1e4
"""onecycle begins at a 25th of the peak, and ends at a 10,000th of that: torch's defaults."""


class Schedule:
    """The rate of an optimiser, as `step` batches have moved it.

    multistep: times gamma after each milestone epoch. cosine: to zero at the end. onecycle: up for
    `warmup` of the steps, then down (Smith, Topin 2017; momentum is left alone). Bit for bit as
    torch's MultiStepLR, CosineAnnealingLR and OneCycleLR of so many steps.
    """

    def __init__(self, optimizer: Optimizer, settings: TrainSettings, steps_per_epoch: int) -> None:
        """Sets the optimiser's rate to that of the first step."""
        self._optimizer = optimizer  # which has other groups once a state is loaded
        self._settings, self._total = settings, settings.epochs * steps_per_epoch
        self._milestones = Counter(epoch * steps_per_epoch for epoch in settings.milestones)
        self._moved(0, self._after(settings.lr, 0))

    @property
    def rate(self) -> float:
        """That of the next step."""
        return self._rate

    def step(self) -> None:
        """Once a batch, after the optimiser's."""
        self._moved(self._step + 1, self._after(self._rate, self._step + 1))

    def upcoming(self, steps: int) -> list[float]:
        """The rates of the next so many steps."""
        rates = [self._rate]
        for step in range(self._step + 1, self._step + steps):
            rates.append(self._after(rates[-1], step))
        return rates[:steps]

    def state_dict(self) -> dict[str, Any]:
        """As torch's schedulers name it."""
        return {"last_epoch": self._step, "_last_lr": [self._rate]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also that of torch's schedulers."""
        (rate, *_) = state["_last_lr"]
        self._moved(int(state["last_epoch"]), float(rate))

    def _moved(self, step: int, rate: float) -> None:
        self._step, self._rate = step, rate
        for group in self._optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):  # or it is read where it lies on the device
                group["lr"] = rate

    def _after(self, before: float, step: int) -> float:
        """The rate of a step, from that of the step before; at step 0 from the peak."""
        match self._settings.schedule:
            case "multistep":
                return before * self._settings.gamma ** self._milestones[step]
            case "cosine":
                return self._cosine(before, step)
            case "onecycle":
                return self._onecycle(step)
        return before

    def _cosine(self, before: float, step: int) -> float:
        """(1 + cos(pi t / T)) / 2 of the peak, as its ratio to the step before."""
        if step == 0:
            return before
        total, peak = self._total, self._settings.lr
        if (step - 1 - total) % (2 * total) == 0:  # after the last step, where that is 0
            return before + peak * (1 - math.cos(math.pi / total)) / 2
        now, then = (1 + math.cos(math.pi * t / total) for t in (step, step - 1))
        return now / then * before

    def _onecycle(self, step: int) -> float:
        """Half a cosine up to the peak, and another one down."""
        total, peak = self._total, self._settings.lr
        # Divided by the length of either phase minus one: keep both longer than a step.
        share = min(max(self._settings.warmup, 2 / total), 1 - 1 / total) if total > 3 else 0.0
        first, low = peak / _START, peak / _START / _END
        top = share * total - 1
        if step <= top:
            return _between(first, peak, step / top)
        return _between(peak, low, (step - top) / (total - 1 - top))


def _between(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * done) + 1)
