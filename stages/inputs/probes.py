"""Pixel probes: checksums of some views, by which a cache knows the images it was made from."""

import zlib
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from stages.inputs.counter_hash import bounded, counter_hash
from stages.inputs.datasets import ImageDataset
from stages.inputs.rendered import RenderedViews
from stages.inputs.views import Paired, Shown, ViewPolicy

PROBES = 256
NO_PROBE = 0
"""In the place of a checksum: a skipped sample is shown there."""
PROBED_VIEWS = 1024
"""Probes are drawn from the first 1,024 views of a policy, however many a cache holds."""


def pixel_probes(
    dataset: ImageDataset, policy: ViewPolicy, image_size: int | None, seed: int = 0
) -> list[int]:
    """crc32 of the uint8 pixels of 256 fixed (view, sample) pairs; NO_PROBE where a skipped sample
    is shown.

    The pairs depend on the policy and the number of samples, not on how many views are cached.
    """
    probe = torch.arange(PROBES)
    views = bounded(counter_hash(seed, probe, 0), min(policy.count or PROBED_VIEWS, PROBED_VIEWS))
    samples = bounded(counter_hash(seed, probe, 1), len(dataset))
    shown = _shown(dataset, policy, image_size, samples, views)
    unseen = torch.isin(samples, dataset.skipped)
    if shown.partners is not None:
        unseen |= torch.isin(shown.partners, dataset.skipped)
    return [
        NO_PROBE if skipped else zlib.crc32(image.numpy().tobytes())
        for image, skipped in zip(shown.images, unseen.tolist(), strict=True)
    ]


def probes_differ(
    dataset: ImageDataset, policy: ViewPolicy, image_size: int | None, expected: Sequence[int]
) -> str:
    """How many pixel probes are not as expected, for people; empty if none is."""
    probes = pixel_probes(dataset, policy, image_size)
    differ = sum(a != b for a, b in zip_longest(probes, expected) if a != NO_PROBE)
    return f"{differ} of {len(probes)} pixel probes" if differ else ""


def _shown(
    dataset: ImageDataset,
    policy: ViewPolicy,
    image_size: int | None,
    samples: Tensor,
    views: Tensor,
) -> Shown:
    """View `views[i]` of `samples[i]`, in one batch where there is no need to resample."""
    held = dataset.images
    alike = policy.moves_pixels_only and not policy.mixes and not isinstance(policy, Paired)
    if held is not None and alike and (not image_size or {*held.shape[-2:]} == {image_size}):
        sides = (torch.full_like(samples, side) for side in held.shape[-2:])
        return Shown(policy.crop(held[samples], policy.draw(samples, views, *sides)))
    return RenderedViews(dataset, policy, image_size).shown(samples, views)
