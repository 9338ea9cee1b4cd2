"""Where the time of a large image goes, and what several views of each decoded image save.

    python -m benchmarks.decoding --work DIR        about six minutes on two cores
    python -m benchmarks.decoding --work DIR --images 64 --turns 2    a quick one

JPEGs of 500 x 375 pixels are generated into DIR, which is removed at the end: smooth noise of
several scales. Teacher and student are one linear layer, so that decoding bounds what is measured.
All that is compared is done in turns. The bare loader is a torchvision `DataLoader` whose dataset
decodes an image with Pillow, renders the same views and collates them, with the same forward
passes. Epochs of students are the trainer's own, without evaluation. The exit code is 1 if a pass
takes more memory than its stated bound.
"""

import functools
import io
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as tv

from benchmarks.jpegs import HEIGHT, WIDTH, generate
from benchmarks.measure import (
    Figure,
    Ratio,
    Report,
    in_turns,
    new_report,
    peak_memory,
    seconds,
)
from benchmarks.table import show_report
from benchmarks.view_epochs import measure_epochs
from pipeline.console import Console
from stages.inputs.buffers import Slots
from stages.inputs.feed import Normalise
from stages.inputs.views.boxes import FILTERS, Boxes, cut_out, resample
from stages.settings import CacheConfig, DataSettings, TeacherSettings
from stages.teacher.job import CacheJob, prepare
from stages.teacher.logits import TeacherPass
from stages.teacher.memory import held_bytes

SIZE, BATCH = 224, 32
SLACK = 64 * 2**20
"""What the allocator and a batch of float32 pixels take beside what is counted."""
MODEL = "benchmarks.jpegs:Strided"


def cpu_seconds(work: Callable[[], object]) -> float:
    """What some work takes of this thread's core, whatever else the machine does."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def cores_seconds() -> float:
    """What this process and its workers have taken of any core: another program that runs beside
    them matters less to it than to a clock.
    """
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children())]
    return float(sum(each.user + each.system for each in times))


def steps(job: CacheJob, folder: Path) -> dict[str, Callable[[], float]]:
    """Each step of a view for a batch of images, by itself."""
    paths = sorted((folder / "train").rglob("*.jpg"))[:BATCH]
    contents = [path.read_bytes() for path in paths]
    whole = [job.splits.train.load(i) for i in range(BATCH)]
    samples, policy = torch.arange(BATCH), job.policy
    height, width = (torch.full_like(samples, side) for side in (HEIGHT, WIDTH))
    drawn = policy.draw(samples, 0, height, width)
    assert isinstance(drawn, Boxes)
    boxes = drawn.each()
    crops = [cut_out(x, box, box[2:4]) for x, box in zip(whole, boxes, strict=True)]
    crops = [x[None].contiguous(memory_format=torch.channels_last)[0] for x in crops]
    shown = [cut_out(x, box, (SIZE, SIZE)) for x, box in zip(whole, boxes, strict=True)]
    normalise = Normalise([0.5], [0.2], 3, job.device)
    place = Slots(1, BATCH * SIZE * SIZE * 3).at(0, (BATCH, SIZE, SIZE, 3))
    batch = place.clone()

    def rendered(source: list[Tensor]) -> None:
        for image, box in zip(source, boxes, strict=True):
            cut_out(image, box, (SIZE, SIZE))

    def pillow(to_tensor: bool) -> None:
        for content in contents:
            with Image.open(io.BytesIO(content)) as image:
                np.array(image) if to_tensor else image.load()

    planes = [image.contiguous() for image in whole]
    works: dict[str, Callable[[], object]] = {
        "open and read": lambda: [path.read_bytes() for path in paths],
        "decode": lambda: pillow(to_tensor=False),
        "decode, to a tensor": lambda: pillow(to_tensor=True),
        "decode, torchvision.io": lambda: [
            decode_jpeg(torch.frombuffer(bytearray(c), dtype=torch.uint8), ImageReadMode.RGB)
            for c in contents
        ],
        "draw the crop": lambda: policy.draw(samples, 0, height, width),
        "crop, mirror and resize": lambda: rendered(whole),
        "the same, colours in planes": lambda: rendered(planes),
        "of it torch's resampler": lambda: [
            resample(crop, (SIZE, SIZE), FILTERS["bilinear"]) for crop in crops
        ],
        "into the shared place": lambda: torch.stack(
            [image.permute(1, 2, 0) for image in shown], out=place
        ),
        "out of it": lambda: batch.copy_(place),
        "to float32, normalise": lambda: normalise(batch.permute(0, 3, 1, 2)),
    }
    return {name: functools.partial(cpu_seconds, work) for name, work in works.items()}


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


# ---- the report ---------------------------------------------------------------------------------


def measure_steps(report: Report, job: CacheJob, work: Path, turns: int) -> None:
    """What each step of an image and view takes of a core."""
    for name, found in in_turns(steps(job, work), turns).items():
        each = 1e3 * sorted(found)[len(found) // 2] / BATCH
        report.add(Figure(name=name, value=each, unit="ms"))


def measure_passes(report: Report, job: CacheJob, turns: int) -> bool:
    """Passes of stage one over views, and whether one takes no more memory than it may."""
    views, workers = job.config.views, job.config.data.workers
    teacher = TeacherPass.of(job)
    # A batch of the bare loader holds every view of its images.
    loader = DataLoader(
        BareViews(job, views), BATCH, num_workers=workers, persistent_workers=workers > 0
    )
    our_pass(teacher, 1, 1)
    bare_pass(job, loader, views)
    passes = {
        "at once": lambda: our_pass(teacher, views, views),
        "one": lambda: our_pass(teacher, views, 1),
        "a bare loader that decodes once": lambda: bare_pass(job, loader, views),
    }
    spent: dict[str, list[float]] = {name: [] for name in passes}

    def timed(name: str) -> float:
        before, taken = cores_seconds(), seconds(passes[name])
        spent[name].append(cores_seconds() - before)
        return taken

    times = in_turns({name: functools.partial(timed, name) for name in passes}, turns)
    for of, found in (("", times), (", cores' time", {n: tuple(t) for n, t in spent.items()})):
        for name in ("one", "a bare loader that decodes once"):
            compared = f"{views} views at once / {name}{of}"
            report.add(Ratio(name=compared, ours=found["at once"], yardstick=found[name]))
    with peak_memory() as peak:
        our_pass(teacher, views, views)
    teacher.feed.close()
    bound = held_bytes(job, views) + SLACK
    for name, value in (("peak of a pass", peak.bytes), ("its bound", bound)):
        report.add(Figure(name=name, value=value / 2**20, unit="MiB"))
    return peak.bytes <= bound


PARTS = ("steps", "passes", "epochs")


@click.command()
@click.option("--work", required=True, type=Path, help="A new folder, removed at the end.")
@click.option("--images", default=256, show_default=True)
@click.option("--quality", default=90, show_default=True, help="Of the JPEGs.")
@click.option("--views", default=8, show_default=True)
@click.option("--turns", default=5, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Measure this alone.")
@click.option("--out", default=None, help="JSON file for the figures.")
def main(work: Path, turns: int, only: tuple[str, ...], out: str | None, **made: int) -> None:
    """Measure the steps of an image, passes over views, and epochs of students."""
    torch.set_num_threads(1)
    report, wanted = new_report({**made}, torch.device("cpu")), only or PARTS
    work.mkdir(parents=True)  # another's folder is not removed
    bounded = True
    try:
        mean = generate(work, made["images"], made["quality"])
        report.add(Figure(name="bytes of a file", value=mean, unit="B"))
        data = DataSettings(
            dataset=f"folder:{work}", feeding="stream", image_size=SIZE, workers=made["workers"]
        )
        job = prepare(
            CacheConfig(
                data=data,
                teacher=TeacherSettings(architecture=MODEL),
                views=made["views"],
                augment="resized-crop-flip",
                batch_size=BATCH,
                device="cpu",
            )
        )
        if "steps" in wanted:
            measure_steps(report, job, work, 3 * turns)
        if "passes" in wanted:
            bounded = measure_passes(report, job, turns)
        if "epochs" in wanted:
            measure_epochs(report, job, work, turns)
    finally:
        shutil.rmtree(work)
    sized = f"JPEGs of {WIDTH} x {HEIGHT}, views of {SIZE}"
    title = f"{made['images']} {sized}, {made['workers']} workers"
    show_report(Console(), title, report, out)
    sys.exit(not bounded)


if __name__ == "__main__":
    main()
