"""The forward passes of a model that is trained: plain, of several processes, compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stages.device import forward
from stages.distributed import Ranks
from stages.inputs.feed import Normalise
from stages.settings import TrainSettings
from stages.training.compiled import Compiled
from stages.training.working import WorkingWeights


class Passes:
    """From pixels to logits. training: what is called for a step, unless it is compiled."""

    def __init__(
        self,
        module: nn.Module,
        normalise: Normalise,
        settings: TrainSettings,
        ranks: Ranks,
        working: WorkingWeights | None,
    ) -> None:
        """module: placed. working: the weights that it may be called with, None for its own."""
        self._module, self._normalise, self._settings = module, normalise, settings
        self._ranks, self._working = ranks, working
        self._device = next(module.parameters()).device
        self.training: nn.Module = module
        if ranks.world > 1:
            ids = None if self._device.type == "cpu" else [self._device]
            self.training = DistributedDataParallel(module, device_ids=ids)
        self._compiled: Compiled | None = None

    @property
    def compiled(self) -> bool:
        """Whether those of whole batches are."""
        return self._compiled is not None

    def compile(self, views: int, batch_size: int) -> None:
        """Compile them for batches of this size. views: passes of a step."""
        alone = self._alone(views) and not self._settings.capture
        self._compiled = Compiled(self.training, batch_size, self._device, graphs=alone)

    def logits(self, pixels: Tensor, views: int) -> Tensor:
        """Of a step, for which gradients are kept: float (B, C). pixels: uint8 (B, C, H, W), of
        several views one after another, each in a pass of its own.
        """
        # Where gradients of several passes are added up, the weights are the model's own.
        working = self._working if self._alone(views) else None
        model: Callable[[Tensor], Any] = self._compiled or working or self.training
        if self._compiled is not None:
            self._compiled.start_step()
        elif working is not None:
            working.renew()
        outputs = [self._forward(model, some) for some in pixels.chunk(views)]
        return torch.cat(outputs) if views > 1 else outputs[0]

    def predict(self, pixels: Tensor) -> Tensor:
        """The logits of the plain model: float (B, C). pixels: uint8 (B, C, H, W)."""
        return self._forward(self._module, pixels)

    def _forward(self, model: Callable[[Tensor], Any], pixels: Tensor) -> Tensor:
        return forward(model, self._normalise(pixels), self._settings.dtype, self._settings.tf32)

    def _alone(self, views: int) -> bool:
        """Whether a step has one pass, in one process."""
        return views == 1 and self._ranks.world == 1
