"""Every image with a partner, the same one whatever batch it is in.

The partner of sample i in view v is p_v(i), p_v a keyed permutation of the dataset: everyone is
partner once in every view (and, as in any permutation, about one sample a view is its own). The
partner is shown in its own crop of the same view, so that a mixed view costs two renderings.

A row of a mixed view has two labels: bias elimination and rectification, which need one, refuse.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.errors import DatasetError, ViewError
from stages.inputs.counter_hash import bounded, counter_hash, permute
from stages.inputs.views.distributions import GRID, MIXED, folded_beta
from stages.inputs.views.layers import ON_TOP, OnTop, Part, within_count
from stages.inputs.views.policy import (
    Drawn,
    Images,
    Load,
    Plan,
    Shown,
    Size,
    Stream,
    View,
    ViewPolicy,
    check_view,
    views_of,
)


class Mixer(Part):
    """How two images become one."""

    place: ClassVar[int] = 100
    mixes: ClassVar[bool] = True
    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 100:
            raise ViewError(f"alpha must be in (0, 100], was {self.alpha}")

    def on(self, policy: ViewPolicy) -> "Mixed":
        return Mixed(policy, self)

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
class Mixed(OnTop):
    """A policy and a mixer, the last stage."""

    mixer: Mixer

    @property
    def parts(self) -> tuple[Mixer, ...]:
        return (self.mixer,)

    @property
    def batched(self) -> bool:
        return self.base.batched

    @property
    def mixes(self) -> bool:
        return True

    def partners(self, samples: Tensor, view: View, num_samples: int) -> Tensor:
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

    def show(self, load: Load, num_samples: int, samples: Tensor, view: View, size: Size) -> Shown:
        check_view(self, view)
        views = views_of(view, samples)
        partners = self.partners(samples, views, num_samples)
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

    def render_each(self, images: Images, samples: Tensor, view: View, size: Size) -> list[Tensor]:
        raise ViewError(
            f"'{self.name}' mixes images with others of the dataset, which are not given here",
            "Use stages.inputs.feed.ViewFeed: its batches have pixels, partners and shares.",
        )


def mixes(name: str) -> bool:
    """Whether the policy of this name mixes samples; it need not be importable here."""
    parts = (ON_TOP.get(part) for side in name.split("|") for part in side.split("+"))
    return any(part is not None and part.mixes for part in parts)


def check_unmixed(name: str, wanted: str, instead: str = "train with --bias none") -> None:
    """Raise ViewError if the policy of this name gives rows two labels, where one is `wanted`.

    instead: what else can be done.
    """
    if mixes(name):
        raise ViewError(
            f"{wanted} needs one label a row, and views of '{name}' mix two samples",
            f"Cache views without mixup and cutmix for it, or {instead}.",
        )
