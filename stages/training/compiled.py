"""A model's forward pass, and a loss, compiled: fewer and larger kernels, and on a GPU one CUDA
graph a forward pass.

It pays where a model is small and a step spends its time starting kernels. The model itself stays
as it is: what is saved, resumed and evaluated does not know that it was compiled.
"""

import os
import shlex
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.errors import ConfigError

_REMEDY = "Leave --compile out."
_CPP = ("CXX", ("g++", "clang++"))
_C = ("CC", ("gcc", "clang"))
"""Where an environment names a compiler, and the usual ones."""
_LEAST_LIMIT, _PER_MODEL = 8, 2
"""torch's own limit; and how often a model is compiled at the most: for training, and once more."""


def prepare_compiler(device: torch.device, models: int) -> None:
    """Make room for so many models, and let go what earlier ones in this process have compiled:
    beyond a limit torch leaves models as they are, without a word.

    Raises ConfigError where there is no compiler: C++ for a CPU, C for a GPU (Triton's).
    """
    check_compiler(device)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(_LEAST_LIMIT, _PER_MODEL * models)


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError where there is none; see `prepare_compiler`."""
    variable, usual = _C if device.type == "cuda" else _CPP
    chosen = shlex.split(os.environ.get(variable, ""))[:1]
    if not any(shutil.which(name) for name in chosen or usual):
        wanted = f"{variable} is '{chosen[0]}'" if chosen else " or ".join(usual)
        raise ConfigError(f"--compile needs a compiler: {wanted}, not found", _REMEDY)


class Compiled:
    """A function for batches of one size; the last, shorter one of an epoch goes through the plain
    function, as every further size would be compiled anew.
    """

    def __init__(
        self,
        plain: Callable[..., Any],
        batch_size: int,
        device: torch.device,
        graphs: bool = False,
        what: str = "model",
    ) -> None:
        """graphs: record CUDA graphs; only where a step has one forward pass in one process. what:
        it is, as an error names it.
        """
        from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

        self._failure = TorchDynamoException
        self._plain, self._batch_size, self._what = plain, batch_size, what
        self._graphs = graphs and device.type == "cuda"
        mode = "reduce-overhead" if self._graphs else "default"
        self._compiled = torch.compile(plain, mode=mode, dynamic=False)
        self._traced = False

    def start_step(self) -> None:
        """What the step before computed is no longer needed: graphs may use its memory again."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def __call__(self, batch: Tensor, *others: Any) -> Any:
        """What the function returns. batch: (B, ...). Raises ConfigError where it cannot be
        compiled.
        """
        if len(batch) != self._batch_size:
            return self._plain(batch, *others)
        try:
            return self._compiled(batch, *others) if self._traced else self._trace(batch, *others)
        except self._failure as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"the {self._what} cannot be compiled: {reason}", _REMEDY) from error

    def _trace(self, *given: Any) -> Any:
        """The first call. It looks at all that an input has, also at the gradient of one that keeps
        none.
        """
        self._traced = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            return self._compiled(*given)
