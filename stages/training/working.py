"""Weights in bfloat16 for recorded steps: copied by one operation, where autocast casts one after
another, and their gradients back by another. The numbers are those of autocast, bit for bit.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stages.settings import TrainSettings

_CASTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weights autocast rounds and which do nothing else with them. A layer that is derived
from one may do, and is left to autocast; so is a weight that two layers share, whose gradients
autocast adds in float32.
"""


class WorkingWeights:
    """Copies of a model's weights, with which it is called. The model's own stay float32, and are
    what is stepped, evaluated and saved.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        every = Counter(map(id, (p for _, p in module.named_parameters(remove_duplicate=False))))
        self._own = {
            f"{prefix}.{name}".lstrip("."): parameter
            for prefix, layer in module.named_modules()
            if type(layer) in _CASTS
            for name, parameter in layer.named_parameters(recurse=False)
            if parameter.dtype == torch.float32 and parameter.requires_grad
            if every[id(parameter)] == 1
        }
        self._copies = {
            name: own.detach().to(torch.bfloat16).requires_grad_()
            for name, own in self._own.items()
        }
        self._gradients = {name: torch.zeros_like(own) for name, own in self._own.items()}

    @classmethod
    def of(cls, module: nn.Module, settings: TrainSettings) -> "WorkingWeights | None":
        """Those of a step that is recorded in bfloat16; what is compiled has its casts in other
        kernels.
        """
        wanted = settings.capture and settings.dtype == "bfloat16" and not settings.compile
        return cls(module) if wanted else None

    @torch.no_grad()
    def renew(self) -> None:
        """Let the copies be what the weights are: before every step."""
        if self._own:
            torch._foreach_copy_([*self._copies.values()], [*self._own.values()])

    def __call__(self, images: Tensor) -> Any:
        """What the model returns; inside autocast."""
        return functional_call(self._module, self._copies, (images,))

    @torch.no_grad()
    def hand_back(self) -> None:
        """Give the weights the gradients of their copies: after the backward pass."""
        found = {n: copy.grad for n, copy in self._copies.items() if copy.grad is not None}
        if not found:
            return
        torch._foreach_copy_([self._gradients[name] for name in found], [*found.values()])
        for name in found:
            self._own[name].grad, self._copies[name].grad = self._gradients[name], None
