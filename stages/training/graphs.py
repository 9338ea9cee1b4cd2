"""Work on a GPU that is recorded once and then launched whole: CUDA graphs.

Recorded work may ask nothing of the host: no value that decides what comes next, no shape that
depends on values, no copy from or to the CPU. `NoWaits` finds out before anything is recorded. What
it reads and changes lies in the same memory at every launch.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.device import RandomState

TRIES = 3
"""Calls before work is recorded: kernels are chosen, memory is taken, states begin. The last of
them is looked at.
"""


class WaitError(RuntimeError):
    """Why work cannot be recorded, most often as the host would have to wait: a sentence without
    its end.
    """


class NoWaits(TorchDispatchMode):
    """Raises WaitError at an operation that cannot be recorded. `operations`: those that
    were called, forward and backward, with the shapes of what they returned.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func).removeprefix("aten.")
        if _waits(func, args):
            raise WaitError(f"{name} waits for a value")
        result = func(*args, **(kwargs or {}))
        if len(_devices((args, kwargs, result)) - {"meta"}) > 1 and "copy" in name:
            raise WaitError(f"{name} waits for the other device")
        shapes = [tuple(t.shape) for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.operations.append((name, shapes))
        return result


def _waits(func: Any, args: tuple[Any, ...]) -> bool:
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is torch.ops.aten.index.Tensor:  # its shape depends on values where masks select
        return any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None)
    return True


def _devices(values: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def has_graphs(device: torch.device) -> bool:
    """Whether work on the device can be recorded."""
    return device.type == "cuda"


class Graph:
    """Some work, recorded at the first call and launched at every call; without a GPU it is called
    as it is.
    """

    def __init__(
        self,
        work: Callable[[], None],
        changed: Callable[[], Mapping[Hashable, Tensor]],
        device: torch.device,
        watched: bool = True,
    ) -> None:
        """changed: every tensor that `work` changes, by a name that stays. watched: look for what
        cannot be recorded, where Python sees all that is called (compiled code hides it).
        """
        self._work, self._changed, self._device = work, changed, device
        self._watched, self._recorded = watched, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device) if has_graphs(device) else None

    def record(self, alone: bool = True) -> None:
        """Try the work and record it. Everything is as before afterwards: weights, states, random
        numbers; what the work makes the first time, as an optimiser does, begins with zeros.
        alone: it has the device's random numbers to itself.

        Raises WaitError where it cannot be recorded.
        """
        before = {name: tensor.clone() for name, tensor in self._changed().items()}
        random = RandomState.now(self._device)
        try:
            self._on_its_stream(self._try)
            tried = RandomState.now(self._device)
        finally:
            with torch.no_grad():
                for name, tensor in self._changed().items():
                    tensor.copy_(before[name]) if name in before else tensor.zero_()
            random.restore()
        if not torch.equal(random.cpu_generator, tried.cpu_generator):
            raise WaitError("a random number of the host waits for a value")
        if not alone and random.differs_on_gpu(tried):
            raise WaitError("students together draw random numbers, each its own")
        if self._stream is not None:
            self._graph = self._captured()
        self._recorded = True

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread reads targets ahead meanwhile, and takes memory for them.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._work()
        except RuntimeError as error:  # what compiled code asks the host is found out here
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WaitError(f"CUDA does not record them: {reason}") from error
        return graph

    def _try(self) -> None:
        for _ in range(TRIES - 1):
            self._work()
        with NoWaits() if self._watched else contextlib.nullcontext():
            self._work()

    def __call__(self) -> None:
        """Launch it after what is queued. Records it, where that was not done."""
        if not self._recorded:
            self.record()
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()

    def beside(self) -> None:
        """Launch it after what is queued, beside what is launched next; see `join`."""
        self._on_its_stream(self, joined=False)

    def join(self) -> None:
        """What is queued from now on comes after its last launch."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _on_its_stream(self, work: Callable[[], None], joined: bool = True) -> None:
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        if joined:
            self.join()


def all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, those too that are not saved."""
    yield from module.named_parameters()
    yield from module.named_buffers()
