"""Mixup and cutmix: every image with a partner, the same one whatever batch it is in.

The partner of sample i in view v is p_v(i), p_v a keyed permutation of the dataset: everyone is
partner once in every view (and, as in any permutation, about one sample a view is its own). The
partner is shown in its own crop of the same view, so that a mixed view costs two renderings.

The share l of an image is drawn from Beta(alpha, alpha) and folded to max(l, 1 - l), in whole
256ths: the own label is always the dominant one. Beta(alpha, alpha) is symmetric, so that folding
leaves the mixtures of unordered pairs as they were for mixup. For cutmix the smaller share is
always the box and never the frame around it.

A row of a mixed view has two labels: bias elimination and rectification, which need one, refuse.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.errors import DatasetError, ViewError
from stages.inputs.counter_hash import bounded, counter_hash, permute
from stages.inputs.views.erasing import Patches
from stages.inputs.views.layers import within_count
from stages.inputs.views.policy import (
    Drawn,
    Load,
    Parameters,
    Plan,
    Shown,
    Stream,
    ViewPolicy,
    check_view,
    parameters_of,
    views_of,
)
from stages.inputs.views.tables import GRID, MIXED, folded_beta


class Mixer(ABC):
    """How two images become one."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    moves_pixels_only: ClassVar[bool] = False
    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 100:
            raise ViewError(f"alpha must be in (0, 100], was {self.alpha}")

    @abstractmethod
    def draw(
        self, seed: int, samples: Tensor, views: Tensor, height: Tensor, width: Tensor
    ) -> Drawn:
        """What `mix` needs: samples, views, height and width int64 (B,), of the images."""

    @abstractmethod
    def mix(self, images: Tensor, others: Tensor, drawn: Any) -> Tensor:
        """uint8 (B, C, H, W) twice -> the mixture, by integer arithmetic on any device."""

    @abstractmethod
    def shares(self, drawn: Any) -> Tensor:
        """The share of each image, not its partner's: float32 (B,), at least 1/2."""

    def _keep(self, seed: int, stream: Stream, samples: Tensor, views: Tensor) -> Tensor:
        """256 max(l, 1 - l), l ~ Beta(alpha, alpha): int64 (B,) in [128, 256]."""
        uniform = bounded(counter_hash(seed, stream, views, samples, 0), GRID)
        table = folded_beta(self.alpha).to(samples.device)
        keep: Tensor = MIXED // 2 + torch.searchsorted(table, uniform, right=True)
        return keep


@dataclass(frozen=True)
class _Keeps(Drawn):
    keep: Tensor
    """int64 (B,): 256ths of the own image."""


@dataclass(frozen=True)
class Mixup(Mixer):
    """l a + (1 - l) b: Zhang et al. 2018, arXiv 1710.09412."""

    alpha: float = 0.8
    name: ClassVar[str] = "mixup"

    def draw(
        self, seed: int, samples: Tensor, views: Tensor, height: Tensor, width: Tensor
    ) -> _Keeps:
        return _Keeps(self._keep(seed, Stream.MIXUP, samples, views))

    def mix(self, images: Tensor, others: Tensor, drawn: Any) -> Tensor:
        keep: Tensor = drawn.keep.int().view(-1, 1, 1, 1)
        return ((keep * images + (MIXED - keep) * others + MIXED // 2) >> 8).to(torch.uint8)

    def shares(self, drawn: Any) -> Tensor:
        keep: Tensor = drawn.keep
        return keep.float() / MIXED


@dataclass(frozen=True)
class _Cuts(Drawn):
    box: Patches
    height: Tensor
    width: Tensor


@dataclass(frozen=True)
class Cutmix(Mixer):
    """A box of the partner in the image: Yun et al. 2019, arXiv 1905.04899.

    The box has sides sqrt(1 - l) of the image's, a centre anywhere, and is cut off at the edges;
    the share is counted in pixels of what is left of it.
    """

    alpha: float = 1.0
    name: ClassVar[str] = "cutmix"
    moves_pixels_only: ClassVar[bool] = True

    def draw(
        self, seed: int, samples: Tensor, views: Tensor, height: Tensor, width: Tensor
    ) -> _Cuts:
        keep = self._keep(seed, Stream.CUTMIX, samples, views)
        # Rounded down, so that the box never covers more than 1 - l <= 1/2. The square root of a
        # multiple of 2^-8 in float64 is correctly rounded, the same on every machine.
        side = ((MIXED - keep).double() / MIXED).sqrt()
        edges = []
        for draw, length in ((1, height), (2, width)):
            cut = (length * side).long()
            centre = bounded(counter_hash(seed, Stream.CUTMIX, views, samples, draw), length)
            start = (centre - cut // 2).clamp(min=0)
            stop = torch.minimum(centre - cut // 2 + cut, length)
            edges.append((start, stop - start))
        (top, box_height), (left, box_width) = edges
        return _Cuts(Patches(top, left, box_height, box_width), height, width)

    def mix(self, images: Tensor, others: Tensor, drawn: Any) -> Tensor:
        return torch.where(drawn.box.inside(*images.shape[-2:]), others, images)

    def shares(self, drawn: Any) -> Tensor:
        whole = drawn.height * drawn.width
        own: Tensor = (whole - drawn.box.height * drawn.box.width).double() / whole
        return own.float()


@dataclass(frozen=True)
class Mixed(ViewPolicy):
    """A policy and a mixer, the last stage: unbounded, base views wrap around as in `Composed`."""

    base: ViewPolicy
    mixer: Mixer

    @property
    def name(self) -> str:
        return f"{self.base.name}+{self.mixer.name}"

    @property
    def seed(self) -> int:
        return self.base.seed

    @property
    def count(self) -> None:
        return None

    @property
    def version(self) -> int:
        """Grows with every change of any part."""
        return self.base.version + self.mixer.version - 1

    @property
    def parameters(self) -> Parameters:
        own = {f"{self.mixer.name}.{k}": value for k, value in parameters_of(self.mixer).items()}
        return {**self.base.parameters, **own}

    @property
    def moves_pixels_only(self) -> bool:
        return self.base.moves_pixels_only and self.mixer.moves_pixels_only

    @property
    def batched(self) -> bool:
        return self.base.batched

    @property
    def mixes(self) -> bool:
        return True

    def partners(self, samples: Tensor, view: int, num_samples: int) -> Tensor:
        """Whom each sample is mixed with in a view: int64 (B,), a permutation over all samples."""
        return permute(samples, num_samples, self.seed, Stream.PARTNER, view)

    def plan(self, samples: Tensor, view: int, num_samples: int, size: Sequence[int]) -> Plan:
        partners, base_view = self.partners(samples, view, num_samples), self._base_view(view)
        own, others = (
            self.base.plan(who, base_view, num_samples, size) for who in (samples, partners)
        )
        sides = (torch.full_like(samples, side) for side in size)
        blend = self.mixer.draw(self.seed, samples, views_of(view, samples), *sides)
        return Plan(samples, own.drawn, others, blend)

    def show_planned(self, images: Tensor, plan: Plan) -> Shown:
        assert plan.partners is not None
        own, others = (
            self.base.crop(images[who.samples], who.drawn) for who in (plan, plan.partners)
        )
        mixed = self.mixer.mix(own, others, plan.blend)
        return Shown(mixed, plan.partners.samples, self.mixer.shares(plan.blend))

    def show(
        self,
        load: Load,
        num_samples: int,
        samples: Tensor,
        view: int | Tensor,
        size: Sequence[int] | None,
    ) -> Shown:
        check_view(self, view)
        views = views_of(view, samples)
        partners = permute(samples, num_samples, self.seed, Stream.PARTNER, views)
        both, of_both = torch.cat([samples, partners]), self._base_view(torch.cat([views, views]))
        rendered = self.base.render_each(load(both), both, of_both, size)
        own, others = rendered[: len(samples)], rendered[len(samples) :]
        height, width = torch.tensor([image.shape[-2:] for image in own]).T
        drawn = self.mixer.draw(self.seed, samples, views, height, width)
        shapes = {tuple(image.shape) for image in rendered}
        if len(shapes) > 1:
            raise DatasetError(
                f"images differ in size: {min(shapes)} and {max(shapes)}",
                f"Give --image-size: {self.mixer.name} needs images of one size.",
            )
        mixed = self.mixer.mix(torch.stack(own), torch.stack(others), drawn)
        return Shown(mixed, partners, self.mixer.shares(drawn))

    def _base_view(self, view: Any) -> Any:
        return within_count(self.base, view)

    def render_each(
        self,
        images: Sequence[Tensor],
        samples: Tensor,
        view: int | Tensor,
        size: Sequence[int] | None,
    ) -> list[Tensor]:
        raise self._needs_partners()

    def apply(self, images: Tensor, samples: Tensor, view: int | Tensor) -> Tensor:
        raise self._needs_partners()

    def _needs_partners(self) -> ViewError:
        return ViewError(
            f"'{self.name}' mixes images with others of the dataset, which are not given here",
            "Use stages.inputs.feed.ViewFeed: its batches have pixels, partners and shares.",
        )


def mixes(name: str) -> bool:
    """Whether the policy of this name mixes samples; it need not be importable here."""
    return any(part in MIXERS for side in name.split("|") for part in side.split("+"))


def check_unmixed(name: str, wanted: str) -> None:
    """Raise ViewError if the policy of this name gives rows two labels, where one is `wanted`."""
    if mixes(name):
        raise ViewError(
            f"{wanted} needs one label a row, and views of '{name}' mix two samples",
            "Cache views without mixup and cutmix for it, or train with --bias none.",
        )


MIXERS: Mapping[str, Callable[..., Mixer]] = {mixer.name: mixer for mixer in (Mixup, Cutmix)}
