"""What torch's generators will draw next, to be kept and put back."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """What torch's generators will draw next: uint8 tensors."""

    cpu_generator: Tensor
    cuda_generator: Tensor | None

    @staticmethod
    def now(device: torch.device) -> "RandomState":
        on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(torch.get_rng_state(), on_gpu)

    def differs_on_gpu(self, other: "RandomState") -> bool:
        """Whether the GPU's generator was used in between."""
        mine, others = self.cuda_generator, other.cuda_generator
        return mine is not None and others is not None and not torch.equal(mine, others)

    def restore(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self.cpu_generator)
        if self.cuda_generator is not None:
            torch.cuda.set_rng_state(self.cuda_generator.cpu())
