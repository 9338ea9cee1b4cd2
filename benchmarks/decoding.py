"""Where the time of a large image goes, and what several views of each decoded image save.

    python -m benchmarks.decoding --work DIR        about three minutes on two cores
    python -m benchmarks.decoding --work DIR --images 64 --turns 2    a quick one

JPEGs of 500 x 375 pixels are generated into DIR, which is removed at the end: smooth noise of
several scales, about as many bytes each as ImageNet's. The teacher is one linear layer, so that
decoding bounds the pass. Both sides of a ratio are done in turns. The bare loader is a torchvision
`DataLoader` whose dataset decodes an image with Pillow, renders the same views and collates them,
with the same forward passes. The exit code is 1 if a pass takes more memory than its stated bound.
"""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as tv

from benchmarks.measure import Figure, alternately, in_turns, new_report, peak_memory, seconds
from pipeline.console import Console
from stages.cache_job import CacheJob, prepare
from stages.cache_runs import held_bytes
from stages.inputs.feed import Normalise
from stages.inputs.views.crops import Boxes, render
from stages.settings import CacheConfig, DataSettings, TeacherSettings
from stages.teacher_pass import TeacherPass

HEIGHT, WIDTH, SIZE, CLASSES, BATCH = 375, 500, 224, 4, 32
SLACK = 64 * 2**20
"""What the allocator and a batch of float32 pixels take beside what is counted."""


class Pooled(nn.Sequential):
    """One linear layer on 8 x 8 means: as little teacher as there can be."""

    def __init__(self, num_classes: int) -> None:
        torch.manual_seed(0)
        super().__init__(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, num_classes))


def jpeg(i: int) -> bytes:
    """Image i: noise of four scales, the finer the weaker."""
    random = np.random.default_rng(i)
    pixels = np.full((HEIGHT, WIDTH, 3), 128.0)
    for cell, strength in ((125, 50), (32, 30), (8, 20), (2, 24)):
        coarse = random.normal(0, strength, (HEIGHT // cell + 2, WIDTH // cell + 2, 3))
        scaled = tv.resize(torch.from_numpy(coarse).permute(2, 0, 1), [HEIGHT, WIDTH])
        pixels += scaled.permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
    return content.getvalue()


def generate(folder: Path, images: int) -> None:
    """`images` for training and a few for testing, in class folders."""
    for split, count in (("train", images), ("val", 2 * CLASSES)):
        for i in range(count):
            path = folder / split / f"class{i % CLASSES}" / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i))


def steps(job: CacheJob, folder: Path) -> dict[str, Callable[[], float]]:
    """Each step of a view for a batch of images, by itself."""
    paths = sorted((folder / "train").rglob("*.jpg"))[:BATCH]
    contents = [path.read_bytes() for path in paths]
    whole = [job.splits.train.load(i) for i in range(BATCH)]
    samples, policy = torch.arange(BATCH), job.policy
    sides = (torch.full_like(samples, side) for side in (HEIGHT, WIDTH))
    height, width = sides
    drawn = policy.draw(samples, 0, height, width)
    assert isinstance(drawn, Boxes)
    shown = [render(x, drawn, i, (SIZE, SIZE)) for i, x in enumerate(whole)]
    stacked, normalise = torch.stack(shown), Normalise([0.5], [0.2], 3, job.device)

    def rendered(source: list[Tensor]) -> None:
        for i, image in enumerate(source):
            render(image, drawn, i, (SIZE, SIZE))

    planes = [image.contiguous() for image in whole]

    def pillow(draft: bool = False) -> None:
        for content in contents:
            with Image.open(io.BytesIO(content)) as image:
                if draft:
                    image.draft("RGB", (SIZE, SIZE))
                np.array(image.convert("RGB"))

    works: dict[str, Callable[[], object]] = {
        "open and read": lambda: [path.read_bytes() for path in paths],
        "decode, Pillow": pillow,
        "decode, torchvision.io": lambda: [
            decode_jpeg(torch.frombuffer(bytearray(c), dtype=torch.uint8), ImageReadMode.RGB)
            for c in contents
        ],
        "decode, Pillow, draft to 224 (which cannot halve 375)": lambda: pillow(True),
        "draw the crop": lambda: policy.draw(samples, 0, height, width),
        "crop, mirror and resize": lambda: rendered(whole),
        "the same, colours in planes": lambda: rendered(planes),
        "collate": lambda: torch.stack(shown),
        "to float32, normalise": lambda: normalise(stacked),
    }
    return {name: (lambda work=work: seconds(work)) for name, work in works.items()}  # type: ignore[misc]


class BareViews(Dataset[Tensor]):
    """Item i: every view of image i, uint8 (views, C, H, W), from one decoding. Crops are drawn
    ahead, which costs it nothing.
    """

    def __init__(self, job: CacheJob, views: int) -> None:
        self.train = job.splits.train
        samples = torch.arange(len(self.train))
        sides = [torch.full_like(samples, side) for side in (HEIGHT, WIDTH)]
        drawn = [job.policy.draw(samples, view, *sides) for view in range(views)]
        self.boxes = [boxes for boxes in drawn if isinstance(boxes, Boxes)]

    def __len__(self) -> int:
        return len(self.train)

    def __getitem__(self, i: int) -> Tensor:
        image, shown = self.train.load(i), []
        for boxes in self.boxes:
            top, left, height, width = (
                int(side[i]) for side in (boxes.top, boxes.left, boxes.height, boxes.width)
            )
            crop = tv.resized_crop(image, top, left, height, width, [SIZE, SIZE], antialias=True)
            shown.append(crop.flip(-1) if boxes.mirrored[i] else crop)
        return torch.stack(shown)


def bare_pass(job: CacheJob, loader: "DataLoader[Tensor]", views: int) -> None:
    """The same forward passes over a torchvision loader."""
    with torch.inference_mode():
        for batch in loader:
            for view in range(views):
                job.model.module(job.normalise(batch[:, view]))


def our_pass(teacher: TeacherPass, views: int, at_once: int) -> None:
    order = torch.arange(len(teacher.feed.dataset))
    for first in range(0, views, at_once):
        teacher.of_views(order, range(first, min(first + at_once, views)))


@click.command()
@click.option("--work", required=True, type=Path, help="A new folder, removed at the end.")
@click.option("--images", default=256, show_default=True)
@click.option("--views", default=8, show_default=True)
@click.option("--turns", default=5, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--out", default=None, help="JSON file for the figures.")
def main(work: Path, images: int, views: int, turns: int, workers: int, out: str | None) -> None:
    """Measure the steps of an image, then passes over views."""
    torch.set_num_threads(1)
    console, device = Console(), torch.device("cpu")
    report = new_report({"images": images, "views": views, "workers": workers}, device)
    work.mkdir(parents=True)  # another's folder is not removed
    try:
        generate(work, images)
        job = prepare(
            CacheConfig(
                data=DataSettings(
                    dataset=f"folder:{work}", feeding="stream", image_size=SIZE, workers=workers
                ),
                teacher=TeacherSettings(architecture="benchmarks.decoding:Pooled"),
                views=views,
                augment="resized-crop-flip",
                batch_size=BATCH,
                device="cpu",
            )
        )
        size = sum(p.stat().st_size for p in (work / "train").rglob("*.jpg")) / images
        report.add(Figure(name="bytes of a file", value=size, unit="B"))
        for name, found in in_turns(steps(job, work), 3 * turns).items():
            each = 1e3 * sorted(found)[len(found) // 2] / BATCH
            report.add(Figure(name=name, value=each, unit="ms"))
        teacher = TeacherPass.of(job)
        bare = BareViews(job, views)
        # A batch of the bare loader holds every view of its images.
        loader = DataLoader(bare, BATCH, num_workers=workers, persistent_workers=workers > 0)
        our_pass(teacher, 1, 1)
        bare_pass(job, loader, views)
        report.add(
            alternately(
                f"{views} views at once / one",
                lambda: seconds(lambda: our_pass(teacher, views, views)),
                lambda: seconds(lambda: our_pass(teacher, views, 1)),
                turns,
            ),
            alternately(
                f"{views} views at once / a bare loader that decodes once",
                lambda: seconds(lambda: our_pass(teacher, views, views)),
                lambda: seconds(lambda: bare_pass(job, loader, views)),
                turns,
            ),
        )
        with peak_memory() as peak:
            our_pass(teacher, views, views)
        teacher.feed.close()
        bound = held_bytes(job, views) + SLACK
        for name, value in (("peak of a pass", peak.bytes), ("its bound", bound)):
            report.add(Figure(name=name, value=value / 2**20, unit="MiB"))
    finally:
        shutil.rmtree(work)
    console.table(
        f"{images} JPEGs of {WIDTH} x {HEIGHT}, views of {SIZE}, {workers} workers",
        ("what", "an image or in all", ""),
        [(f.name, f"{f.value:,.3g}", f.unit) for f in report.figures],
    )
    console.table(
        "in turns",
        ("what", "ratio", "turns", "seconds of both"),
        [
            (
                r.name,
                f"{r.median:.2f}",
                f"{min(r.ratios):.2f} to {max(r.ratios):.2f}",
                f"{np.median(r.ours):.2f}, {np.median(r.yardstick):.2f}",
            )
            for r in report.ratios
        ],
    )
    if out:
        report.write(out)
    sys.exit(peak.bytes > bound)


if __name__ == "__main__":
    main()
