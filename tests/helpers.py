"""Plain functions that several files of tests share."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.cache_teacher import CacheJob, prepare
from stages.data import Splits
from stages.inputs.datasets import ImageDataset
from stages.inputs.probes import pixel_probes
from stages.settings import DataSettings
from stages.training.run_directory import RunDirectory

SHARED_DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Data that is too large for the repository; tests that use it are skipped where it is missing."""
DIGITS = DataSettings(dataset="digits", workers=0)
RUN_FILES = {
    "config.yaml",
    "last.pt",
    "log.txt",
    "metrics.jsonl",
    "model.safetensors",
    "summary.json",
}


class Words:
    """A reporter that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[float] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, task: str, done: float, total: float, unit: str) -> None:
        self.done.append(done / total)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> None: ...


def first(dataset: ImageDataset, size: int) -> ImageDataset:
    """The first `size` images of a dataset that is held in memory."""
    assert dataset.images is not None
    images, labels = dataset.images[:size], dataset.labels[:size]
    return dataclasses.replace(dataset, labels=labels, images=images, load=images.__getitem__)


def resized(job: CacheJob, train: int, test: int, **changes: Any) -> CacheJob:
    """The same teacher's job over the first samples. changes: of its configuration."""
    splits = Splits(first(job.splits.train, train), first(job.splits.test, test))
    return prepare(msgspec.structs.replace(job.config, **changes), splits)


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's epochs, as metrics.jsonl has them."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    """What a run keeps in model.safetensors."""
    found: dict[str, Tensor] = load_file(run / "model.safetensors")
    return found


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same bits."""
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def prepared(path: Path, config: Mapping[str, Any], **ways: bool) -> RunDirectory:
    """A run directory that is held. ways: resume or overwrite."""
    run = RunDirectory(path, **ways)
    run.prepare(config)
    return run


@contextlib.contextmanager
def without_probes() -> Iterator[None]:
    """Students do not compare pixels with the teacher's: a large part of short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.data.pixel_probes", lambda *_: [])
        patch.setattr("stages.data.zip_longest", lambda *_: ())
        yield


@contextlib.contextmanager
def remembered_probes() -> Iterator[None]:
    """Pixel probes are pure and half the time of short runs: once a dataset and size is enough."""
    known: list[tuple[ImageDataset, int | None, list[int]]] = []

    def remembered(dataset: ImageDataset, policy: Any, image_size: int | None = None) -> list[int]:
        for before, size, probes in known:
            if before is dataset and size == image_size:
                return probes
        known.append((dataset, image_size, pixel_probes(dataset, policy, image_size)))
        return known[-1][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.data.pixel_probes", remembered)
        yield
