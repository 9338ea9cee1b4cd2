"""Any torchvision v2 transform as a policy: `v2:module:callable`, seeded for each (view, sample).

Transforms draw from the global generators of torch, numpy and `random`. Each image is transformed
under generators that are seeded for it and put back afterwards, so that nothing leaks in or out.

Fails when: a transform has a generator of its own, remembers earlier images, or draws on a GPU.
A cache names its transform: training from a stranger's cache imports and calls what it names.
"""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from stages.errors import ViewError
from stages.inputs.counter_hash import counter_hash
from stages.inputs.views.named import Named, Parameters, Stage, base
from stages.inputs.views.policy import Images, Size, Stream, View, ViewPolicy, views_of
from stages.user_code import imported

TORCHVISION = str(torchvision.__version__).split("+")[0]
"""Without the build: 0.26.0+cpu and 0.26.0+cu130 transform alike."""


@base("v2:")
@dataclass(frozen=True)
class Transform(Named, ViewPolicy):
    """What `target` makes of an image: unbounded, and known by its name alone.

    target: module:callable, called without arguments, gives a transform of uint8 (C, H, W) to
    uint8 of one size. torchvision: the version that transforms; another one draws and computes
    otherwise. Changing what the callable returns is seen by the pixel probes, not by the name.
    """

    target: str
    torchvision: str = TORCHVISION
    seed: int = 0

    def __post_init__(self) -> None:
        if self.torchvision != TORCHVISION:
            raise ViewError(
                f"'{self.name}' was shown by torchvision {self.torchvision}, "
                f"here is {TORCHVISION}: it may draw other views",
                f"Install torchvision {self.torchvision}, or cache the views again.",
            )
        _made(self.target)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"v2:{self.target}"

    @classmethod
    def parse(cls, text: str) -> Stage:
        return text, {}

    @classmethod
    def make(cls, name: str, **parameters: Any) -> Self:
        return cls(name.partition(":")[2], **parameters)

    @property
    def count(self) -> None:
        return None

    @property
    def parameters(self) -> Parameters:
        return {"torchvision": self.torchvision}

    def render_each(self, images: Images, samples: Tensor, view: View, size: Size) -> list[Tensor]:
        """As in ViewPolicy; `size` None is whatever size the transform gives."""
        seeds = counter_hash(self.seed, Stream.TRANSFORM, views_of(view, samples), samples).tolist()
        shown = [self._one(image, seed) for image, seed in zip(images, seeds, strict=True)]
        if size is not None:
            return [
                x if x.shape[-2:] == tuple(size) else tv.resize(x, list(size), antialias=True)
                for x in shown
            ]
        if sizes := {tuple(image.shape) for image in shown} - {tuple(shown[0].shape)}:
            raise ViewError(
                f"'{self.name}' gives images of {tuple(shown[0].shape)} and of {min(sizes)}",
                "Let it end in a crop or a resize to one size, or give --image-size.",
            )
        return shown

    def _one(self, image: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            shown = _made(self.target)(image.clone())
        if not isinstance(shown, Tensor):
            raise ViewError(f"'{self.name}' gives {type(shown).__name__}, not a tensor")
        if shown.dtype != torch.uint8 or shown.ndim != 3 or len(shown) != len(image):
            raise ViewError(
                f"'{self.name}' gives {shown.dtype} {tuple(shown.shape)} for an image "
                f"{tuple(image.shape)}, not uint8 of as many channels",
                "Leave ToDtype, Normalize and ToTensor out: normalisation comes after.",
            )
        return shown.as_subclass(Tensor).contiguous()


def reseeds(name: str) -> bool:
    """Whether the policy of this name draws from global generators, which threads share."""
    stages = (stage for side in name.split("|") for stage in side.split("+"))
    return any(stage.startswith("v2:") for stage in stages)


@functools.cache
def _made(target: str) -> Callable[[Tensor], Any]:
    """The transform that `target` makes, once a process."""
    make = imported(target, "transform", ViewError)
    try:
        with seeded(0):
            transform: Callable[[Tensor], Any] = make()
    except TypeError as error:
        raise ViewError(
            f"'v2:{target}' cannot be called without arguments: {error}",
            "Name a function that returns the transform.",
        ) from error
    if not callable(transform):
        raise ViewError(
            f"'v2:{target}' returns {type(transform).__name__}, which cannot be called",
            "Name a function that returns the transform.",
        )
    return transform


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global CPU generators of torch, numpy and `random` seeded, and put back at the end.

    seed: any 64 bits. torch's own `manual_seed` would reseed GPUs too.
    """
    bits = seed % 2**64
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed([bits % 2**32, bits >> 32])
    random.seed(bits)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
