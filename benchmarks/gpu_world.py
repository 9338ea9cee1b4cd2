"""What a GPU is measured on: noise of CIFAR's shape, a cache of it, models with random weights."""

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.measure import Figure
from benchmarks.parts import Measured, Where
from benchmarks.synthetic import noise_splits
from benchmarks.training import Bench
from stages.cache_teacher import cache_teacher
from stages.data import Splits
from stages.inputs.models import build_model
from stages.settings import (
    CacheConfig,
    DataSettings,
    Dtype,
    ModelSettings,
    StudentConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.teacher.job import CacheJob, prepare

TEACHER = "resnet32x4"
LARGE = {"resnet50": 256, "vit_b_16": 256}
"""Teachers of 224 pixels, and their batch."""
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Effort:
    """turns of every comparison, and the seconds beyond which an epoch is cut short."""

    turns: int = 3
    seconds: float = 1.0


def untrained(name: str, classes: int, side: int) -> nn.Module:
    """A model with random weights, always the same; its batch norms have seen noise."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = build_model(name, classes, 3).module.train()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None  # a mean over all batches: of the only one
        module(torch.randn(8, 3, side, side))
    return module.eval()


def teacher_weights(where: Where, name: str, classes: int, side: int) -> Path:
    file = where.folder / f"{name}.safetensors"
    if not file.exists():
        state = untrained(name, classes, side).state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    return file


def model_of(where: Where, name: str) -> str:
    """The model itself; a small one in a rehearsal."""
    if not where.quick:
        return name
    return "resnet18" if name in LARGE else "resnet8"


def dtype_of(where: Where) -> Dtype:
    """bfloat16; float32 in a rehearsal, as many CPUs are slow at the former."""
    return "float32" if where.quick else "bfloat16"


def effort_of(where: Where, effort: Effort) -> Effort:
    return Effort(1, 0.01) if where.quick else effort


@dataclass(frozen=True)
class World:
    """Images, a cache of their views, and stage one's job with its teacher loaded."""

    where: Where
    splits: Splits
    job: CacheJob

    @property
    def cache(self) -> Path:
        return self.where.folder / "cache.zarr"

    def student(self, name: str, batch: int) -> StudentConfig:
        return StudentConfig(
            cache=str(self.cache),
            data=self.job.config.data,
            model=ModelSettings(architecture=model_of(self.where, name), mean=_MEAN, std=_STD),
            train=TrainSettings(
                batch_size=16 if self.where.quick else batch, dtype=dtype_of(self.where)
            ),
            device=self.where.device,
        )

    def bench(self, effort: Effort) -> Bench:
        return Bench(fresh(self.where.folder), self.splits, effort.turns, effort.seconds)


def fresh(folder: Path) -> Path:
    """A new folder in this one."""
    path = next(p for n in itertools.count() if not (p := folder / f"bench-{n}").exists())
    path.mkdir()
    return path


@cache
def world(where: Where) -> World:
    """Made by the first part that needs it, and found by a later process."""
    splits = noise_splits(64 if where.quick else 50_000, 32, 100)
    job = prepare(caching(where, TEACHER, 32, 100, 512, views=3), splits)
    cache_teacher(job, where.folder / "cache.zarr")
    return World(where, splits, job)


def caching(
    where: Where, name: str, side: int, classes: int, batch: int, views: int
) -> CacheConfig:
    name = model_of(where, name)
    return CacheConfig(
        data=DataSettings(dataset="synthetic"),
        teacher=TeacherSettings(
            weights=str(teacher_weights(where, name, classes, side)),
            architecture=name,
            mean=_MEAN,
            std=_STD,
        ),
        views=views,
        batch_size=16 if where.quick else batch,
        dtype=dtype_of(where),
        device=where.device,
    )


class Memory:
    """The most memory that a part takes on a GPU beyond what it held before."""

    def __init__(self, where: Where) -> None:
        self._on_gpu, self._before = where.on_gpu, 0
        if where.on_gpu:
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> Measured:
        if not self._on_gpu:
            return []
        gib = (torch.cuda.max_memory_allocated() - self._before) / 2**30
        return [Figure(name="peak memory of all that were compared", value=gib, unit="GiB")]
