"""torchvision's transforms as policies: seeded for each image, global generators untouched."""

import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from noise import noise, noise_dataset
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from stages.errors import ViewError
from stages.inputs.counter_hash import counter_hash
from stages.inputs.feed import ViewFeed
from stages.inputs.views import Transform, known_policy, transforms, view_policy
from stages.inputs.views.policy import Stream

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")

CPU = torch.device("cpu")


def three_generators(image: Tensor) -> Tensor:
    """What the three global generators say, written into the first pixels."""
    image[:, 0, 0] = torch.randint(256, ())
    image[:, 0, 1] = int(np.random.randint(256))
    image[:, 0, 2] = random.randrange(256)
    return image


def failing(image: Tensor) -> Tensor:
    three_generators(image)
    raise OverflowError("no more")


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "usual": lambda: v2.Compose(
        [v2.RandomResizedCrop(8, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4)]
    ),
    "flip": v2.RandomHorizontalFlip,
    "drawing": lambda: three_generators,
    "failing": lambda: failing,
    "wrapped": lambda: tv_tensors.Image,
    "blank": lambda: lambda image: image.zero_(),
    "floats": lambda: v2.ToDtype(torch.float32, scale=True),
    "grey": lambda: v2.Grayscale(),
    "batch": lambda: lambda image: image[None],
    "words": lambda: lambda image: "image",
    "uneven": lambda: lambda image: image[:, : 4 + int(torch.randint(4, ()))],
    "nothing": lambda: None,
}


@pytest.fixture(autouse=True)
def my_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module `mytransforms`, which worker processes inherit."""
    module = types.ModuleType("mytransforms")
    vars(module).update(TRANSFORMS, needs_size=lambda size: v2.Resize(size))
    monkeypatch.setitem(sys.modules, "mytransforms", module)
    transforms._made.cache_clear()
    yield
    transforms._made.cache_clear()


def seen(spec: str, order: Tensor, view: int, workers: int = 0, **changes: Any) -> Tensor:
    feed = ViewFeed(
        noise_dataset(streamed=workers > 0),
        view_policy(spec, seed=3),
        CPU,
        workers=workers,
        **changes,
    )
    pixels = torch.cat([batch.pixels for batch in feed.batches(order, view, 4)])
    feed.close()
    return pixels


def states() -> tuple[bytes, str, str]:
    numpy = np.random.get_state(legacy=False)
    return torch.get_rng_state().numpy().tobytes(), str(numpy), str(random.getstate())


@pytest.mark.parametrize(
    ("spec", "workers"), [("usual", 2), ("drawing", 0), ("usual+erasing", 0), ("drawing+mixup", 2)]
)
def test_any_order_batch_and_worker_gives_the_same_bytes(spec: str, workers: int) -> None:
    spec = f"v2:mytransforms:{spec}"
    expected = seen(spec, torch.arange(21), 5)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    order = torch.randperm(21)
    assert torch.equal(seen(spec, order, 5, workers), expected[order])


def test_what_the_generators_say_is_drawn_from_the_hash() -> None:
    pixels = seen("v2:mytransforms:drawing", torch.arange(21), 5)[:, 0, 0, :3]
    for sample in range(21):
        seed = int(counter_hash(3, Stream.TRANSFORM, 5, torch.tensor(sample)))
        theirs = torch.Generator().manual_seed(seed)
        bits = seed % 2**64
        numpy, plain = np.random.RandomState([bits % 2**32, bits >> 32]), random.Random(bits)
        assert pixels[sample].tolist() == [
            int(torch.randint(256, (), generator=theirs)),
            int(numpy.randint(256)),
            plain.randrange(256),
        ]


def test_images_are_transformed_as_torchvision_does() -> None:
    # Each image by itself, under its seed: not what a batch as a whole would draw.
    pixels = seen("v2:mytransforms:usual", torch.arange(21), 0)
    for sample, image in enumerate(noise(21, 3, 12, 12)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                int(counter_hash(3, Stream.TRANSFORM, 0, torch.tensor(sample)))
            )
            assert torch.equal(pixels[sample], TRANSFORMS["usual"]()(image))


def test_global_generators_are_as_they_were_after_an_error() -> None:
    before = states()
    with pytest.raises(OverflowError, match="no more"):
        seen("v2:mytransforms:failing", torch.arange(21), 5)
    assert states() == before


@pytest.mark.parametrize(
    "spec",
    [
        "v2:mytransforms:drawing",
        "pad-crop-flip+rand-augment+erasing+mixup",
        "resized-crop-flip+trivial-augment+cutmix",
    ],
)
def test_no_policy_touches_a_global_generator(spec: str) -> None:
    before = states()
    seen(spec, torch.arange(21), 5)
    assert states() == before


def test_results_are_tensors_of_their_own() -> None:
    """Plain ones; and transforms in place do not change the dataset."""
    (image,) = view_policy("v2:mytransforms:wrapped").apply(noise(1, 3, 4, 4), torch.arange(1), 0)
    assert type(image) is Tensor
    source = noise_dataset()
    feed = ViewFeed(source, view_policy("v2:mytransforms:blank"), CPU, workers=0)
    (batch,) = feed.batches(torch.arange(21), 0, 21)
    assert int(batch.pixels.max()) == 0
    assert source.images is not None
    assert torch.equal(source.images, noise(21, 3, 12, 12))


def test_a_transform_may_give_another_size() -> None:
    assert seen("v2:mytransforms:usual", torch.arange(21), 0).shape == (21, 3, 8, 8)
    larger = seen("v2:mytransforms:usual", torch.arange(21), 0, image_size=10)
    assert larger.shape == (21, 3, 10, 10)
    own = seen("v2:mytransforms:usual", torch.arange(21), 0)
    expected = v2.functional.resize(own[3], [10, 10], antialias=True)
    assert torch.equal(larger[3], expected)  # the same crop, shown larger
    layered = seen("v2:mytransforms:usual+erasing:p=1", torch.arange(21), 0)
    assert layered.shape == (21, 3, 8, 8)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("floats", r"gives torch.float32 \(3, 12, 12\)(.|\n)*Leave ToDtype"),
        ("grey", r"gives torch.uint8 \(1, 12, 12\) for an image \(3, 12, 12\)"),
        ("batch", r"gives torch.uint8 \(1, 3, 12, 12\)"),
        ("words", "gives str, not a tensor"),
        ("uneven", r"gives images of \(3, \d, 12\) and of \(3, \d, 12\)(.|\n)*--image-size"),
    ],
)
def test_what_a_transform_must_not_give(target: str, message: str) -> None:
    with pytest.raises(ViewError, match=message):
        seen(f"v2:mytransforms:{target}", torch.arange(21), 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("v2:mytransforms:nothing", "returns NoneType, which cannot be called"),
        ("v2:mytransforms:needs_size", "cannot be called without arguments"),
        ("v2:mytransforms:missing", "cannot import transform 'mytransforms:missing'"),
        ("v2:no_such_module:make", "cannot import transform 'no_such_module:make'"),
        ("v2:mytransforms", "cannot import transform 'mytransforms'"),
        ("v2:", "cannot import transform ''"),
        ("v2", "cannot import transform ''"),
    ],
)
def test_what_is_no_transform(spec: str, message: str) -> None:
    with pytest.raises(ViewError, match=message):
        view_policy(spec)


def test_another_torchvision_is_told() -> None:
    policy = view_policy("v2:mytransforms:flip")
    assert isinstance(policy, Transform)
    parameters = {**policy.parameters, "torchvision": "0.1.2"}
    with pytest.raises(ViewError, match=r"torchvision 0\.1\.2, here is (.|\n)*Install torchvision"):
        known_policy(policy.name, parameters, policy.version, policy.seed)
