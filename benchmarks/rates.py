"""How fast a GPU is at what this project does: bounded parts, the most important first.

    python -m benchmarks.gpu

Models have random weights and images are noise, as speed depends on neither. The teacher of the
students' cache is a resnet32x4 on 50,000 images of CIFAR's shape; two teachers of 224 pixels have
images of their own. Where a student has `--capture` its captured steps are measured as well.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.measure import Figure, Ratio, in_turns
from benchmarks.own_cache import named
from benchmarks.parts import Found, Measured, Part, SkippedError, Where
from benchmarks.synthetic import noise_splits
from benchmarks.teacher import teacher_figures
from benchmarks.training import Bench, speed, student_figures
from stages.cache import LogitCache
from stages.cache_job import CacheJob, prepare
from stages.cache_teacher import cache_teacher
from stages.data import Splits
from stages.inputs.models import build_model
from stages.settings import (
    CacheConfig,
    DataSettings,
    Dtype,
    ModelSettings,
    SeedSettings,
    StudentConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.targets.chunks import slab_bytes

TEACHER, STUDENT = "resnet32x4", "resnet8x4"
STUDENTS, BATCHES = (STUDENT, "resnet20", "resnet9_w8"), (64, 128, 512)
LARGE = {"resnet50": 256, "vit_b_16": 256}
"""Teachers of 224 pixels, and their batch."""
TOGETHER = 8
GPU_PASS_TARGET = 1.03
CAPTURE = "capture" in TrainSettings.__struct_fields__
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_WHOLE = 30.0
"""Seconds of an epoch that is never cut."""


@dataclass(frozen=True)
class Effort:
    """turns of every comparison, and the seconds beyond which an epoch is cut short."""

    turns: int = 3
    seconds: float = 1.0


FULL, LESS = Effort(), Effort(2, 0.5)


# ---- what is measured on ----------------------------------------------------------------------


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


def _model(where: Where, name: str) -> str:
    """The model itself; a small one in a rehearsal."""
    if not where.quick:
        return name
    return "resnet18" if name in LARGE else "resnet8"


def _dtype(where: Where) -> Dtype:
    """bfloat16; float32 in a rehearsal, as many CPUs are slow at the former."""
    return "float32" if where.quick else "bfloat16"


def _effort(where: Where, effort: Effort) -> Effort:
    return Effort(1, 0.01) if where.quick else effort


@dataclass(frozen=True)
class World:
    """Images, a cache of their views, and stage one's job with its teacher loaded."""

    where: Where
    splits: Splits
    job: CacheJob

    def student(self, name: str, batch: int) -> StudentConfig:
        return StudentConfig(
            cache=str(self.where.folder / "cache.zarr"),
            data=self.job.config.data,
            model=ModelSettings(architecture=_model(self.where, name), mean=_MEAN, std=_STD),
            train=TrainSettings(
                batch_size=16 if self.where.quick else batch, dtype=_dtype(self.where)
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
    job = prepare(_caching(where, TEACHER, 32, 100, 512, views=3), splits)
    cache_teacher(job, where.folder / "cache.zarr")
    return World(where, splits, job)


def _caching(
    where: Where, name: str, side: int, classes: int, batch: int, views: int
) -> CacheConfig:
    name = _model(where, name)
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
        dtype=_dtype(where),
        device=where.device,
    )


# ---- parts ------------------------------------------------------------------------------------


def small_teacher(where: Where) -> Found:
    here, effort = world(where), _effort(where, FULL)
    config = here.job.config
    return "", named(
        f"{TEACHER}, 32 px",
        teacher_figures(
            config,
            here.splits,
            fresh(where.folder),
            effort.turns,
            target=GPU_PASS_TARGET,
        ),
    )


def large_teacher(where: Where, name: str) -> Found:
    samples, side = (8, 32) if where.quick else (4_096, 224)
    splits = noise_splits(samples, side, 1000)
    config = _caching(where, name, side, 1000, LARGE[name], views=1)
    turns = _effort(where, FULL).turns
    found = teacher_figures(config, splits, fresh(where.folder), turns, target=GPU_PASS_TARGET)
    return "", named(f"{name}, 224 px", found)


def teacher_training(where: Where, batch: int) -> Found:
    """What training the teacher of results/cifar100/gpu is reckoned from."""
    here, effort = world(where), _effort(where, FULL)
    bench, config = here.bench(effort), here.student(TEACHER, batch)
    hard = bench.hard(config)
    works = {"": hard}
    if CAPTURE and where.on_gpu:
        works["captured, "] = bench.hard(_with(config, capture=True), hard)
    times, note = in_turns(works, effort.turns), f"{hard.shown}, {_dtype(where)}"
    return "", named(
        f"{TEACHER}, batch {batch}",
        [speed(f"{way}trained on hard labels", hard, times[way], note) for way in works],
    )


def steps(where: Where, name: str, batch: int, effort: Effort = LESS) -> Found:
    """Epochs from the cache, with hard labels and beside the teacher; captured where that is."""
    here, effort = world(where), _effort(where, effort)
    config, memory = here.student(name, batch), Memory(where)
    variants, told = {}, "without captured steps: there is no train.capture"
    if CAPTURE and where.on_gpu:
        variants["captured"], told = _with(config, capture=True), ""
    elif CAPTURE:
        told = "without captured steps: they need CUDA"
    found = student_figures(here.bench(effort), config, here.job, variants)
    return told, named(f"{name}, batch {batch}", [*found, *memory.peak()])


def together(where: Where, batch: int) -> Found:
    """Students of one stream against as many epochs of one."""
    here, effort = world(where), _effort(where, FULL)
    bench, config = here.bench(effort), here.student(STUDENT, batch)
    count, ways = 2 if where.quick else TOGETHER, {"": config}
    if CAPTURE and where.on_gpu:
        ways["captured "] = _with(config, capture=True)
    works: dict[str, Callable[[], float]] = {}
    memory = Memory(where)
    for way, each in ways.items():
        seeds = (SeedSettings(init=init) for init in range(count))
        group = [msgspec.structs.replace(each, seed=seed) for seed in seeds]
        works[f"{way}alone"] = bench.cached(each, bench.hard(each))
        works[f"{way}together"] = bench.together(group)
    times = in_turns(works, effort.turns)
    found: Measured = []
    for way in ways:
        ours = times[f"{way}together"]
        found.append(
            Ratio(
                name=f"{count} {way}students together / as many epochs alone",
                ours=ours,
                yardstick=tuple(count * taken for taken in times[f"{way}alone"]),
                target=1 / 3,
                note=_dtype(where),
            )
        )
        images = count * len(here.splits.train)
        found.append(
            Figure(
                name=f"{count} {way}students together, training images of all",
                value=images / sorted(ours)[len(ours) // 2],
                unit="images/s",
            )
        )
    return "", named(f"{STUDENT}, batch {batch}", [*found, *memory.peak()])


def slabs(where: Where, batch: int) -> Found:
    """Targets of all views kept on the device, against each view read again; whole epochs."""
    here = world(where)
    effort = Effort(_effort(where, FULL).turns, _WHOLE)
    bench, config = here.bench(effort), here.student(STUDENT, batch)
    cache, samples = LogitCache.open(config.cache), len(here.splits.train)
    two = str(slab_bytes([cache], samples, 2))
    hard = bench.hard(config)
    works = {
        "kept": bench.cached(config, hard),
        "read": bench.cached(msgspec.structs.replace(config, slab_memory=two), hard),
    }
    times = in_turns(works, effort.turns)
    gib = slab_bytes([cache], samples, 162) / 2**30
    return "", named(
        f"{STUDENT}, batch {batch}",
        [
            Ratio(
                name="epoch with all slabs resident / with each read anew",
                ours=times["kept"],
                yardstick=times["read"],
                note=f"{hard.shown}, {_dtype(where)}",
            ),
            Figure(name="waiting, each slab read anew", value=works["read"].waiting, unit=""),
            Figure(name="targets of 162 views", value=gib, unit="GiB"),
        ],
    )


def against(where: Where, what: str, batch: int) -> Found:
    """A student's cached epoch, changed in one setting, against the same without."""
    here, effort = world(where), _effort(where, LESS)
    bench, config = here.bench(effort), here.student(STUDENT, batch)
    if what == "compiled" and where.quick and not where.on_gpu:
        raise SkippedError("compiling takes minutes on a CPU")
    plain, changed = {
        "compiled": (config, _with(config, compile=True)),
        "bfloat16": (_with(config, dtype="float32"), _with(config, dtype="bfloat16")),
    }[what]
    hard = bench.hard(plain)
    works = {"plain": bench.cached(plain, hard), what: bench.cached(changed, hard)}
    times = in_turns(works, effort.turns)
    other = "eager" if what == "compiled" else "float32"
    ratio = Ratio(
        name=f"{what} epoch / {other} epoch",
        ours=times[what],
        yardstick=times["plain"],
        note=hard.shown,
    )
    return "", named(f"{STUDENT}, batch {batch}", [ratio])


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


def _with(config: StudentConfig, **train: object) -> StudentConfig:
    changed = msgspec.structs.replace(config.train, **train)
    return msgspec.structs.replace(config, train=changed)


def _steps(name: str, batch: int, limit: float = 45, effort: Effort = LESS) -> Part:
    run = partial(steps, name=name, batch=batch, effort=effort)
    return Part(f"{name}, batch {batch}", limit, run)


RATES = (
    Part(f"stage one, {TEACHER}", 60, small_teacher),
    _steps(STUDENT, 64, 60, FULL),
    _steps(STUDENT, 512, 60, FULL),
    Part(f"training {TEACHER}", 30, partial(teacher_training, batch=128)),
    Part(f"{TOGETHER} students together", 90, partial(together, batch=128)),
    _steps(STUDENT, 128),
    Part("resident slabs", 40, partial(slabs, batch=512)),
    *(Part(f"stage one, {name}", 60, partial(large_teacher, name=name)) for name in LARGE),
    Part("precision", 30, partial(against, what="bfloat16", batch=128)),
    *(_steps(name, batch) for name in STUDENTS[1:] for batch in BATCHES),
    Part("compiled", 120, partial(against, what="compiled", batch=64)),
)
"""In the order of what is wanted most."""
REHEARSED = tuple(part for part in RATES if not part.name.endswith(("batch 128", "batch 512")))
"""What a rehearsal runs: a student with one size of batch."""
