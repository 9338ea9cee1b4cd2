"""The forward passes of a model that is trained: plain, of several processes, compiled.

Compiling pays where a model is small and a step spends its time starting kernels: fewer and larger
ones, and on a GPU one CUDA graph a forward pass. Recorded steps in bfloat16 use copies of the
weights (`WorkingWeights`). The model itself stays as it is: what is saved, resumed and evaluated
does not know of either.
"""

import os
import shlex
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from stages.device import forward
from stages.distributed import Ranks
from stages.errors import ConfigError
from stages.inputs.feed import Normalise
from stages.settings import TrainSettings

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
