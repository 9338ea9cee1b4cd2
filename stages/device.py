"""Where and in which precision a model computes, and with which random numbers."""

import contextlib
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.distributed import Ranks
from stages.errors import ConfigError
from stages.inputs.model_outputs import failure, logits_of

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """The device of this name; `auto` is a GPU where there is one. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device '{name}' cannot be used: {str(error).splitlines()[0][:120]}",
            "Use --device cpu, cuda, cuda:N, or leave it out.",
        ) from error
    return device


def device_of_rank(ranks: Ranks, name: str = "auto") -> torch.device:
    """The device of this name; of several ranks, each has the GPU of its number on its machine,
    unless the name says which. Raises ConfigError where there are fewer.
    """
    if ranks.world == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return choose_device(name)
    if ranks.local_rank >= (gpus := torch.cuda.device_count()):
        raise ConfigError(
            f"rank {ranks.rank} would use GPU {ranks.local_rank}, this machine has {gpus}",
            f"Give torchrun --nproc-per-node={gpus}.",
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)  # what NCCL goes by
    return device


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """Autocast to `dtype`, or nothing for float32."""
    target = AUTOCAST[dtype]
    return contextlib.nullcontext() if target is None else torch.autocast(device.type, target)


def check_precision(device: torch.device, tf32: bool | None) -> None:
    """Raise ConfigError where TF32 is asked for and there is none."""
    if tf32 and device.type != "cuda":
        raise ConfigError(
            f"train.tf32 is a precision of NVIDIA's GPUs, the device is {device.type}",
            "Leave train.tf32 out.",
        )


def multiply_in(tf32: bool | None) -> None:
    """Whether factors of float32 products are rounded to TF32 on a GPU, from now on. torch's own
    defaults do it in convolutions and not in matrix products.
    """
    precision = "tf32" if tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


def forward(
    model: Callable[[Tensor], Any], images: Tensor, dtype: str, tf32: bool | None = None
) -> Tensor:
    """float32 logits (B, C) of normalised images (B, C, H, W), computed in `dtype` (autocast). On a
    GPU what is float32 is computed as `multiply_in` says, a backward pass that follows as well.

    Raises ModelError where the model fails, or returns something else.
    """
    if images.is_cuda:
        multiply_in(tf32)
    with autocast(images.device, dtype):
        try:
            output = model(images)
        except Exception as error:
            raise failure(error, images) from error
        logits = logits_of(output)
    return logits.float()


def place(module: nn.Module, device: torch.device, channels_last: bool = True) -> nn.Module:
    """The module on the device, with convolution weights channels-last."""
    module = module.to(device)
    return module.to(memory_format=torch.channels_last) if channels_last else module


def versions() -> dict[str, str]:
    """The libraries that decide about pixels and logits, for provenance."""
    import PIL
    import torchvision
    import zarr

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "pillow": PIL.__version__,
        "zarr": zarr.__version__,
    }


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


@dataclass(frozen=True)
class RandomState:
    """What torch's generators will draw next: uint8 tensors."""

    cpu_generator: Tensor
    cuda_generator: Tensor | None

    @staticmethod
    def now(device: torch.device) -> "RandomState":
        """What they would draw now."""
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
