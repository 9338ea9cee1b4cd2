"""What a view policy is: who it is, how many views it knows, and how a view of it is shown.

A view is shown in one of two ways with the same bytes. Images held in one tensor are cropped a
whole batch at a time where they lie (`plan`, `show_planned`), where the policy is `batched`: all it
does is to index pixels and to add integers. Any others are rendered one by one on the CPU (`show`).
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from stages.errors import ViewError
from stages.inputs.views.named import Parameters, parameters_of

Images = Sequence[Tensor]
"""uint8 (C, H, W) each."""
View = int | Tensor
"""One view of all samples, or int64 (B,)."""
Size = Sequence[int] | None
"""Height and width to render at; None for each image's own."""
Load = Callable[[Tensor], list[Tensor]]
"""Dataset indices int64 (B,) -> images, uint8 (C, H, W) each."""


class Stream(IntEnum):
    """What a draw is for, hashed between the seed and the view: stages draw independently.

    Far beyond any view, sample or epoch, so that no key of one purpose is a key of another.
    """

    TRIVIAL_AUGMENT = 2**48 + 1
    RAND_AUGMENT = 2**48 + 2
    ERASING = 2**48 + 3
    PARTNER = 2**48 + 4
    MIXUP = 2**48 + 5
    CUTMIX = 2**48 + 6
    TRANSFORM = 2**48 + 7


@dataclass(frozen=True)
class Drawn:
    """Numbers that were drawn for some samples: tensors whose first axis is the sample, or tuples
    of such, or None.
    """

    def __getitem__(self, which: Tensor | slice) -> Self:
        """What was drawn for the samples at these positions."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self)(*(_at(value, which) for value in values))


def _at(value: Any, which: Tensor | slice) -> Any:
    if isinstance(value, tuple):
        return tuple(_at(part, which) for part in value)
    return None if value is None else value[which]


@dataclass(frozen=True)
class Plan(Drawn):
    """Everything that one view of some samples needs, drawn ahead of their batches.

    samples: int64 (n,). drawn: the policy's. partners, blend: of a policy that mixes.
    """

    samples: Tensor
    drawn: Drawn
    partners: "Plan | None" = None
    blend: Drawn | None = None


class Shown(NamedTuple):
    """One view of some samples.

    images: uint8 (B, C, H, W), or one (C, H, W) a sample where sizes may differ. partners: int64
    (B,), whom each is mixed with; shares: float32 (B,), its own share; both None for a view that
    does not mix.
    """

    images: Tensor | list[Tensor]
    partners: Tensor | None = None
    shares: Tensor | None = None


class ViewPolicy(ABC):
    """What every policy has.

    count: how many distinct views there are, None for unbounded. moves_pixels_only: whether a view
    is made of source pixels (and zeros) alone, without resampling. batched: whether whole batches
    are shown by `plan` and `show_planned`, on any device. mixes: whether views hold two samples.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """As `--augment` has it, without parameters."""

    @property
    @abstractmethod
    def seed(self) -> int:
        """Of the draws."""

    @property
    @abstractmethod
    def count(self) -> int | None:
        """How many distinct views there are; None for unbounded."""

    @property
    def version(self) -> int:
        """Of the draws: another version shows other pixels."""
        return 1

    @property
    def parameters(self) -> Parameters:
        """The policy's parameters beside its seed, as plain values."""
        return parameters_of(self)

    @property
    def moves_pixels_only(self) -> bool:
        """Whether a view is made of source pixels and zeros alone, without resampling."""
        return False

    @property
    def batched(self) -> bool:
        """Whether `plan` and `show_planned` show whole batches, on any device."""
        return self.moves_pixels_only

    @property
    def mixes(self) -> bool:
        """Whether views hold two samples."""
        return False

    def at(self, view: int) -> tuple["ViewPolicy", int]:
        """Which policy shows a view, and as which view of its own: itself, unless it is a pair."""
        return self, view

    # ---- rendered one by one ------------------------------------------------------------

    @abstractmethod
    def render_each(self, images: Images, samples: Tensor, view: View, size: Size) -> list[Tensor]:
        """View `view` of each image (uint8 (C, H, W)) at `size`, or at its own where that is None.

        samples: int64 (B,), positions in the dataset. view: one for all, or int64 (B,).
        """

    def show(self, load: Load, num_samples: int, samples: Tensor, view: View, size: Size) -> Shown:
        """View `view` of samples of a dataset of `num_samples`, rendered one by one."""
        return Shown(self.render_each(load(samples), samples, view, size))

    # ---- whole batches, at the images' own size -----------------------------------------

    def draw(self, samples: Tensor, view: View, height: Tensor, width: Tensor) -> Drawn:
        """What `crop` needs: samples, height, width int64 (B,), all on one device."""
        raise NotImplementedError(f"'{self.name}' is rendered image by image")

    def crop(self, images: Tensor, drawn: Any) -> Tensor:
        """uint8 (B, C, H, W) and what was drawn for them -> their views, of the same size."""
        raise NotImplementedError(f"'{self.name}' is rendered image by image")

    def plan(self, samples: Tensor, view: int, num_samples: int, size: Sequence[int]) -> Plan:
        """Draw all that `show_planned` needs, for any number of samples (int64) at once."""
        sides = (torch.full_like(samples, side) for side in size)
        return Plan(samples, self.draw(samples, view, *sides))

    def show_planned(self, images: Tensor, plan: Plan) -> Shown:
        """The planned views, cut out of all images of the dataset: uint8 (N, C, H, W)."""
        return Shown(self.crop(images[plan.samples], plan.drawn))

    # ---- outside a feed -----------------------------------------------------------------

    def apply(self, images: Tensor, samples: Tensor, view: View) -> Tensor:
        """View `view` of each image, at the size of the source.

        Parameters
        ----------
        images : uint8 (B, C, H, W).
        samples : int64 (B,), the images' positions in the dataset.
        view : one view for all, or int64 (B,).

        Returns
        -------
        uint8 (B, C, H, W) on the device of `images`.

        Raises
        ------
        ViewError : if a view is outside [0, count), or mixes in images that are not here.
        """
        check_view(self, view)
        policy, own = self.at(view) if isinstance(view, int) else (self, view)
        if policy is not self:
            return policy.apply(images, samples, own)
        if isinstance(view, int) and self.batched and not self.mixes:
            samples = samples.to(images.device)
            return self.crop(images, self.plan(samples, view, 0, images.shape[-2:]).drawn)
        rendered = self.render_each(list(images.cpu()), samples.cpu(), view, None)
        return torch.stack(rendered).to(images.device)


def check_view(policy: ViewPolicy, view: View) -> None:
    """Raise ViewError unless every view is one that the policy has."""
    views = torch.as_tensor(view)
    low, high = int(views.min()), int(views.max())
    if low < 0 or (policy.count is not None and high >= policy.count):
        last = "..." if policy.count is None else policy.count - 1
        raise ViewError(
            f"view {low if low < 0 else high} of '{policy.name}' is outside [0, {last}]"
        )


def views_of(view: View, samples: Tensor) -> Tensor:
    """The view of each sample: int64 (B,) on the samples' device."""
    return torch.as_tensor(view, device=samples.device).expand_as(samples)
