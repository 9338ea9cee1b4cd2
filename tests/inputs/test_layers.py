"""What goes on top of a crop: augmentation and erasing, against torchvision and by hand."""

import math
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import noise
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from stages.errors import ViewError
from stages.inputs.views import Erasing, RandAugment, TrivialAugment, view_policy
from stages.inputs.views.augment import BINS, OPERATIONS, RAND, WIDE, Reach, operate
from stages.inputs.views.layers import Layer

# Our names of torchvision's operations, in its order.
THEIRS = [
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
]


def drawn(layer: Layer, samples: Tensor, view: int, side: int = 32, seed: int = 0) -> Any:
    sides = torch.full_like(samples, side)
    return layer.draw(seed, samples, torch.full_like(samples, view), sides, sides)


def chi_square_fits(values: Tensor, cells: int) -> bool:
    """Whether counts are uniform: within five standard deviations of chi square's mean."""
    counts = torch.bincount(values.flatten(), minlength=cells).double()
    expected = values.numel() / cells
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return len(counts) == cells and abs(chi_square - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize(
    ("layer", "seed", "view", "sample", "expected"),
    [
        # (operation, step) one after another; draws are the cache format
        (TrivialAugment(), 0, 0, 0, [("equalize", 8)]),
        (TrivialAugment(), 0, 0, 1, [("sharpness", 27)]),
        (TrivialAugment(), 0, 1, 0, [("rotate", -13)]),
        (TrivialAugment(), 1, 0, 0, [("sharpness", 24)]),
        (TrivialAugment(), 12345, 2**33, 49_999, [("sharpness", -1)]),
        (RandAugment(), 0, 0, 0, [("posterize", -9), ("contrast", 9)]),
        (RandAugment(), 0, 0, 1, [("auto-contrast", 9), ("colour", -9)]),
        (
            RandAugment(n=3, m=30),
            *(12345, 7, 49_999),
            [("rotate", 30), ("shear-y", -30), ("equalize", 30)],
        ),
    ],
)
def test_golden_steps(
    layer: Layer, seed: int, view: int, sample: int, expected: list[tuple[str, int]]
) -> None:
    steps = drawn(layer, torch.tensor([sample]), view, seed=seed)
    pairs = zip(steps.operations[0].tolist(), steps.steps[0].tolist(), strict=True)
    assert [(OPERATIONS[operation], step) for operation, step in pairs] == expected


@pytest.mark.parametrize(
    ("seed", "view", "sample", "expected"),
    [
        # (top, left, height, width) in an image of 32 x 32
        (0, 0, 0, (8, 4, 16, 16)),
        (0, 0, 1, (10, 9, 15, 15)),
        (0, 1, 0, (6, 7, 12, 21)),
        (1, 0, 0, (0, 13, 26, 10)),
        (12345, 2**33, 49_999, (14, 22, 7, 4)),
    ],
)
def test_golden_boxes(seed: int, view: int, sample: int, expected: tuple[int, ...]) -> None:
    box = drawn(Erasing(p=1.0), torch.tensor([sample]), view, seed=seed)
    assert tuple(int(t) for t in (box.top, box.left, box.height, box.width)) == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("pad-crop-flip+trivial-augment", 547082099),
        ("pad-crop-flip+rand-augment", 652824770),
        ("pad-crop-flip+erasing:p=0.5", 2329726378),
        ("pad-crop-flip+rand-augment:n=1+erasing", 3891027733),
    ],
)
def test_golden_pixels(spec: str, expected: int) -> None:
    seen = view_policy(spec, seed=8).apply(noise(40, 3, 16, 16), torch.arange(40), 200)
    assert zlib.crc32(seen.numpy().tobytes()) == expected


def expected_operation(image: Tensor, name: str, magnitude: float) -> Tensor:
    """torchvision's own dispatch, as its transforms call it."""
    transform = v2.TrivialAugmentWide()
    result: Tensor = transform._apply_image_or_video_transform(
        image, name, magnitude, interpolation=transform.interpolation, fill=transform._fill
    )
    return result


@pytest.mark.parametrize(("channels", "side"), [(1, 9), (3, 32)])
@pytest.mark.parametrize(
    ("reach", "theirs"), [(WIDE, v2.TrivialAugmentWide), (RAND, v2.RandAugment)]
)
@pytest.mark.parametrize("operation", range(len(OPERATIONS)), ids=OPERATIONS)
def test_every_operation(
    operation: int, reach: Reach, theirs: Any, channels: int, side: int
) -> None:
    image = noise(channels, side, side + 3)
    table, signed = theirs._AUGMENTATION_SPACE[THEIRS[operation]]
    magnitudes = table(BINS, side, side + 3)
    for step in (-30, -17, -1, 0, 1, 9, 15, 30):
        if step < 0 and not signed:
            continue
        # Their tables are float32: half a unit of its last place must not decide what is equal.
        magnitude = 0.0 if magnitudes is None else float(magnitudes[abs(step)])
        magnitude = round(magnitude, 5) * (-1 if step < 0 else 1)
        if THEIRS[operation].startswith("Shear"):  # through degrees rounded to 2^-20
            degrees = round(math.degrees(math.atan(magnitude)) * 2**20) / 2**20
            magnitude = math.tan(math.radians(degrees))
        seen = operate(image, OPERATIONS[operation], step, reach)
        assert seen.dtype == torch.uint8
        assert torch.equal(seen, expected_operation(image, THEIRS[operation], magnitude)), step


@pytest.mark.parametrize("side", [32, 256, 300])
@pytest.mark.parametrize("factor", [0.01, 0.7, 1.99])
def test_contrast_is_torchvisions(side: int, factor: float) -> None:
    # Its float sum is exact up to 256 x 256; beyond that ours is, within one grey level.
    image = noise(3, side, side)
    reach = Reach(0, 0, False, 0, round((factor - 1) * 100), 0)
    ours, theirs = operate(image, "contrast", 30, reach), tv.adjust_contrast(image, factor)
    assert int((ours.int() - theirs.int()).abs().max()) <= (side > 256)


def test_the_steps_are_done_one_after_another() -> None:
    layer, images = RandAugment(n=3), noise(50, 3, 16, 16)
    steps = drawn(layer, torch.arange(50), 4, side=16)
    for i, image in enumerate(images):
        expected = image
        for operation, step in zip(steps.operations[i], steps.steps[i], strict=True):
            expected = operate(expected, OPERATIONS[int(operation)], int(step), RAND)
        assert torch.equal(layer.on_image(image, steps, i), expected)


def test_images_of_two_channels_are_told() -> None:
    with pytest.raises(ViewError, match="images of 1 or 3 channels, these have 2"):
        view_policy("none+trivial-augment").apply(noise(1, 2, 8, 8), torch.tensor([0]), 0)


def test_trivial_augment_is_uniform() -> None:
    steps = drawn(TrivialAugment(), torch.arange(40_000), 3)
    assert chi_square_fits(steps.operations, 14)
    assert chi_square_fits(steps.steps.abs(), BINS)
    assert chi_square_fits((steps.steps[steps.steps != 0] > 0).long(), 2)
    assert chi_square_fits(steps.operations * BINS + steps.steps.abs(), 14 * BINS)


def test_rand_augment_is_uniform() -> None:
    steps = drawn(RandAugment(n=2, m=7), torch.arange(40_000), 3)
    first, second = steps.operations.T
    assert set(steps.steps.unique().tolist()) == {-7, 7}
    assert chi_square_fits(first * 14 + second, 14 * 14)
    assert chi_square_fits((steps.steps > 0).long(), 2)


def test_stages_draw_independently() -> None:
    samples = torch.arange(20_000)
    trivial, rand = (drawn(layer, samples, 0) for layer in (TrivialAugment(), RandAugment(n=1)))
    assert chi_square_fits(trivial.operations * 14 + rand.operations, 14 * 14)
    # Erasing takes the same box whatever else is on the image.
    white = torch.full((60, 1, 16, 16), 255, dtype=torch.uint8)
    alone = view_policy("none+erasing:p=1").apply(white, samples[:60], 9)
    beside = view_policy("none+rand-augment:m=0+erasing:p=1").apply(white, samples[:60], 9)
    erased = alone == 0
    assert bool(erased.flatten(1).any(1).all())
    assert bool((beside[erased] == 0).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 10**6))
def test_erasing_a_batch_equals_erasing_each(height: int, width: int, view: int) -> None:
    layer, images, samples = Erasing(p=0.8), noise(20, 2, height, width), torch.arange(20)
    sides = (torch.full_like(samples, side) for side in (height, width))
    box = layer.draw(1, samples, torch.full_like(samples, view), *sides)
    batch = layer.on_batch(images, box)
    for i, image in enumerate(images):
        top, left, down, across = (int(t[i]) for t in (box.top, box.left, box.height, box.width))
        expected = image.clone()
        expected[:, top : top + down, left : left + across] = 0
        assert top + down <= height
        assert left + across <= width
        assert torch.equal(batch[i], expected)
        assert torch.equal(layer.on_image(image, box, i), expected)


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_how_often_is_erased(p: float) -> None:
    box = drawn(Erasing(p=p), torch.arange(40_000), 1)
    assert float((box.height > 0).double().mean()) == pytest.approx(p, abs=0.011)


def test_boxes_are_distributed_as_torchvision_draws_them() -> None:
    size = (40, 24)
    transform, image = v2.RandomErasing(p=1), torch.empty(3, *size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [transform.make_params([image]) for _ in range(3000)]
    samples = torch.arange(30_000)
    sides = (torch.full_like(samples, side) for side in size)
    box = Erasing(p=1.0).draw(0, samples, torch.zeros_like(samples), *sides)
    ours = torch.stack([box.top, box.left, box.height, box.width], 1).double()
    rows = torch.tensor([[t[key] for key in "ijhw"] for t in theirs if t["v"] is not None]).double()

    def summary(boxes: Tensor) -> dict[str, float]:
        top, left, h, w = boxes.T
        area, log_ratio = h * w / (size[0] * size[1]), (h / w).log()
        return {
            "area": float(area.mean()),
            "spread of area": float(area.std()),
            "log ratio": float(log_ratio.mean()),
            "spread of log ratio": float(log_ratio.std()),
            "centre, down": float((top + h / 2).mean() / size[0]),
            "centre, across": float((left + w / 2).mean() / size[1]),
        }

    # Two standard errors of 3,000 draws: 0.025 for the log ratio, less for the others.
    assert summary(ours) == pytest.approx(summary(rows), abs=0.03)
