"""Memory for pixels that is used again: to be given new pages costs more than what is done in them.

`Buffers` is a process's own. `Slots` is shared with workers, who leave there what they render.
"""

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Buffers:
    """Memory that is given out as tensors, and again once no tensor refers to it any more."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def empty(self, *shape: int) -> Tensor:
        """uint8, contiguous, of any content."""
        size, free = math.prod(shape), self._free
        at = next((i for i, memory in enumerate(free) if len(memory) >= size), None)
        if at is None:
            free.clear()  # too small from now on
            memory = np.empty(size, dtype=np.uint8)
        else:
            memory = free.pop(at)
        # The tensor's storage, which all that is made of it shares, keeps this array alive.
        lent = memory[:size]
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(shape)


class Slots:
    """Places in shared memory. Which of them may be written is for their users to know."""

    def __init__(self, count: int, size: int) -> None:
        """count: of places. size: bytes of each. Raises RuntimeError where there is too little."""
        self.count, self.size = count, size
        self._memory: Tensor = torch.empty((count, size), dtype=torch.uint8).share_memory_()

    def at(self, slot: int, shape: Sequence[int]) -> Tensor:
        """uint8 of this shape in a place, which it must fit in."""
        return self._memory[slot, : math.prod(shape)].view(shape)
