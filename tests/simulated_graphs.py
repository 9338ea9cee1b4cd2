"""CUDA graphs without a GPU: what is called while one is recorded is noted operation by operation,
and a launch calls the same operations on the same tensors again, and nothing else.

So a launch does what a real one does: no Python is run, numbers of the host stay those of the
recording, and only tensors that lie in the same memory bring anything new. As on a GPU, recording
changes nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls, self._before = calls, list[tuple[Tensor, Tensor]]()
        self._seen = set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        # Whatever goes in: batch norm changes its statistics and does not declare it.
        for tensor in tree_leaves((args, given)):
            if isinstance(tensor, Tensor) and id(tensor) not in self._seen:
                self._seen.add(id(tensor))
                self._before.append((tensor, tensor.detach().clone()))
        result = func(*args, **given)
        self._seen |= {id(made) for made in tree_leaves(result)}
        self._calls.append((func, args, given, result))
        return result

    def undo(self) -> None:
        for tensor, before in reversed(self._before):
            tensor.copy_(before)


class SimulatedGraph:
    """As torch.cuda.CUDAGraph. launches: of all graphs since they are simulated."""

    launches = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        type(self).launches += 1
        for func, args, kwargs, recorded in self.calls:
            returns = func._schema.returns
            if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
                continue  # a view of memory that stays
            result = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for kept, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                    if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


@contextmanager
def _recording(graph: SimulatedGraph, **_: object) -> Iterator[None]:
    recorder = _Recorder(graph.calls)
    with recorder:
        yield
    with torch.no_grad():
        recorder.undo()


class _Stream:
    def __init__(self, *_: object) -> None: ...
    def wait_stream(self, _: object) -> None: ...


@contextmanager
def simulated_graphs() -> Iterator[Callable[[], int]]:
    """Inside, steps are recorded on the CPU; yields what counts the launches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.training.graphs.has_graphs", lambda _: True)
        patch.setattr("stages.training.learner.check_capture", lambda _: None)
        patch.setattr("torch.cuda.CUDAGraph", SimulatedGraph)
        patch.setattr("torch.cuda.graph", _recording)
        patch.setattr("torch.cuda.Stream", _Stream)
        patch.setattr("torch.cuda.current_stream", _Stream)
        patch.setattr("torch.cuda.stream", lambda _: nullcontext())
        patch.setattr(SimulatedGraph, "launches", 0)
        yield lambda: SimulatedGraph.launches
