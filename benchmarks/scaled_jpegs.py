"""Photographs decoded at a part of their size (--jpeg-side) against whole ones, in stage one.

    python -m benchmarks.scaled_jpegs --work DIR      some minutes on two cores

JPEGs of several sizes are generated into DIR, which is removed at the end. The teacher is one
linear layer, so that decoding bounds the pass. Both sides of a ratio are done in turns.
"""

import shutil
from pathlib import Path

import click
import torch

from benchmarks.decoding import BATCH, SIZE, our_pass
from benchmarks.jpegs import jpeg
from benchmarks.measure import Figure, alternately, new_report, seconds
from benchmarks.table import show_report
from pipeline.console import Console
from stages.settings import CacheConfig, DataSettings, TeacherSettings
from stages.teacher.job import CacheJob, prepare
from stages.teacher.logits import TeacherPass

SIZES = ((375, 500), (900, 1200), (1500, 2000))
"""Height and width: ImageNet's, and photographs."""
SIDE = 2 * SIZE
"""What both sides keep: a crop of half a side is still as large as the view."""


def job_of(folder: Path, views: int, workers: int, side: int | None) -> CacheJob:
    """Stage one over a folder of images without labels."""
    return prepare(
        CacheConfig(
            data=DataSettings(
                dataset=f"folder:{folder}",
                test="none",
                no_labels=True,
                feeding="stream",
                image_size=SIZE,
                workers=workers,
                jpeg_side=side,
            ),
            teacher=TeacherSettings(architecture="benchmarks.fkd:Thousand"),
            views=views,
            augment="resized-crop-flip",
            batch_size=BATCH,
            device="cpu",
        )
    )


@click.command()
@click.option("--work", required=True, type=Path, help="A new folder, removed at the end.")
@click.option("--images", default=32, show_default=True)
@click.option("--views", default=8, show_default=True)
@click.option("--turns", default=5, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--out", default=None, help="JSON file for the figures.")
def main(work: Path, images: int, views: int, turns: int, workers: int, out: str | None) -> None:
    """Measure passes over one view and over several at once."""
    torch.set_num_threads(1)
    report = new_report({"images": images, "views": views, "side": SIDE}, torch.device("cpu"))
    work.mkdir(parents=True)  # another's folder is not removed
    try:
        for height, width in SIZES:
            folder, name = work / f"{width}x{height}", f"{width} x {height}"
            folder.mkdir()
            contents = [jpeg(i, height=height, width=width) for i in range(images)]
            for i, content in enumerate(contents):
                (folder / f"{i:05}.jpg").write_bytes(content)
            size = sum(map(len, contents)) / images
            report.add(Figure(name=f"bytes of a file, {name}", value=size, unit="B"))
            scaled, whole = (
                TeacherPass.of(job_of(folder, views, workers, side)) for side in (SIDE, None)
            )
            for count in (1, views):
                for teacher in (scaled, whole):
                    our_pass(teacher, count, count)  # workers start
                report.add(
                    alternately(
                        f"{name}, views at once: {count}; scaled / whole",
                        lambda n=count, t=scaled: seconds(lambda: our_pass(t, n, n)),  # type: ignore[misc]
                        lambda n=count, t=whole: seconds(lambda: our_pass(t, n, n)),  # type: ignore[misc]
                        turns,
                    )
                )
            scaled.feed.close()
            whole.feed.close()
    finally:
        shutil.rmtree(work)
    show_report(Console(), f"{images} JPEGs of each size, views of {SIZE}", report, out)


if __name__ == "__main__":
    main()
