"""JPEGs decoded on a GPU (--decoder nvjpeg) against Pillow: a part of `benchmarks.gpu --smoke`."""

from pathlib import Path

import torch

from benchmarks.jpegs import generate
from benchmarks.measure import Figure, Ratio, in_turns, seconds
from benchmarks.parts import Found, SkippedError, Where
from benchmarks.smoke_runs import check
from stages.errors import DatasetError
from stages.inputs.datasets import ImageDataset, load_dataset
from stages.inputs.datasets.nvjpeg import check_usable
from stages.inputs.feed import ViewFeed
from stages.inputs.views import view_policy
from stages.settings import Decoder

IMAGES, BATCH, SIZE, TURNS = 128, 32, 224, 3
FAR = 4.0
"""Grey levels that pixels may be from Pillow's in the mean. Colours of the generated JPEGs are
noise at half of the image's size: without smoothing between them they are 3 from Pillow's.
"""


def decoded_on_gpu(where: Where) -> Found:
    """Pixels near Pillow's, views of them, and images per second of both."""
    if not where.on_gpu:
        raise SkippedError("needs CUDA")
    try:
        check_usable()
    except DatasetError as error:
        raise SkippedError(error.cause) from error
    images = BATCH if where.quick else IMAGES
    return compared(where.folder / "jpegs", images, torch.device(where.device))


def compared(folder: Path, images: int, device: torch.device) -> Found:
    """Both decoders on generated JPEGs. Pillow has one core, the GPU what it takes."""
    if not folder.exists():
        generate(folder, images)
    pillow, gpu = _images(folder, None), _images(folder, "nvjpeg")
    far = max(
        float((gpu.load(i).int() - pillow.load(i).int()).abs().float().mean()) for i in range(8)
    )
    check(far <= FAR, f"pixels are {far:.2f} grey levels from Pillow's in the mean")

    policy, order = view_policy("resized-crop-flip"), torch.arange(BATCH)
    feed = ViewFeed(gpu, policy, device, SIZE, workers=2)
    alone = policy.render_each([gpu.load(i) for i in range(BATCH)], order, 1, (SIZE, SIZE))
    for _, batch in feed.views(order, (0, 1), BATCH):
        check(torch.equal(batch.pixels.cpu(), torch.stack(alone)), "views are of other pixels")
    feed.close()

    batches = torch.arange(images).split(BATCH)

    def passes(dataset: ImageDataset) -> float:
        return seconds(lambda: [dataset.load_each(some.tolist()) for some in batches])

    passes(gpu)
    times = in_turns({"gpu": lambda: passes(gpu), "pillow": lambda: passes(pillow)}, TURNS)
    ratio = Ratio(name="decode: GPU / Pillow", ours=times["gpu"], yardstick=times["pillow"])
    rates = [
        Figure(name=f"decoded, {name}", value=images / min(times[name]), unit="images/s")
        for name in times
    ]
    told = ", ".join(f"{rate.name.split()[-1]} {rate.value:,.0f}/s" for rate in rates)
    return f"{far:.2f} grey levels apart in the mean; {told}", [ratio, *rates]


def _images(folder: Path, decoder: Decoder | None) -> ImageDataset:
    return load_dataset(f"folder:{folder}", "train", feeding="stream", decoder=decoder)
