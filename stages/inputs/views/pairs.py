"""Weak and strong views of one sample in one store: `pad-crop-flip|pad-crop-flip+rand-augment`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import ViewError
from stages.inputs.views.layers import within_count
from stages.inputs.views.named import Parameters
from stages.inputs.views.policy import (
    Images,
    Load,
    Plan,
    Shown,
    Size,
    View,
    ViewPolicy,
    check_view,
    views_of,
)


@dataclass(frozen=True)
class Paired(ViewPolicy):
    """View 2v is the weak policy's view v, view 2v + 1 the strong policy's view v.

    Both draw from one seed: where they have the same base, view v of both is the same crop. There
    are twice as many views as in the longer of the two; the shorter begins again after its last.

    A loss that needs both reads both rows of the cache: `weak, strong = policy.paired_views(view)`,
    then `cache.read_view(weak)` and `cache.read_view(strong)`, and shows the student whichever it
    likes (`ViewFeed.batches(order, strong, batch_size)`).
    """

    weak: ViewPolicy
    strong: ViewPolicy

    def __post_init__(self) -> None:
        if self.weak == self.strong:
            raise ViewError(
                f"both sides of '{self.name}' are the same views",
                "Give WEAK|STRONG, for example pad-crop-flip|pad-crop-flip+rand-augment.",
            )

    @property
    def _both(self) -> tuple[ViewPolicy, ViewPolicy]:
        return self.weak, self.strong

    @property
    def name(self) -> str:
        return f"{self.weak.name}|{self.strong.name}"

    @property
    def seed(self) -> int:
        return self.weak.seed

    @property
    def count(self) -> int | None:
        if self.weak.count is None or self.strong.count is None:
            return None
        return 2 * max(self.weak.count, self.strong.count)

    @property
    def version(self) -> int:
        """Grows with every change of any part."""
        return self.weak.version + self.strong.version - 1

    @property
    def parameters(self) -> Parameters:
        return {
            f"{side}.{key}": value
            for side, policy in zip(("weak", "strong"), self._both, strict=True)
            for key, value in policy.parameters.items()
        }

    @property
    def moves_pixels_only(self) -> bool:
        return all(policy.moves_pixels_only for policy in self._both)

    @property
    def batched(self) -> bool:
        """Whether one of them is: `at` tells which shows a view."""
        return any(policy.batched for policy in self._both)

    @property
    def mixes(self) -> bool:
        return any(policy.mixes for policy in self._both)

    def at(self, view: int) -> tuple[ViewPolicy, int]:
        policy = self._both[view % 2]
        return policy, int(within_count(policy, view // 2))

    def paired_views(self, view: int) -> tuple[int, int]:
        """The weak and the strong view that belong together, of which `view` is one."""
        return view - view % 2, view - view % 2 + 1

    def plan(self, samples: Tensor, view: int, num_samples: int, size: Sequence[int]) -> Plan:
        raise NotImplementedError("plan with the policy that `at` names")

    def render_each(self, images: Images, samples: Tensor, view: View, size: Size) -> list[Tensor]:
        return self._gathered(
            samples,
            view,
            lambda policy, which, views: policy.render_each(
                [images[i] for i in which.tolist()], samples[which], views, size
            ),
        )

    def show(self, load: Load, num_samples: int, samples: Tensor, view: View, size: Size) -> Shown:
        """As in ViewPolicy; beside samples that are mixed, others are partners of their own."""
        partners, shares = samples.clone(), torch.ones(len(samples))
        mixed = []

        def part(policy: ViewPolicy, which: Tensor, views: Tensor) -> Iterable[Tensor]:
            shown = policy.show(load, num_samples, samples[which], views, size)
            if shown.partners is not None and shown.shares is not None:
                partners[which], shares[which] = shown.partners, shown.shares
                mixed.append(policy)
            return shown.images

        images = self._gathered(samples, view, part)
        return Shown(images, partners, shares) if mixed else Shown(images)

    def _gathered(
        self,
        samples: Tensor,
        view: View,
        part: Callable[[ViewPolicy, Tensor, Tensor], Iterable[Tensor]],
    ) -> list[Tensor]:
        """The images of each policy's part of the samples, in the order of the samples.

        part: a policy, positions among the samples, and their views of its own -> images.
        """
        check_view(self, view)
        views = views_of(view, samples)
        images: dict[int, Tensor] = {}
        for side, policy in enumerate(self._both):
            which = (views % 2 == side).nonzero().squeeze(1)
            if len(which):
                own = torch.as_tensor(within_count(policy, views[which] // 2))
                images |= zip(which.tolist(), part(policy, which, own), strict=True)
        return [images[i] for i in range(len(samples))]
