"""FKD's own code beside ours: several crops of every decoded image, for a teacher and a student.

    git clone https://github.com/szq0214/FKD DIR
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 python -m benchmarks.fkd --fkd DIR/FKD --work WORK

Its loaders, transforms and files of labels are imported from that folder and run as they are, with
these changes: its workers stay from one pass to the next as ours do, memory is not pinned, views
are resized with a bilinear filter on both sides. (Its files of labels hold NumPy arrays: hence the
variable.) JPEGs are generated into WORK, which is removed at the end. The teacher is one linear
layer with 1,000 outputs. Both sides of a ratio are done in turns.
"""

import importlib
import io
import itertools
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from benchmarks.decoding import BATCH, SIZE
from benchmarks.jpegs import generate
from benchmarks.measure import Figure, alternately, new_report, seconds
from benchmarks.table import show_report
from pipeline.console import Console
from stages.cache import LogitCache
from stages.cache.layout import BlockId
from stages.cache_teacher import cache_teacher
from stages.inputs.views.boxes import Boxes
from stages.settings import CacheConfig, DataSettings, TeacherSettings
from stages.teacher.job import CacheJob, prepare
from stages.teacher.logits import TeacherPass

CLASSES = 1000
LABELS = "marginal_smoothing_k5"
"""FKD's: the five most probable classes and a uniform rest."""


class Thousand(nn.Sequential):
    """One linear layer on 8 x 8 means, for 1,000 classes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, CLASSES))


class Theirs:
    """What FKD does for our images. views: crops of an image."""

    def __init__(self, code: Path, job: CacheJob, work: Path, views: int, workers: int) -> None:
        sys.path[:0] = [str(code), str(code / "FKD_SLG")]
        self.training, self.making = (
            importlib.import_module(name) for name in ("utils_FKD", "generate_soft_label")
        )
        self.job, self.work, self.views, self.workers = job, work, views, workers
        teacher = job.identity.teacher
        self._to_tensor = [
            transforms.ToTensor(),
            transforms.Normalize(teacher.mean, teacher.std),  # type: ignore[no-untyped-call]
        ]
        self._passes = itertools.count()

    def _loader(self, dataset: Any) -> "DataLoader[Any]":
        return DataLoader(
            dataset, BATCH, shuffle=True, num_workers=self.workers, persistent_workers=True
        )

    def teacher_pass(self) -> Callable[[], float]:
        """Its labels of all images, into a new folder each time."""
        making = self.making
        composed = making.ComposeWithCoords(
            transforms=[
                making.RandomResizedCropWithCoords(
                    size=SIZE, scale=(0.08, 1.0), interpolation=InterpolationMode.BILINEAR
                ),
                making.RandomHorizontalFlipWithRes(),
                *self._to_tensor,
            ]
        )
        images = making.ImageFolder_FKD_GSL(
            num_crops=self.views,
            save_path=None,
            reference_path=None,
            root=str(self.work / "images" / "train"),
            transform=composed,
        )
        loader, model = self._loader(images), self.job.model.module

        def work() -> None:
            arguments = SimpleNamespace(
                save_path=str(self.work / f"labels{next(self._passes)}"),
                num_crops=self.views,
                num_seg=self.views,
                gpu=None,
                temp=1.0,
                label_type=LABELS,
            )
            with torch.no_grad(), redirect_stdout(io.StringIO()):
                making.generate_soft_labels(loader, model, arguments)

        return lambda: seconds(work)

    def write_labels(self, rows: Tensor, boxes: list[Boxes]) -> None:
        """Its files of labels, of our views. rows: float32 logits (views, N, C)."""
        paths = self.job.splits.train.load.paths  # type: ignore[attr-defined]
        for i, path in enumerate(paths):
            height, width = self.job.splits.train.load(i).shape[1:]
            coords = [
                (b.top[i] / height, b.left[i] / width, b.height[i] / height, b.width[i] / width)
                for b in boxes
            ]
            state = [
                np.array(coords, dtype=np.float32),
                np.array([bool(b.mirrored[i]) for b in boxes]),
                self.making.label_quantization(rows[:, i].softmax(1), LABELS),
            ]
            file = self.work / "labels" / "train" / Path(path).with_suffix(".tar")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, file)

    def student_images(self) -> Any:
        """Its training images, each with crops and labels of its file."""
        training = self.training
        return training.ImageFolder_FKD(
            num_crops=self.views,
            softlabel_path=str(self.work / "labels"),
            root=str(self.work / "images" / "train"),
            transform=training.Compose_FKD(
                transforms=[
                    training.RandomResizedCrop_FKD(size=SIZE, interpolation="bilinear"),
                    training.RandomHorizontalFlip_FKD(),
                    *self._to_tensor,
                ]
            ),
        )

    def student_epoch(self) -> Callable[[], float]:
        """Its batches of an epoch, as its training loop has them before the student."""
        loader = self._loader(self.student_images())

        def work() -> None:
            for images, target, labels in loader:
                torch.cat(images), torch.cat(target)
                self.training.Recover_soft_label(torch.cat(labels), LABELS, CLASSES)

        return lambda: seconds(work)


def our_teacher_pass(job: CacheJob, cache: LogitCache) -> Callable[[], float]:
    """Every view of all images, written again."""
    teacher, views = TeacherPass.of(job), range(cache.num_views)

    def work() -> None:
        for block in range(cache.grid.num_blocks):
            samples = cache.dataset_index[cache.grid.rows(block)]
            found = teacher.finite_of_views(samples, views)
            for view, logits in zip(views, found, strict=True):
                cache.write_block(*BlockId(view, block), logits, logits.argmax(1), {})

    return lambda: seconds(work)


def our_student_epoch(job: CacheJob, cache: LogitCache, views: int) -> Callable[[], float]:
    """Normalised batches of several views at once, and their targets as rows."""
    feed = job.feed(job.splits.train, job.policy)

    def work() -> None:
        targets = [cache.read_view(view) for view in range(views)]
        order = torch.randperm(len(job.splits.train))
        for batches in feed.views(order, range(views), BATCH):
            for batch, of_view in zip(batches, targets, strict=True):
                job.normalise(batch.pixels)
                of_view.rows(batch.samples)

    return lambda: seconds(work)


def boxes_of(job: CacheJob, views: int) -> list[Boxes]:
    """The crops of every image in the first views."""
    train = job.splits.train
    samples = torch.arange(len(train))
    sides = torch.tensor([train.load(i).shape[1:] for i in range(len(train))]).T
    drawn = [job.policy.draw(samples, view, *sides) for view in range(views)]
    return [boxes for boxes in drawn if isinstance(boxes, Boxes)]


def difference(job: CacheJob, theirs: Theirs, boxes: list[Boxes]) -> float:
    """Mean absolute difference of the pixels of a view, theirs and ours, on the scale of 255."""
    images, count = theirs.student_images(), min(8, len(job.splits.train))
    feed = job.feed(job.splits.train, job.policy)
    (batch,) = feed.batches(torch.arange(count), 0, count)
    feed.close()
    shown = []
    for i in range(count):
        path, _ = images.samples[i]
        label = theirs.work / "labels" / "train" / Path(path).parent.name / Path(path).stem
        coords, flips, _ = torch.load(f"{label}.tar", weights_only=False)
        shown.append(images.transform(images.loader(path), torch.tensor(coords[0]), flips[0]))
    std = torch.tensor(job.identity.teacher.std).view(-1, 1, 1)
    apart = (torch.stack(shown) - job.normalise(batch.pixels)).abs() * std
    return 255 * float(apart.mean())


@click.command()
@click.option("--fkd", required=True, type=Path, help="The folder FKD of its repository.")
@click.option("--work", required=True, type=Path, help="A new folder, removed at the end.")
@click.option("--images", default=192, show_default=True)
@click.option("--views", default=4, show_default=True)
@click.option("--turns", default=5, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--out", default=None, help="JSON file for the figures.")
def main(
    fkd: Path, work: Path, images: int, views: int, turns: int, workers: int, out: str | None
) -> None:
    """Measure a teacher's pass and a student's loading, FKD's and ours."""
    torch.set_num_threads(1)
    report = new_report({"images": images, "views": views, "workers": workers}, torch.device("cpu"))
    work = work.absolute()
    work.mkdir(parents=True)  # another's folder is not removed
    try:
        generate(work / "images", images)
        config = CacheConfig(
            data=DataSettings(
                dataset=f"folder:{work / 'images' / 'train'}",
                test="none",
                no_labels=True,
                feeding="stream",
                image_size=SIZE,
                workers=workers,
            ),
            teacher=TeacherSettings(architecture="benchmarks.fkd:Thousand"),
            views=views,
            augment="resized-crop-flip",
            encoding="topk:k=5",
            batch_size=BATCH,
            device="cpu",
        )
        job = prepare(config)
        cache_teacher(job, work / "ours.zarr")
        cache = LogitCache.open(work / "ours.zarr", writable=True)
        theirs, every = Theirs(fkd, job, work, views, workers), torch.arange(images)
        boxes = boxes_of(job, views)
        theirs.write_labels(
            torch.stack([cache.read_view(v).rows(every) for v in range(views)]), boxes
        )
        apart = difference(job, theirs, boxes)
        report.add(Figure(name="mean difference of pixels, of 255", value=apart, unit="levels"))
        for name, ours, other in (
            ("teacher's pass", our_teacher_pass(job, cache), theirs.teacher_pass()),
            ("student's loading", our_student_epoch(job, cache, views), theirs.student_epoch()),
        ):
            for each in (ours, other):
                each()  # workers start
            report.add(alternately(f"{name}, {views} views / FKD's", ours, other, turns))
    finally:
        shutil.rmtree(work)
    title = f"{images} JPEGs, {views} views of {SIZE}, {workers} workers"
    show_report(Console(), title, report, out)


if __name__ == "__main__":
    main()
