"""The figures that need more than a cache: baselines, views, a sweep, the command line."""

import collections
import importlib
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch
import yaml

from benchmarks.baselines import (
    Baseline,
    FilePerSample,
    PicklePerImage,
    RecordsBySeek,
    augmented_one_by_one,
    rectified_row_by_row,
)
from benchmarks.excerpt import excerpt
from benchmarks.measure import (
    Figure,
    Ratio,
    alternately,
    in_turns,
    seconds,
    steadily,
)
from benchmarks.reading import (
    decoded_view,
    random_order,
    reading_figures,
    rows_per_second,
)
from benchmarks.rectifying import rectify_figures
from benchmarks.teacher import FIXED
from benchmarks.worlds import World
from pipeline.console import Console
from pipeline.sweep.cluster import local_cluster
from pipeline.sweep.run import run_sweep
from stages.cache import LogitCache
from stages.cache.encoding import ENCODINGS
from stages.rectify import rectify
from stages.reporting import Silent
from stages.settings import RectifyConfig, SeedSettings, StudentConfig
from stages.train_student import train_student, train_together

Figures = list[Ratio | Figure]

_LOOPED_ROWS = 2_000
_IN_FILES = 10_000
"""Rows that the simple stores have: a file for each takes a while to write."""
_AUGMENTED = 2_000
HELP_TARGET = 0.3


def reading(source: LogitCache, folder: Path, turns: int, device: torch.device) -> Figures:
    """A slab in every encoding against the raw array, three simple stores, and copying."""
    first = source.encoding.name  # the one that stage one chose comes first
    names = [first, *(name for name in ENCODINGS if name != first)]
    caches = [excerpt(source, folder / f"{name}.zarr", 1, name) for name in names]
    logits = decoded_view(source)
    some = logits[:_IN_FILES]
    order = random_order(len(some))
    baselines: dict[str, Baseline] = {
        "one pickle per image (FKD's way)": PicklePerImage.write(some, folder),
        "fixed-size records by seek (TinyViT's way)": RecordsBySeek.write(some, folder),
        "one file per sample (torchdistill's way)": FilePerSample.write(some, folder),
    }

    def every_row(baseline: Baseline) -> Callable[[], float]:
        timed = steadily(
            lambda: collections.deque((b.to(device) for b in baseline.batches(order)), 0), device
        )
        return lambda: timed() * len(logits) / len(some)

    others = {name: every_row(baseline) for name, baseline in baselines.items()}
    note = f"the store has {len(some):,} of the rows, scaled"
    return reading_figures(caches, folder, turns, device, others, note)


def rectifying(source: LogitCache, folder: Path, turns: int) -> Figures:
    """Stage two against a plain pass, and against a loop over rows."""
    figures = rectify_figures(source, folder, turns, views=source.num_views)
    one = excerpt(source, folder / "looped.zarr", 1)
    block, config = one.read_block(0, 0), RectifyConfig()
    looped = min(_LOOPED_ROWS, len(block.labels))
    runs = itertools.count()

    def ours() -> float:
        named = msgspec.structs.replace(config, name=f"loop-{next(runs)}")
        return seconds(lambda: rectify(Path(str(one.path)), named))

    def loop() -> float:
        logits, labels = block.logits[:looped], block.labels[:looped]
        taken = seconds(lambda: rectified_row_by_row(logits, labels, config.temperature))
        return taken * one.num_samples / looped

    note = f"a view of {one.num_samples:,}; the loop on {looped:,} rows, scaled, without reading"
    name = "rectify / Python loop over rows (the released code's way)"
    return [*figures, alternately(name, ours, loop, turns, note=note)]


def rectifying_little(world: World, folder: Path, turns: int) -> Figures:
    """Stage two on a small cache, where it takes what it takes whatever there is to do."""
    (found,) = rectify_figures(world.cache, folder, turns, target=None)
    return [msgspec.structs.replace(found, note=f"{found.note}; {FIXED}")]


def views(world: World, turns: int) -> Figures:
    """Batched cropping against torchvision's transforms, image by image, on the CPU."""
    train, device = world.splits.train, world.job.device
    images = train.images
    assert images is not None
    feed, every = world.job.feed(train, world.job.policy), torch.arange(len(train))
    some, pad = every[:_AUGMENTED].tolist(), int(world.job.policy.parameters.get("pad", 4))

    def one_by_one() -> object:
        with torch.random.fork_rng():
            return collections.deque(augmented_one_by_one(images, some, pad), 0)

    batched = steadily(
        lambda: collections.deque(feed.batches(every, 0, world.plan.batch_size), 0), device
    )
    singly = steadily(one_by_one)
    times = in_turns(
        {"batched": batched, "singly": lambda: singly() * len(every) / len(some)}, turns
    )
    note = f"{len(every):,} x {'x'.join(map(str, train.shape))}, {world.job.policy.name}"
    name = "cropping whole batches / torchvision, image by image"
    return [
        Ratio(name=name, ours=times["batched"], yardstick=times["singly"], note=note),
        rows_per_second(f"views cropped on {device.type}", len(every), times["batched"]),
        rows_per_second("views by torchvision, one process", len(every), times["singly"]),
    ]


def sweep(world: World, folder: Path, turns: int, students: int, epochs: int) -> Figures:
    """Students that differ in their first weights: alone, side by side, together. Whole runs, with
    their evaluations; side by side with the processes that must start first, which is reported.
    """
    configs = [_short(world.student(world.plan.students[0], i), epochs) for i in range(students)]
    runs = itertools.count()

    def outs() -> list[Path]:
        return [folder / f"student-{next(runs)}" for _ in configs]

    def alone() -> None:
        for config, out in zip(configs, outs(), strict=True):
            train_student(config, out, splits=world.splits)

    def together() -> None:
        train_together(configs, outs(), splits=world.splits)

    def side_by_side() -> None:
        file = folder / f"sweep-{next(runs)}.yaml"
        base = {k: v for k, v in msgspec.to_builtins(configs[0]).items() if k != "seed"}
        grid = [{"seed.init": [config.seed.init for config in configs]}]
        plan = {"out": str(file.with_suffix("")), "base": base, "runs": grid, "workers": 2}
        file.write_text(yaml.safe_dump(plan))
        run_sweep(file, _Mute())

    works = {"alone": alone, "side by side": side_by_side, "together": together}
    times = in_turns({name: partial(seconds, work) for name, work in works.items()}, turns)
    note = f"{world.plan.students[0]}, {epochs} epochs each, {world.plan.name}"
    starting = statistics.median(in_turns({"start": _starting}, turns)["start"])
    return [
        Figure(
            name="2 workers, until they are ready",
            value=starting,
            unit="s",
            note="Dask's processes, torch and the stages imported; once a sweep",
        ),
        *(
            Ratio(
                name=f"{students} students {how} / one after another",
                ours=times[which],
                yardstick=times["alone"],
                note=note,
            )
            for which, how in (("side by side", "on 2 workers"), ("together", "together"))
        ),
    ]


def _starting() -> float:
    """Seconds until a sweep's two processes could begin with their first student."""

    def start() -> None:
        with local_cluster(2) as client:
            client.run(importlib.import_module, "stages.train_student")

    return seconds(start)


def _short(config: StudentConfig, epochs: int) -> StudentConfig:
    replace = msgspec.structs.replace
    return replace(
        config,
        train=replace(config.train, epochs=epochs),
        seed=SeedSettings(init=config.seed.init),
    )


class _Mute(Silent, Console):
    """A console that says nothing."""


def answering(turns: int) -> Figures:
    """`pipeline --help` against a bare interpreter."""

    def run(*arguments: str) -> float:
        command = [sys.executable, *arguments]
        return seconds(lambda: subprocess.run(command, capture_output=True, check=True))

    ratio = alternately(
        "pipeline --help / python -c pass",
        lambda: run("-m", "pipeline", "--help"),
        lambda: run("-c", "pass"),
        max(5, turns),
    )
    taken = statistics.median(ratio.ours)
    return [ratio, Figure(name="pipeline --help", value=taken, unit="s", target=HELP_TARGET)]
