from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import noise
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from stages.errors import ViewError
from stages.inputs.views import (
    Boxes,
    PadCrop,
    PadCropFlip,
    Plain,
    ResizedCropFlip,
    ViewPolicy,
    known_policy,
    view_policy,
)
from stages.inputs.views import boxes as cutting


def render(image: Tensor, boxes: Boxes, i: int, size: tuple[int, int], *how: Any) -> Tensor:
    return cutting.cut_out(image, boxes.each()[i], size, *how)


def draw(policy: ViewPolicy, samples: Tensor, view: int | Tensor, size: tuple[int, int]) -> Boxes:
    height, width = (torch.full_like(samples, side) for side in size)
    return policy.draw(samples, view, height, width)


def numbers(boxes: Boxes) -> list[tuple[int, ...]]:
    fields = (boxes.top, boxes.left, boxes.height, boxes.width, boxes.mirrored)
    return [tuple(row) for row in torch.stack(fields, 1).tolist()]


def naive_crop(image: Tensor, top: int, left: int, mirrored: int) -> Tensor:
    """Pixel (y, x) of the view is pixel (top + y, left + x) of the image, or 0 beyond its edge."""
    channels, height, width = image.shape
    out = np.zeros((channels, height, width), np.uint8)
    for y, x in product(range(height), range(width)):
        if 0 <= top + y < height and 0 <= left + x < width:
            out[:, y, width - 1 - x if mirrored else x] = image[:, top + y, left + x]
    return torch.from_numpy(out)


# These numbers are the cache format: a cache made with others holds targets of other pixels.


@pytest.mark.parametrize(
    ("spec", "seed", "view", "sample", "expected"),
    [
        # (top, left, mirrored)
        ("pad-crop-flip", 0, 0, 0, (-2, -2, 1)),
        ("pad-crop-flip", 0, 0, 1, (2, 0, 0)),
        ("pad-crop-flip", 1, 0, 0, (1, 3, 1)),
        ("pad-crop-flip", 0, 1, 0, (-2, 1, 0)),
        ("pad-crop-flip", 12345, 7, 49999, (2, -4, 1)),
        ("pad-crop-flip", -3, 17, 2**40, (3, 1, 0)),
        ("pad-crop", 0, 0, 0, (-3, 2, 0)),
        ("pad-crop", 0, 80, 49999, (3, 2, 0)),
        ("pad-crop-flip:pad=1", 0, 17, 49999, (0, -1, 0)),
    ],
)
def test_golden_offsets(
    spec: str, seed: int, view: int, sample: int, expected: tuple[int, int, int]
) -> None:
    top, left, mirrored = expected
    boxes = draw(view_policy(spec, seed), torch.tensor([sample]), view, (8, 9))
    assert numbers(boxes) == [(top, left, 8, 9, mirrored)]


@pytest.mark.parametrize(
    ("seed", "view", "sample", "expected"),
    [
        # (top, left, height, width, mirrored) in an image of 375 x 500
        (0, 0, 0, (50, 134, 213, 176, 0)),
        (0, 0, 1, (2, 127, 371, 371, 1)),
        (1, 0, 0, (28, 80, 310, 397, 1)),
        (0, 1, 0, (11, 95, 340, 367, 1)),
        (0, 299, 1281166, (85, 105, 254, 286, 0)),
        (0, 2**40, 5, (124, 171, 230, 300, 0)),
        (-3, 17, 2**40, (61, 147, 295, 326, 0)),
    ],
)
def test_golden_resized_crops(seed: int, view: int, sample: int, expected: tuple[int, ...]) -> None:
    boxes = draw(ResizedCropFlip(seed=seed), torch.tensor([sample]), view, (375, 500))
    assert numbers(boxes) == [expected]


@pytest.mark.parametrize(
    ("policy", "mirrors"),
    [
        (PadCropFlip(), (0, 1)),
        (PadCrop(seed=3), (0,)),
        (PadCropFlip(pad=0), (0, 1)),
    ],
)
def test_the_views_of_a_sample_are_all_there_are(policy: PadCrop, mirrors: tuple[int, ...]) -> None:
    offsets = range(-policy.pad, policy.pad + 1)
    every = sorted((t, x, 8, 8, m) for t, x, m in product(offsets, offsets, mirrors))
    for sample in (0, 1, 49_999, 2**33):
        views = torch.arange(policy.count)
        boxes = draw(policy, torch.full_like(views, sample), views, (8, 8))
        assert sorted(numbers(boxes)) == every


@pytest.mark.parametrize("view", [0, 1, 161])
def test_a_view_is_uniform_across_samples(view: int) -> None:
    boxes = draw(PadCropFlip(), torch.arange(32_400), view, (32, 32))
    cells = ((boxes.top + 4) * 9 + boxes.left + 4) * 2 + boxes.mirrored
    counts = torch.bincount(cells, minlength=162).double()  # 200 expected in each
    chi_square = float(((counts - 200) ** 2 / 200).sum())
    assert abs(chi_square - 161) < 5 * (2 * 161) ** 0.5


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([PadCrop, PadCropFlip]),
    st.integers(0, 5),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 10**6),
)
def test_naive_crops(
    kind: type[PadCrop], pad: int, shape: tuple[int, int, int], number: int
) -> None:
    policy = kind(pad=pad, seed=number)
    images, samples = noise(3, *shape), torch.tensor([0, 7, number])
    view = number % policy.count
    boxes = draw(policy, samples, view, shape[1:])
    seen = policy.apply(images, samples, view)
    for i, (top, left, _, _, mirrored) in enumerate(numbers(boxes)):
        assert torch.equal(seen[i], naive_crop(images[i], top, left, mirrored))


def test_a_hand_worked_view() -> None:
    # Sample 0, view 0: two rows and two columns of padding come in from above and left; mirrored.
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    seen = PadCropFlip().apply(image, torch.tensor([0]), 0)
    assert seen.tolist() == [[[[0, 0, 0], [0, 0, 0], [1, 0, 0]]]]


def torchvision_box(height: int, width: int) -> tuple[int, ...]:
    image = torch.empty(1, height, width)
    transform = v2.RandomResizedCrop(1)
    box = transform.make_params([image])
    return tuple(box[key] for key in ("top", "left", "height", "width"))


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 600), st.floats(0.5, 2), st.integers(0, 10**9), st.sampled_from([0.08, 0.9]))
def test_boxes_are_within_limits(height: int, aspect: float, number: int, min_area: float) -> None:
    width = max(8, round(height * aspect))
    samples, policy = number + torch.arange(50), ResizedCropFlip(min_area=min_area, seed=number)
    for top, left, h, w, mirrored in numbers(draw(policy, samples, number, (height, width))):
        assert top >= 0
        assert left >= 0
        assert top + h <= height
        assert left + w <= width
        assert mirrored in (0, 1)
        # Each side was rounded: some box within half a pixel has an allowed area and ratio.
        assert (w - 0.5) * (h - 0.5) <= height * width
        if width >= 0.75 * height and height >= 0.75 * width:  # a box is always found
            assert (w + 0.5) * (h + 0.5) >= min_area * height * width
        assert (w - 0.5) / (h + 0.5) <= 4 / 3
        assert (w + 0.5) / (h - 0.5) >= 3 / 4


def test_boxes_are_distributed_as_torchvision_draws_them() -> None:
    height, width = size = (300, 150)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor([torchvision_box(height, width) for _ in range(1500)]).double()
    boxes = draw(ResizedCropFlip(), torch.arange(30_000), 0, size)
    ours = torch.tensor(numbers(boxes)).double()

    def summary(rows: Tensor) -> dict[str, float]:
        top, left, h, w = rows[:, :4].T
        area, log_ratio = h * w / (height * width), (w / h).log()
        return {
            "area": float(area.mean()),
            "spread of area": float(area.std()),
            "small": float((area < 0.25).double().mean()),
            "log ratio": float(log_ratio.mean()),
            "spread of log ratio": float(log_ratio.std()),
            "centre, down": float((top + h / 2).mean() / height),
            "centre, across": float((left + w / 2).mean() / width),
        }

    # Two standard errors of torchvision's 1,500 draws are about 0.014 (0.023 for a share of draws).
    assert summary(ours) == pytest.approx(summary(theirs), abs=0.03)
    assert float(ours[:, 4].mean()) == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (3, 500), (1000, 10)])
def test_no_box_fits_an_extreme_shape(size: tuple[int, int]) -> None:
    # Then torchvision's central crop is not random, and ours must be the same.
    expected = torchvision_box(*size)
    boxes = draw(ResizedCropFlip(), torch.arange(5), 0, size)
    assert [box[:4] for box in numbers(boxes)] == [expected] * 5


def test_images_of_different_sizes_in_one_draw() -> None:
    policy, samples = ResizedCropFlip(), torch.arange(3)
    heights, widths = torch.tensor([40, 1, 300]), torch.tensor([60, 500, 200])
    together = numbers(policy.draw(samples, 4, heights, widths))
    for i in range(3):
        size = int(heights[i]), int(widths[i])
        assert numbers(draw(policy, samples[i : i + 1], 4, size)) == [together[i]]


def box(top: int, left: int, height: int, width: int, mirrored: int = 0) -> Boxes:
    return Boxes(*(torch.tensor([value]) for value in (top, left, height, width, mirrored)))


@pytest.mark.parametrize("filtering", list(cutting.FILTERS.values()))
def test_pixels_where_float32_is_resized(
    filtering: InterpolationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on processors for which torch has no code for uint8."""
    resize = tv.resize

    def by_way_of_float32(pixels: Tensor, size: list[int], **given: Any) -> Tensor:
        return resize(pixels.float(), size, **given).round().clamp(0, 255).byte()

    image, square = noise(3, 90, 90), box(0, 0, 90, 90)
    native = render(image, square, 0, (40, 50), filtering)
    assert torch.equal(native, resize(image, [40, 50], filtering, antialias=True))
    cutting._resamples_as_torchvision.cache_clear()
    monkeypatch.setattr(tv, "resize", by_way_of_float32)
    try:
        shown = render(image, square, 0, (40, 50), filtering)
    finally:
        cutting._resamples_as_torchvision.cache_clear()
    expected = by_way_of_float32(image, [40, 50], interpolation=filtering, antialias=True)
    assert torch.equal(shown, expected)
    assert not torch.equal(shown, native)


def test_none_is_the_image_itself() -> None:
    images = noise(4, 3, 6, 5)
    assert torch.equal(Plain().apply(images, torch.arange(4), 0), images)


@pytest.mark.parametrize(
    ("size", "zoom", "expected"),
    [
        ((512, 640), 256 / 224, (32, 96, 448, 448, 0)),
        ((300, 200), 1.0, (50, 0, 200, 200, 0)),
        ((9, 9), 3.0, (3, 3, 3, 3, 0)),
        ((1, 8), 4.0, (0, 3, 1, 1, 0)),  # never empty
    ],
)
def test_the_central_square(size: tuple[int, int], zoom: float, expected: tuple[int, ...]) -> None:
    assert numbers(draw(Plain(zoom=zoom), torch.tensor([0]), 0, size)) == [expected]


def test_zoom_is_resize_and_centre_crop() -> None:
    # The same central square. Cutting before resizing differs in the outermost pixels alone, where
    # torchvision's filter still sees what lies beyond the square.
    image = noise(3, 512, 640)
    square = draw(Plain(zoom=256 / 224), torch.tensor([0]), 0, (512, 640))
    ours = render(image, square, 0, (224, 224))
    theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
    inside = (slice(None), slice(1, -1), slice(1, -1))
    assert int((ours.int() - theirs.int())[inside].abs().max()) <= 1


@pytest.mark.parametrize(
    ("spec", "view", "message"),
    [
        ("pad-crop-flip", 162, r"view 162 of 'pad-crop-flip' .*\[0, 161\]"),
        ("pad-crop-flip", -1, r"view -1 of 'pad-crop-flip'"),
        ("pad-crop", torch.tensor([0, 81]), r"view 81 .*\[0, 80\]"),
        ("resized-crop-flip", -1, r"view -1 .*\[0, \.\.\.\]"),
        ("none", 1, r"view 1 of 'none' .*\[0, 0\]"),
        ("none|pad-crop", 162, r"view 162 of 'none\|pad-crop' is outside \[0, 161\]"),
    ],
)
def test_a_view_that_does_not_exist(spec: str, view: int | Tensor, message: str) -> None:
    with pytest.raises(ViewError, match=message):
        view_policy(spec).apply(noise(2, 1, 4, 4), torch.arange(2), view)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pad-crop-flop", "did you mean 'pad-crop-flip'"),
        ("pad-crop:pda=2", "'pda=2' is not a parameter.*\nIt takes pad=4"),
        ("pad-crop:seed=1", "'seed=1' is not a parameter"),
        ("pad-crop:pad=-1", r"pad must be in \[0, 64\], was -1"),
        ("pad-crop:pad=65", r"pad must be in \[0, 64\], was 65"),
        ("resized-crop-flip:min_area=0", "min_area must be in"),
        ("resized-crop-flip:min_area=1.5", "min_area must be in"),
        ("none:zoom=0.5", "zoom must be 0 or at least 1"),
        ("none:zoom=inf", "zoom must be 0 or at least 1"),
    ],
)
def test_a_policy_that_does_not_exist(spec: str, message: str) -> None:
    with pytest.raises(ViewError, match=message):
        view_policy(spec)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("pad-crop", PadCrop(seed=7)),
        ("pad-crop-flip:pad=2", PadCropFlip(pad=2, seed=7)),
        ("none:zoom=1.25", Plain(zoom=1.25, seed=7)),
        ("resized-crop-flip:min_area=0.2", ResizedCropFlip(min_area=0.2, seed=7)),
    ],
)
def test_specifications(spec: str, expected: ViewPolicy) -> None:
    assert view_policy(spec, seed=7) == expected
    name, parameters = expected.name, expected.parameters
    assert known_policy(name, parameters, version=expected.version, seed=7) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is version 1 here, 2 in the cache"),
        ({"name": "nothing"}, "has no view policy 'nothing'"),
        ({"parameters": {"fill": 3}}, "has no view policy .*fill"),
    ],
)
def test_an_identity_that_this_program_cannot_draw(change: dict[str, Any], message: str) -> None:
    identity = {"name": "pad-crop", "parameters": {"pad": 4}, "version": 1, "seed": 0}
    with pytest.raises(ViewError, match=message):
        known_policy(**{**identity, **change})


@pytest.mark.parametrize("name", ["pad-crop", "pad-crop-flip", "resized-crop-flip", "none"])
def test_the_filter_of_resized_crops(name: str) -> None:
    images, samples = [noise(1, 3, 40, 60)[0]], torch.arange(1)
    plain = view_policy(name, 3)
    assert "interpolation" not in plain.parameters  # so that older identities stay what they are
    sharp = view_policy(f"{name}:interpolation=bicubic", 3)
    assert known_policy(sharp.name, sharp.parameters, sharp.version, sharp.seed) == sharp
    filters = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    for policy, filter_ in zip((plain, sharp), filters, strict=True):
        (seen,) = policy.render_each(images, samples, 0, (16, 16))
        ((*corners, mirrored),) = numbers(draw(policy, samples, 0, (40, 60)))
        cut = tv.crop(images[0], *corners)
        cut = cut.flip(-1) if mirrored else cut
        assert torch.equal(seen, tv.resize(cut, [16, 16], filter_, antialias=True))
    with pytest.raises(ViewError, match="bilinear or bicubic"):
        view_policy(f"{name}:interpolation=lanczos", 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mirrored", [0, 1])
@pytest.mark.parametrize("corners", [(3, 5, 20, 31), (-2, 10, 12, 60), (1, 1, 8, 8)])
@pytest.mark.parametrize("filtering", list(cutting.FILTERS.values()))
def test_rendering_does_not_depend_on_how_pixels_lie(
    channels: int, mirrored: int, corners: tuple[int, int, int, int], filtering: InterpolationMode
) -> None:
    """Against torchvision on planes of colours; decoders lay the colours of a pixel together."""
    together = noise(40, 50, channels).permute(2, 0, 1)
    crop = tv.crop(together.contiguous(), *corners).contiguous()
    crop = crop.flip(-1) if mirrored else crop
    for size in ((8, 8), (16, 24), (33, 9), (60, 70)):
        shown = tv.resize(crop, list(size), interpolation=filtering, antialias=True)
        for image in (together, together.contiguous()):
            found = render(image, box(*corners, mirrored), 0, size, filtering)
            assert torch.equal(found, shown)
    # Pillow is another implementation of the same filter; the two round differently.
    if filtering == InterpolationMode.BILINEAR:
        for plane, expected in zip(found, crop, strict=True):
            pillow = Image.fromarray(expected.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
            difference = plane.int() - torch.from_numpy(np.array(pillow)).int()
            assert int(difference.abs().max()) <= 1
