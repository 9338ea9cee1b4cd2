"""Stages on top of a crop, each with draws of its own: `resized-crop-flip+rand-augment+erasing`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.inputs.views.named import Class, Named, Parameters, parameters_of, register
from stages.inputs.views.policy import Drawn, Images, Size, View, ViewPolicy, check_view, views_of


class Part(Named, ABC):
    """What every stage on top of a base has. place: stages come in ascending order of it, each
    place once. mixes: whether it makes views of two samples.
    """

    version: ClassVar[int] = 1
    place: ClassVar[int]
    moves_pixels_only: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    @abstractmethod
    def on(self, policy: ViewPolicy) -> ViewPolicy:
        """The policy with this on top of it."""


ON_TOP: dict[str, type[Part]] = {}
"""What may be put on top of a base, by name."""


def on_top(name: str) -> Callable[[Class], Class]:
    """Register a `Part`."""
    return register(ON_TOP, name)


class Layer(Part):
    """Something that changes an image that has been cropped and brought to its final size.

    Boxes are drawn in proportion to that size, so that a teacher and a student of other input sizes
    see the same. Distances in pixels, trivial-augment's translations, are of each size's own.

    moves_pixels_only: whether it copies pixels or makes them zero; then `on_batch` works on any
    device, otherwise images are changed one by one on the CPU.
    """

    def on(self, policy: ViewPolicy) -> ViewPolicy:
        if isinstance(policy, Composed):
            return Composed(policy.base, (*policy.layers, self))
        return Composed(policy, (self,))

    @abstractmethod
    def draw(
        self, seed: int, samples: Tensor, views: Tensor, height: Tensor, width: Tensor
    ) -> Drawn:
        """What `on_image` needs: samples, views, height and width int64 (B,), of the images."""

    @abstractmethod
    def on_image(self, image: Tensor, drawn: Any, i: int) -> Tensor:
        """uint8 (C, H, W) -> the same shape, changed as was drawn for sample i."""

    def on_batch(self, images: Tensor, drawn: Any) -> Tensor:
        """uint8 (B, C, H, W), with the bytes of `on_image`, on any device."""
        raise NotImplementedError(f"'{self.name}' works image by image")


@dataclass(frozen=True)
class _Layered(Drawn):
    base: Drawn
    layers: tuple[Drawn, ...]


@dataclass(frozen=True)
class OnTop(ViewPolicy):
    """A base and what goes on top of it, each with name, version and parameters of its own.

    Unbounded, as every part draws afresh in every view: base view v is v modulo the base's count.
    """

    base: ViewPolicy

    @property
    @abstractmethod
    def parts(self) -> "tuple[Part, ...]":
        """What goes on top, in order."""

    @property
    def name(self) -> str:
        return "+".join((self.base.name, *(part.name for part in self.parts)))

    @property
    def seed(self) -> int:
        return self.base.seed

    @property
    def count(self) -> None:
        return None

    @property
    def version(self) -> int:
        """Grows with every change of any part."""
        return self.base.version + sum(part.version - 1 for part in self.parts)

    @property
    def parameters(self) -> Parameters:
        own = {
            f"{part.name}.{key}": value
            for part in self.parts
            for key, value in parameters_of(part).items()
        }
        return {**self.base.parameters, **own}

    @property
    def moves_pixels_only(self) -> bool:
        parts = (part.moves_pixels_only for part in self.parts)
        return self.base.moves_pixels_only and all(parts)


@dataclass(frozen=True)
class Composed(OnTop):
    """A base and layers."""

    layers: tuple[Layer, ...]

    @property
    def parts(self) -> tuple[Layer, ...]:
        return self.layers

    def draw(self, samples: Tensor, view: View, height: Tensor, width: Tensor) -> Drawn:
        base = self.base.draw(samples, within_count(self.base, view), height, width)
        views = views_of(view, samples)
        return _Layered(
            base,
            tuple(layer.draw(self.seed, samples, views, height, width) for layer in self.layers),
        )

    def crop(self, images: Tensor, drawn: Any) -> Tensor:
        images = self.base.crop(images, drawn.base)
        for layer, own in zip(self.layers, drawn.layers, strict=True):
            images = layer.on_batch(images, own)
        return images

    def render_each(self, images: Images, samples: Tensor, view: View, size: Size) -> list[Tensor]:
        check_view(self, view)
        rendered = self.base.render_each(images, samples, within_count(self.base, view), size)
        rendered = [image.contiguous() for image in rendered]  # as where images are in memory
        height, width = torch.tensor([image.shape[-2:] for image in rendered]).T
        for layer in self.layers:
            drawn = layer.draw(self.seed, samples, views_of(view, samples), height, width)
            rendered = [layer.on_image(image, drawn, i) for i, image in enumerate(rendered)]
        return rendered


def within_count(policy: ViewPolicy, view: View) -> View:
    """The view, or, beyond the last one, the views from the first on again."""
    return view if policy.count is None else view % policy.count
