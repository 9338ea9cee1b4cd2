import dataclasses
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from noise import noise, noise_dataset
from PIL import Image
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets import ImageDataset, load_dataset
from stages.inputs.feed import Batch, Normalise, ViewFeed, num_batches, plain_view
from stages.inputs.feed import joined as one_batch
from stages.inputs.probes import PROBES, pixel_probes
from stages.inputs.views import Plain, view_policy
from stages.settings import Feeding

# Two workers are what is tested, also where a container grants one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 colour images of 12 x 12 in two classes."""
    root = tmp_path_factory.mktemp("feed")
    for name in "ab":
        (root / "train" / name).mkdir(parents=True)
    for i, image in enumerate(noise(21, 3, 12, 12)):
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(root / "train" / "ab"[i // 11] / f"{i:02}.png")
    return root


def joined(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    return torch.cat([b.samples for b in batches]), torch.cat([b.pixels for b in batches])


def sizes(feed: ViewFeed, order: Tensor, batch_size: int) -> list[int]:
    return [len(b.samples) for b in feed.batches(order, 0, batch_size)]


@pytest.mark.parametrize(
    ("spec", "image_size", "workers"),
    [
        ("pad-crop-flip", None, 2),
        ("pad-crop-flip", 20, 0),
        ("resized-crop-flip", None, 0),
        ("resized-crop-flip", 8, 2),
        ("none", None, 0),
        ("none:zoom=1.5", 10, 0),
    ],
)
def test_memory_and_stream_alike(
    folder: Path, spec: str, image_size: int | None, workers: int
) -> None:
    policy = view_policy(spec, seed=1)
    view = 5 if policy.count != 1 else 0
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))

    def fed(source: ImageDataset, workers: int, order: Tensor, batch_size: int) -> Tensor:
        feed = ViewFeed(source, policy, CPU, image_size, workers)
        samples, pixels = joined(list(feed.batches(order, view, batch_size)))
        feed.close()
        assert torch.equal(samples, order)
        return pixels[order.argsort()]  # in dataset order

    everything = torch.arange(21)
    in_memory = fed(load_dataset(f"folder:{folder}", "train"), 0, everything, 21)
    streamed = load_dataset(f"folder:{folder}", "train", feeding="stream")
    side = image_size or 12
    assert in_memory.dtype == torch.uint8
    assert in_memory.shape == (21, 3, side, side)
    assert torch.equal(fed(streamed, workers, order, 4), in_memory)
    assert torch.equal(fed(load_dataset(f"folder:{folder}", "train"), workers, order, 5), in_memory)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_cannot_go_on_once_another_began(workers: int) -> None:
    source, policy = noise_dataset(streamed=True), view_policy("pad-crop-flip")
    feed, order = ViewFeed(source, policy, CPU, workers=workers), torch.arange(21)
    earlier = feed.batches(order, 0, 2)
    next(earlier)
    later = feed.batches(order, 7, 4)
    begun = [next(later)]
    with pytest.raises(RuntimeError, match="another pass over this feed began"):
        next(earlier)
    assert list(earlier) == []  # it has ended
    samples, pixels = joined([*begun, *later])
    feed.close()
    assert torch.equal(samples, order)
    assert torch.equal(pixels, policy.apply(noise(21, 3, 12, 12), order, 7))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("samples", "batch_size"), [(21, 4), (20, 5), (3, 8)])
def test_batches_can_be_skipped(streamed: bool, samples: int, batch_size: int) -> None:
    feed = ViewFeed(noise_dataset(streamed=streamed), view_policy("pad-crop-flip"), CPU, workers=0)
    order = torch.arange(samples).flip(0)
    every = list(feed.batches(order, 3, batch_size))
    assert len(every) == num_batches(samples, batch_size)
    for skip in range(len(every) + 2):
        rest = list(feed.batches(order, 3, batch_size, skip=skip))
        assert len(rest) == max(0, len(every) - skip)
        for ours, theirs in zip(rest, every[skip:], strict=True):
            assert torch.equal(ours.samples, theirs.samples)
            assert torch.equal(ours.pixels, theirs.pixels)


def test_images_of_any_size_are_brought_to_one() -> None:
    images = [torch.full((3, 6 + i, 9), 40 * i, dtype=torch.uint8) for i in range(5)]
    source = dataclasses.replace(
        noise_dataset(5, streamed=True), load=images.__getitem__, labels=torch.arange(5) % 2
    )
    feed = ViewFeed(source, view_policy("resized-crop-flip"), CPU, image_size=8, workers=0)
    _, pixels = joined(list(feed.batches(torch.arange(5), 0, 2)))
    expected = 40 * torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    assert torch.equal(pixels, expected.expand(5, 3, 8, 8))
    feed = ViewFeed(source, view_policy("none"), CPU, workers=0)
    with pytest.raises(DatasetError, match=r"images differ in size(.|\n)*--image-size"):
        list(feed.batches(torch.arange(5), 0, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("streamed", [False, True])
def test_cuda_gives_the_same_bytes(streamed: bool) -> None:
    policy, order = view_policy("pad-crop-flip"), torch.arange(21)
    feed = ViewFeed(noise_dataset(streamed=streamed), policy, torch.device("cuda"), workers=0)
    samples, pixels = joined(list(feed.batches(order, 9, 4)))
    assert samples.is_cuda
    assert pixels.is_cuda
    assert torch.equal(pixels.cpu(), policy.apply(noise(21, 3, 12, 12), order, 9))


@pytest.mark.parametrize(
    ("samples", "batch_size", "expected"),
    [
        (12, 4, [4, 4, 4]),
        (14, 4, [4, 4, 4, 2]),
        (13, 4, [4, 4, 5]),  # a last one of one joins the batch before
        (5, 4, [5]),
        (1, 4, [1]),
        (0, 4, []),
        (3, 1, [1, 1, 1]),
    ],
)
def test_batch_sizes(samples: int, batch_size: int, expected: list[int]) -> None:
    feed = ViewFeed(noise_dataset(streamed=samples > 4), Plain(), CPU, workers=0)
    assert sizes(feed, torch.arange(samples), batch_size) == expected
    assert num_batches(samples, batch_size) == len(expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    for i in range(6):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(path)
    source = load_dataset(f"folder:{tmp_path}", "train", feeding="stream")
    (tmp_path / "train" / "b" / "3.png").write_bytes(b"this is no image")
    feed = ViewFeed(source, Plain(), CPU, workers=workers)
    with pytest.raises(DatasetError, match=r"cannot read image .*train/b/3\.png") as caught:
        list(feed.batches(torch.arange(6), 0, 2))
    error = caught.value
    assert "--skip skip.txt" in error.remedy
    assert "Traceback" not in str(error)
    (batch,) = feed.batches(torch.arange(3), 0, 3)  # the workers live on
    assert batch.pixels[:, 0, 0, 0].tolist() == [0, 2, 4]
    feed.close()
    # Frames and error refer to each other, and a loader that the garbage collector finds in such
    # a cycle waits 5 seconds for each worker.
    error.__traceback__ = None
    del caught


def test_plain_view() -> None:
    assert plain_view(None, None).zoom == 0  # as it is
    assert plain_view(224, 256).zoom == 256 / 224
    assert plain_view(224, None).zoom == plain_view(224, 200).zoom == 1  # never zooms out


@pytest.mark.parametrize(
    ("spec", "image_size"), [("pad-crop-flip", None), ("resized-crop-flip", 9), ("none", None)]
)
def test_probes_of_any_feeding_notice_one_pixel(
    folder: Path, spec: str, image_size: int | None
) -> None:
    def probes(feeding: Feeding, change: int = 0) -> list[int]:
        source = load_dataset(f"folder:{folder}", "train", feeding=feeding)
        if source.images is not None:
            source.images[7, 1, 6, 6] ^= change
        return pixel_probes(source, view_policy(spec), image_size)

    in_memory = probes("memory")
    assert in_memory == probes("stream")
    assert len(in_memory) == PROBES == 256
    after = probes("memory", 1 if image_size is None else 255)
    # 256 probes fall on each of 21 images 12 times on average; the others stay as they were.
    assert 1 <= sum(a != b for a, b in zip(in_memory, after, strict=True)) <= 30


def test_golden_probes() -> None:
    # The pairs are part of the cache format. Worked out with plain integers: probe p is sample
    # hash(0, p, 1) and view hash(0, p, 0), the high 32 bits of each scaled to the range.
    pairs = [(3, 22), (5, 43), (6, 135), (5, 35), (16, 76), (18, 1)]
    policy, images = view_policy("pad-crop-flip", seed=8), noise(21, 3, 12, 12)
    samples, views = torch.tensor(pairs).T
    pixels = policy.apply(images[samples], samples, views)
    expected = [zlib.crc32(image.numpy().tobytes()) for image in pixels]
    assert pixel_probes(noise_dataset(), policy, None)[:6] == expected


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("size", "height", "width"), [(0, 4, 4), (1, 1, 1), (9, 190, 170)])
def test_normalising_is_a_product_and_a_sum(
    size: int, height: int, width: int, channels_last: bool
) -> None:
    """Bit for bit, in float32: in parts or as a whole, in any order of the memory."""
    pixels = noise(size, 3, height, width)
    scale = (1 / (255 * np.array(STD))).reshape(1, 3, 1, 1)
    shift = -np.array(MEAN).reshape(1, 3, 1, 1) * 255 * scale
    expected = pixels.numpy().astype(np.float32) * np.float32(scale) + np.float32(shift)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    np.testing.assert_allclose(expected, (pixels.numpy() / 255 - mean) / std, rtol=0, atol=1e-6)
    for laid_out in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        values = Normalise(MEAN, STD, 3, CPU, channels_last)(laid_out)
        assert values.dtype == torch.float32
        np.testing.assert_array_equal(values.numpy(), expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("statistics", [(MEAN, STD), ((0.3,), (0.25,))])
def test_grey_is_repeated_where_the_model_takes_colour(
    channels_last: bool, statistics: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    """Each channel with its own statistics, in a tensor of its own."""
    pixels = noise(21, 3, 12, 12)[:, :1]
    values = Normalise(*statistics, 3, CPU, channels_last)(pixels)
    repeated = Normalise(*statistics, 3, CPU, channels_last)(torch.cat([pixels] * 3, 1))
    assert values.shape == (21, 3, 12, 12)
    assert torch.equal(values, repeated)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert values.is_contiguous(memory_format=wanted)
    values[:, 0] = 0
    assert torch.equal(values[:, 1:], repeated[:, 1:])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "spec", ["pad-crop-flip", "resized-crop-flip+mixup", "pad-crop|pad-crop-flip+erasing"]
)
def test_several_views_are_each_what_they_are_alone(spec: str, streamed: bool) -> None:
    policy, order = view_policy(spec, seed=1), torch.arange(21).flip(0)
    feed, alone = (
        ViewFeed(noise_dataset(streamed=streamed), policy, CPU, workers=0) for _ in range(2)
    )
    views = (4, 1, 2)
    several = [*feed.views(order, views, 5, skip=1)]
    for view, mine in zip(views, zip(*several, strict=True), strict=True):
        for left, right in zip(mine, alone.batches(order, view, 5, skip=1), strict=True):
            for name in ("samples", "pixels", "partners", "shares"):
                one, other = getattr(left, name), getattr(right, name)
                assert one is other is None or torch.equal(one, other)


def test_a_mixed_batch_beside_an_unmixed_one_keeps_its_partners() -> None:
    samples, pixels = torch.tensor([3, 1]), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    plain = Batch(samples, pixels)
    mixed = Batch(samples, pixels, torch.tensor([2, 0]), torch.tensor([0.75, 0.5]))

    both = one_batch([plain, mixed])

    assert both.partners is not None
    assert both.shares is not None
    assert both.partners.tolist() == [3, 1, 2, 0]
    assert both.shares.tolist() == [1, 1, 0.75, 0.5]
    assert one_batch([plain, plain]).partners is None
