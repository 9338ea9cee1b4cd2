"""A GPU that is not there: tensors on it have a place, a shape and a dtype, and no values.

What is computed from tensors of two devices fails as it would on a real one; what asks for a value
fails as well. Backward passes and streams are left out.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.inputs.counter_hash import permute


class _Dispatch(TorchDispatchMode):
    """Whatever touches the GPU is faked, all else is computed."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        leaves = tree_leaves((args, given))
        on_gpu = any(
            isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda")
            for leaf in leaves
        )
        with self._fake if on_gpu else contextlib.nullcontext():
            return func(*args, **given)


class _Stream:
    def __init__(self, *_: object) -> None: ...
    def wait_stream(self, _: object) -> None: ...
    def synchronize(self) -> None: ...


class _Here:
    """An executor that works in the thread that asks: the pretence is one thread's."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


def _then_moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*arguments: Any, device: torch.device | None = None, **more: Any) -> Tensor:
        tensor = make(*arguments, **more)
        return tensor if device is None else tensor.to(device)

    return made


def _drawn(x: Tensor, n: int, *key: Any) -> Tensor:
    return torch.zeros_like(x) if x.is_cuda else permute(x, n, *key)  # asks for values


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, `cuda` can be used in this thread."""
    with pytest.MonkeyPatch.context() as patch:
        for name, instead in {
            "torch.cuda._lazy_init": lambda: None,
            "torch.cuda.mem_get_info": lambda *_: (10**10, 10**10),
            "torch.cuda.get_rng_state": lambda *_: torch.zeros(8, dtype=torch.uint8),
            "torch.cuda.current_stream": _Stream,
            "torch.cuda.Stream": _Stream,
            "torch.cuda.stream": lambda _: contextlib.nullcontext(),
            "torch.Tensor.pin_memory": lambda tensor: tensor,
            "torch.Tensor.backward": lambda loss: None,
            "torch.tensor": _then_moved(torch.tensor),
            "torch.as_tensor": _then_moved(torch.as_tensor),
            "stages.inputs.views.crops.permute": _drawn,
            "stages.targets.reader.ThreadPoolExecutor": _Here,
        }.items():
            patch.setattr(name, instead)
        torch._C._ensureCUDADeviceGuardSet()
        with _Dispatch():
            yield
