"""Specifications of composed policies, their identities, weak and strong pairs."""

import json
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import msgspec
import pytest
import torch
from noise import noise, noise_dataset
from torch import Tensor

from stages.cache.identity import ViewsIdentity
from stages.data import chosen_policy
from stages.errors import ViewError
from stages.inputs.feed import ViewFeed, plain_view
from stages.inputs.probes import pixel_probes
from stages.inputs.views import (
    ON_TOP,
    Erasing,
    Layer,
    Mixed,
    Mixup,
    Paired,
    Plain,
    ViewPolicy,
    known_policy,
    view_policy,
)
from stages.inputs.views.layers import on_top
from stages.inputs.views.policy import Drawn
from stages.inputs.views.transforms import TORCHVISION

V2 = "v2:torchvision.transforms.v2:RandomHorizontalFlip"


def pixels(policy: ViewPolicy, view: int) -> Tensor:
    (batch,) = ViewFeed(noise_dataset(), policy, torch.device("cpu"), workers=0).batches(
        torch.arange(21), view, 21
    )
    return batch.pixels


ORDER = "is not a composition: a base comes first, then at most one each of trivial-augment, "


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mixup", ORDER),
        ("pad-crop+pad-crop", ORDER),
        ("pad-crop+mixup+erasing", ORDER),
        ("pad-crop+mixup+cutmix", ORDER),
        ("pad-crop+erasing+erasing", ORDER),
        (f"pad-crop+{V2}", ORDER),
        ("pad-crop|mixup", ORDER),
        ("pad-crop+mixpu", "unknown view policy 'mixpu'; did you mean 'mixup'"),
        ("pad-crop+zzz", "unknown view policy 'zzz'\nKnown policies: "),
        ("pad-crop+", "unknown view policy ''"),
        ("pad-crop|", "unknown view policy ''"),
        ("none|none+erasing|none+mixup", "has 3 sides\nGive POLICY or WEAK"),
        ("none|none", "both sides .*are the same"),
        ("none+erasing:q=1", "'q=1' is not a parameter.*\nIt takes p=0.25"),
        ("none+rand-augment:n=x", "'n=x' is not a parameter"),
        ("none+trivial-augment:m=1", "It takes none"),
        ("none+erasing:p=1.5", r"p must be in \[0, 1\], was 1.5"),
        ("none+erasing:p=nan", r"p must be in \[0, 1\]"),
        ("none+rand-augment:n=0", r"n must be in \[1, 16\], was 0"),
        ("none+rand-augment:m=31", r"m must be in \[0, 30\], was 31"),
        ("none+mixup:alpha=0", r"alpha must be in \(0, 100\]"),
        ("none+cutmix:alpha=inf", r"alpha must be in \(0, 100\]"),
        ("none+mixup:pad=2", "'pad=2' is not a parameter"),
    ],
)
def test_a_composition_that_does_not_exist(spec: str, message: str) -> None:
    with pytest.raises(ViewError, match=message):
        view_policy(spec)


def test_none_in_a_composition_is_what_evaluation_shows() -> None:
    zoom, clean = 256 / 224, plain_view(224, 256)
    assert chosen_policy("none+mixup", 3, clean) == Mixed(Plain(zoom, seed=3), Mixup())
    assert chosen_policy("none:zoom=2+mixup", 3, clean) == Mixed(Plain(2.0, seed=3), Mixup())
    pair = chosen_policy("none|none+erasing", 3, clean)
    assert pair.parameters == {"weak.zoom": zoom, "strong.zoom": zoom, "strong.erasing.p": 0.25}
    assert chosen_policy("none+mixup", 3, plain_view(None, None)) == view_policy("none+mixup", 3)


COMPOSED = {
    "pad-crop+trivial-augment": ("pad-crop+trivial-augment", {"pad": 4}),
    "resized-crop-flip+rand-augment:m=7+erasing+mixup:alpha=0.4": (
        "resized-crop-flip+rand-augment+erasing+mixup",
        {
            "min_area": 0.08,
            "rand-augment.n": 2,
            "rand-augment.m": 7,
            "erasing.p": 0.25,
            "mixup.alpha": 0.4,
        },
    ),
    "none:zoom=1.5+cutmix": ("none+cutmix", {"zoom": 1.5, "cutmix.alpha": 1.0}),
    "none+trivial-augment+rand-augment:n=3,m=4+erasing:p=0.5": (
        "none+trivial-augment+rand-augment+erasing",
        {"zoom": 0.0, "rand-augment.n": 3, "rand-augment.m": 4, "erasing.p": 0.5},
    ),
    "pad-crop:pad=1|pad-crop+erasing+mixup": (
        "pad-crop|pad-crop+erasing+mixup",
        {"weak.pad": 1, "strong.pad": 4, "strong.erasing.p": 0.25, "strong.mixup.alpha": 0.8},
    ),
    V2: (V2, {"torchvision": TORCHVISION}),
    f"none|{V2}+erasing": (
        f"none|{V2}+erasing",
        {"weak.zoom": 0.0, "strong.torchvision": TORCHVISION, "strong.erasing.p": 0.25},
    ),
}


@pytest.mark.parametrize("spec", COMPOSED)
def test_an_identity_gives_the_same_pixels(spec: str) -> None:
    policy = view_policy(spec, seed=5)
    name, parameters = COMPOSED[spec]
    assert policy.name == name
    assert policy.parameters == parameters
    assert policy.seed == 5
    identity = ViewsIdentity(policy.name, policy.parameters, policy.version, policy.seed)
    stored = json.loads(msgspec.json.encode(identity))  # as it lies in the store
    read = msgspec.convert(stored, ViewsIdentity)
    known = known_policy(read.policy, read.parameters, read.version, read.seed)
    assert known == policy
    assert torch.equal(pixels(known, 3), pixels(policy, 3))


def test_probes_know_compositions_apart() -> None:
    specs = [*COMPOSED, "none", "pad-crop"]
    probes = [pixel_probes(noise_dataset(), view_policy(spec), None) for spec in specs]
    for one, other in combinations(probes, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) > 30


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("pad-crop+sharpening", {"pad": 4}),
        ("cutmix", {"pad": 4}),
        ("pad-crop+mixup+erasing", {"pad": 4}),
        ("pad-crop+mixup", {"pad": 4, "cutmix.alpha": 1.0}),  # of another stage
        ("pad-crop", {"weak.pad": 4}),
        ("pad-crop|none|pad-crop+mixup", {}),
    ],
)
def test_an_identity_that_this_program_cannot_draw(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ViewError, match="this program has no view policy"):
        known_policy(name, parameters, version=1, seed=0)


def test_another_version_of_a_part_is_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = view_policy("pad-crop|pad-crop+erasing+mixup")
    for part in (Erasing, Mixup):
        before = policy.version
        monkeypatch.setattr(part, "version", 2)
        assert policy.version == before + 1
    with pytest.raises(ViewError, match="is version 3 here, 1 in the cache"):
        known_policy(policy.name, policy.parameters, version=1, seed=0)


@pytest.mark.parametrize(
    ("spec", "count", "moves_pixels_only", "batched", "mixes"),
    [
        ("pad-crop-flip+erasing", None, True, True, False),
        ("pad-crop-flip+cutmix", None, True, True, True),
        ("pad-crop-flip+mixup", None, False, True, True),
        ("pad-crop-flip+rand-augment", None, False, False, False),
        ("resized-crop-flip+erasing", None, False, False, False),
        (V2, None, False, False, False),
        ("pad-crop|pad-crop-flip", 324, True, True, False),
        ("pad-crop-flip|pad-crop-flip+rand-augment", None, False, True, False),
        ("none|none+mixup", None, False, True, True),
    ],
)
def test_properties(
    spec: str, count: int | None, moves_pixels_only: bool, batched: bool, mixes: bool
) -> None:
    policy = view_policy(spec)
    assert policy.count == count
    assert policy.moves_pixels_only == moves_pixels_only
    assert policy.batched == batched
    assert policy.mixes == mixes


@pytest.mark.parametrize(
    ("weak", "strong"),
    [
        ("pad-crop", "pad-crop+rand-augment"),
        ("none", "pad-crop-flip+erasing+mixup"),
        ("pad-crop-flip", "pad-crop"),
    ],
)
def test_even_views_are_weak_and_odd_ones_strong(weak: str, strong: str) -> None:
    pair = view_policy(f"{weak}|{strong}", seed=4)
    assert isinstance(pair, Paired)
    for view in (0, 1, 10, 11, 161):
        policy = view_policy((weak, strong)[view % 2], seed=4)
        own = view // 2 if policy.count is None else view // 2 % policy.count
        assert torch.equal(pixels(pair, view), pixels(policy, own))
        assert pair.paired_views(view) == (view - view % 2, view - view % 2 + 1)


def test_a_pair_applied_with_a_view_for_each_sample() -> None:
    pair = view_policy("pad-crop|pad-crop+erasing:p=1", seed=4)
    images, samples, views = noise(6, 3, 8, 8), torch.arange(6), torch.tensor([0, 1, 5, 160, 7, 8])
    together = pair.apply(images, samples, views)
    for i, view in enumerate(views.tolist()):
        one = pair.apply(images[i : i + 1], samples[i : i + 1], view)
        assert torch.equal(together[i : i + 1], one)


def test_a_new_layer_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ON_TOP, "invert", Erasing)  # put back afterwards

    @on_top("invert")
    @dataclass(frozen=True)
    class Invert(Layer):
        above: int = 0
        place: ClassVar[int] = 4

        def draw(self, seed: int, samples: Tensor, *_: Tensor) -> Drawn:
            return Drawn()

        def on_image(self, image: Tensor, drawn: Any, i: int) -> Tensor:
            return torch.where(image > self.above, 255 - image, image)

    policy = view_policy("pad-crop+erasing+invert:above=9+mixup")
    assert policy.name == "pad-crop+erasing+invert+mixup"
    assert known_policy(policy.name, policy.parameters, version=1, seed=0) == policy
    images = noise(4, 3, 8, 8)
    seen = view_policy("none+invert:above=9").apply(images, torch.arange(4), 0)
    assert torch.equal(seen, torch.where(images > 9, 255 - images, images))
    with pytest.raises(ViewError, match="composition"):
        view_policy("pad-crop+invert+erasing")
