"""Mixup and cutmix: partners, shares against the exact distribution, pixels by a naive loop."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DIGITS, teacher_of
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from noise import noise, noise_dataset
from torch import Tensor

from stages.errors import ConfigError, DatasetError, ViewError
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Batch, ViewFeed
from stages.inputs.probes import pixel_probes
from stages.inputs.views import Cutmix, Mixed, Mixer, Mixup, mixes, view_policy
from stages.inputs.views.distributions import folded_beta
from stages.inputs.views.policy import Stream
from stages.train_teacher import train_teacher

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")

CPU = torch.device("cpu")
MIXTURES = [
    "none+mixup",
    "none+cutmix",
    "pad-crop-flip+mixup:alpha=0.3",
    "pad-crop:pad=2+erasing:p=0.5+cutmix",
    "resized-crop-flip+rand-augment+erasing+mixup",
    "v2:torchvision.transforms.v2:TrivialAugmentWide+cutmix",
    "pad-crop-flip|pad-crop-flip+mixup",
    "pad-crop-flip+rand-augment|pad-crop-flip+erasing+cutmix",
]


def fed(feed: ViewFeed, order: Tensor, view: int, batch_size: int) -> Batch:
    """A whole view as one batch."""
    parts = zip(*map(tensors, feed.batches(order, view, batch_size)), strict=True)
    return Batch(*(None if part[0] is None else torch.cat(part) for part in parts))  # type: ignore


def tensors(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.samples, batch.pixels, batch.partners, batch.shares


def drawn(mixer: Mixer, samples: Tensor, view: int, size: tuple[int, int] = (32, 32)) -> Any:
    sides = (torch.full_like(samples, side) for side in size)
    return mixer.draw(0, samples, torch.full_like(samples, view), *sides)


def test_golden_partners() -> None:
    policy = view_policy("none+mixup", seed=3)
    assert isinstance(policy, Mixed)
    assert policy.partners(torch.arange(10), 0, 10).tolist() == [5, 7, 9, 3, 2, 0, 8, 1, 6, 4]
    assert policy.partners(torch.arange(10), 1, 10).tolist() == [2, 6, 1, 5, 3, 9, 8, 7, 0, 4]
    assert policy.partners(torch.tensor([0, 49_999]), 7, 50_000).tolist() == [23512, 8704]


def test_golden_shares() -> None:
    samples = torch.tensor([0, 1, 2, 3, 49_999])
    assert drawn(Mixup(), samples, 5).keep.tolist() == [202, 222, 132, 145, 229]
    cuts = drawn(Cutmix(), samples, 5)
    box = torch.stack([cuts.box.top, cuts.box.left, cuts.box.height, cuts.box.width], 1)
    assert box.tolist() == [
        [8, 0, 3, 2],
        [0, 18, 9, 14],
        [3, 10, 18, 18],
        [7, 0, 8, 4],
        [0, 11, 14, 21],
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_everyone_is_partner_once(size: int, view: int, seed: int) -> None:
    policy = view_policy("none+mixup", seed=seed)
    assert isinstance(policy, Mixed)
    partners = policy.partners(torch.arange(size), view, size)
    assert torch.equal(partners.sort().values, torch.arange(size))


EXACT: dict[float, Callable[[float], float]] = {
    # The distribution function of Beta(alpha, alpha) where it has a closed form.
    0.5: lambda x: 2 / math.pi * math.asin(math.sqrt(x)),
    1.0: lambda x: x,
    2.0: lambda x: 3 * x**2 - 2 * x**3,
    3.0: lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5,
}


@pytest.mark.parametrize("alpha", EXACT)
def test_the_table_is_the_folded_beta_distribution(alpha: float) -> None:
    below, table = EXACT[alpha], folded_beta(alpha)
    assert table.shape == (129,)
    assert int(table[-1]) == 2**24
    for k in range(128, 256):
        edge = (k + 0.5) / 256  # what is rounded to k/256 or less
        expected = below(edge) - below(1 - edge)
        assert int(table[k - 128]) / 2**24 == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("mixer", [Mixup(0.5), Mixup(2.0), Cutmix(3.0)])
def test_shares_are_distributed_as_beta(mixer: Mixer) -> None:
    """Kolmogorov and Smirnov's bound at the 0.1 % level, on fixed keys."""
    samples, below = torch.arange(60_000), EXACT[mixer.alpha]
    if isinstance(mixer, Mixup):
        keep = drawn(mixer, samples, 4).keep
    else:  # before the box is cut off at the edges
        keep = mixer._keep(0, Stream.CUTMIX, samples, torch.full_like(samples, 4))
    counts = torch.bincount(keep - 128, minlength=129).cumsum(0).double() / len(samples)
    edges = [(k + 0.5) / 256 for k in range(128, 256)]
    exact = torch.tensor([below(e) - below(1 - e) for e in edges], dtype=torch.float64)
    assert float((counts[:-1] - exact).abs().max()) < 1.95 / len(samples) ** 0.5


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (31, 57)])
@pytest.mark.parametrize("mixer", [Mixup(), Cutmix(), Cutmix(alpha=50.0)])
def test_the_own_image_is_never_the_smaller_part(mixer: Mixer, size: tuple[int, int]) -> None:
    shares = mixer.shares(drawn(mixer, torch.arange(20_000), 0, size))
    assert shares.dtype == torch.float32
    assert float(shares.min()) >= 0.5
    assert float(shares.max()) <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_cutmix_counts_its_pixels(height: int, width: int, view: int) -> None:
    mixer, samples = Cutmix(), torch.arange(30)
    cuts = drawn(mixer, samples, view, (height, width))
    own, other = torch.zeros(30, 2, height, width, dtype=torch.uint8), torch.full((), 255)
    mixed = mixer.mix(own, other.to(torch.uint8).expand_as(own), cuts)
    counted = (mixed[:, 0] == 0).flatten(1).sum(1)
    expected = [np.float32(int(count) / (height * width)) for count in counted]
    assert mixer.shares(cuts).tolist() == [float(share) for share in expected]
    assert torch.equal(mixed[:, 0], mixed[:, 1])


def test_cutmix_cuts_anywhere() -> None:
    cuts = drawn(Cutmix(), torch.arange(20_000), 0)
    inside = cuts.box.inside(32, 32).double().mean((0, 1))  # how often each pixel is the partner's
    assert float((inside - inside.flip(0)).abs().max()) < 0.015
    assert float((inside - inside.flip(1)).abs().max()) < 0.015
    assert float(inside[16, 16]) > float(inside[0, 16]) > float(inside[0, 0]) > 0.05


def test_every_pair_of_pixels_is_mixed_as_by_hand() -> None:
    left, right = (t.flatten() for t in torch.meshgrid(*[torch.arange(256)] * 2, indexing="ij"))
    images, others = (t.to(torch.uint8).view(1, 1, 256, 256) for t in (left, right))
    mixer = Mixup()
    blend = drawn(mixer, torch.arange(1), 0)
    for k in (128, 129, 200, 255, 256):
        blend.keep[:] = k
        exact = (k * left.numpy() + (256 - k) * right.numpy()) / 256
        expected = np.floor(exact + 0.5)
        assert mixer.mix(images, others, blend).flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("view", [0, 1000])
@pytest.mark.parametrize("spec", ["pad-crop-flip+mixup", "pad-crop-flip+erasing:p=1+cutmix"])
def test_pixels_equal_a_naive_mixture(spec: str, view: int) -> None:
    policy, source = view_policy(spec, seed=5), noise_dataset()
    assert isinstance(policy, Mixed)
    base = policy.base
    base_view = view if base.count is None else view % base.count
    batch = fed(ViewFeed(source, policy, CPU), torch.arange(21), view, 4)
    assert batch.partners is not None
    assert batch.shares is not None
    assert source.images is not None
    samples, sides = torch.arange(21), torch.full((21,), 12)
    drawn_here: Any = policy.mixer.draw(5, samples, torch.full_like(samples, view), sides, sides)
    for i, partner in enumerate(batch.partners.tolist()):
        own, other = (
            base.apply(source.images[[s]], torch.tensor([s]), base_view)[0].numpy()
            for s in (i, partner)
        )
        if isinstance(policy.mixer, Mixup):
            k = int(drawn_here.keep[i])
            expected = (k * own.astype(int) + (256 - k) * other.astype(int) + 128) // 256
            share = k / 256
        else:
            box = drawn_here.box[torch.tensor([i])]
            top, left, down, across = (int(t) for t in (box.top, box.left, box.height, box.width))
            expected = own.copy()
            inside = (slice(None), slice(top, top + down), slice(left, left + across))
            expected[inside] = other[inside]
            share = 1 - down * across / 144
        assert np.array_equal(batch.pixels[i].numpy(), expected)
        assert float(batch.shares[i]) == np.float32(share)


def same(one: Batch, other: Batch) -> bool:
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


def selected(batch: Batch, which: list[int]) -> Batch:
    return Batch(*(None if t is None else t[which] for t in tensors(batch)))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", MIXTURES)
@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=25), st.integers(1, 9), st.integers(0, 2**33)
)
def test_feeds_at_any_order_and_size(
    spec: str, order: list[int], batch_size: int, view: int
) -> None:
    policy = view_policy(spec, seed=1)
    whole = fed(ViewFeed(noise_dataset(), policy, CPU, workers=0), torch.arange(21), view, 21)
    for streamed in (False, True):
        feed = ViewFeed(noise_dataset(streamed=streamed), policy, CPU, workers=0)
        assert same(fed(feed, torch.tensor(order), view, batch_size), selected(whole, order))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", MIXTURES)
def test_cuda_gives_the_same_bytes(spec: str) -> None:
    policy, order = view_policy(spec, seed=1), torch.arange(21).flip(0)
    expected = fed(ViewFeed(noise_dataset(), policy, CPU, workers=0), order, 7, 21)
    seen = fed(ViewFeed(noise_dataset(), policy, torch.device("cuda"), workers=0), order, 7, 5)
    assert seen.pixels.is_cuda
    on_cpu = (None if t is None else t.cpu() for t in tensors(seen))
    assert same(Batch(*on_cpu), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["pad-crop-flip+mixup", "none+erasing+cutmix", "none|none+mixup"])
def test_moved_and_mixed_pixels_need_no_workers(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = ViewFeed(noise_dataset(), view_policy(spec), CPU, workers=2)
    monkeypatch.setattr(ViewFeed, "_from_workers", None)  # calling it is a TypeError
    assert fed(feed, torch.arange(21), 1, 5).pixels.shape == (21, 3, 12, 12)


@pytest.mark.parametrize("mixer", [Cutmix(), Cutmix(alpha=5.0)])
def test_a_larger_input_is_cut_in_the_same_place(mixer: Cutmix) -> None:
    small, large = (drawn(mixer, torch.arange(500), 0, (side, side)).box for side in (24, 96))
    for edge in ("top", "left", "height", "width"):
        difference = getattr(large, edge) / 4 - getattr(small, edge)
        assert float(difference.abs().max()) <= 2.5  # both are rounded down, halves too


def test_only_mixed_views_have_partners() -> None:
    feed = ViewFeed(
        noise_dataset(), view_policy("pad-crop-flip|pad-crop-flip+mixup"), CPU, workers=0
    )
    weak, strong = (fed(feed, torch.arange(21), view, 21) for view in (6, 7))
    assert weak.partners is weak.shares is None
    assert strong.partners is not None
    labels = torch.arange(21) * 10
    own, partners, shares = strong.hard_labels(labels)
    assert own.tolist() == labels.tolist()
    assert partners is not None
    assert partners.tolist() == (strong.partners * 10).tolist()
    assert shares is strong.shares
    assert weak.hard_labels(labels)[1:] == (None, None)


def test_files_held_in_memory_are_not_decoded_again() -> None:
    source = noise_dataset()
    images = source.images
    assert images is not None

    def unreadable(_: int) -> Tensor:
        raise DatasetError("decoded again")

    held = ImageDataset("noise", "train", ("a", "b"), source.labels, unreadable, images, "")
    policy = view_policy("resized-crop-flip+rand-augment+mixup")
    expected = fed(ViewFeed(source, policy, CPU, workers=0), torch.arange(21), 0, 8)
    assert same(fed(ViewFeed(held, policy, CPU, workers=0), torch.arange(21), 0, 8), expected)


@pytest.mark.parametrize("spec", [MIXTURES[3], MIXTURES[-1]])
def test_probes_see_the_mixture(spec: str) -> None:
    source, policy = noise_dataset(), view_policy(spec)
    before = pixel_probes(source, policy, None)
    assert before == pixel_probes(noise_dataset(streamed=True), policy, None)
    assert source.images is not None
    source.images[7] ^= 255
    changed = sum(a != b for a, b in zip(before, pixel_probes(source, policy, None), strict=True))
    alone = 256 / 21
    assert alone * 0.5 < changed < alone * 4  # in its own view, and in its partner's


def test_images_that_differ_in_size_cannot_be_mixed() -> None:
    images = [torch.zeros(3, 6 + i, 9, dtype=torch.uint8) for i in range(5)]
    labels = torch.zeros(5, dtype=torch.int64)
    source = ImageDataset("n", "train", ("a",), labels, images.__getitem__, None, "")
    feed = ViewFeed(source, view_policy("none+mixup"), CPU, workers=0)
    with pytest.raises(DatasetError, match=r"images differ in size(.|\n)*--image-size: mixup"):
        list(feed.batches(torch.arange(5), 0, 2))
    resized = ViewFeed(source, view_policy("none+mixup"), CPU, image_size=4, workers=0)
    assert fed(resized, torch.arange(5), 0, 2).pixels.shape == (5, 3, 4, 4)


def test_apply_has_no_partners() -> None:
    with pytest.raises(ViewError, match=r"mixes images with others(.|\n)*ViewFeed"):
        view_policy("none+mixup").apply(noise(2, 1, 4, 4), torch.arange(2), 0)


def test_which_names_mix() -> None:
    for name in ("pad-crop+mixup", "v2:not.importable:here+cutmix", "none|none+cutmix"):
        assert mixes(name)
    assert not mixes("pad-crop-flip+erasing")
    assert not mixes("none")


def test_held_out_samples_would_be_partners(tmp_path: Any) -> None:
    config = teacher_of(data=replace(DIGITS, val_fraction=0.1), augment="pad-crop:pad=1+mixup")
    with pytest.raises(ConfigError, match="--val-fraction"):
        train_teacher(config, tmp_path / "run")
