"""How fast a GPU is at what this project does: bounded parts, the most important first.

    python -m benchmarks.gpu

Models have random weights and images are noise, as speed depends on neither. The teacher of the
students' cache is a resnet32x4 on 50,000 images of CIFAR's shape; two teachers of 224 pixels have
images of their own. Where there is CUDA, captured steps are measured as well.
"""

from collections.abc import Callable
from functools import partial

import msgspec

from benchmarks.gpu_world import (
    LARGE,
    TEACHER,
    Effort,
    Memory,
    caching,
    dtype_of,
    effort_of,
    fresh,
    world,
)
from benchmarks.measure import Figure, Ratio, in_turns
from benchmarks.own_cache import named
from benchmarks.parts import Found, Measured, Part, SkippedError, Where
from benchmarks.reading import hashing_ratio
from benchmarks.synthetic import noise_splits
from benchmarks.teacher import teacher_figures
from benchmarks.training import speed, student_figures
from stages.cache import LogitCache
from stages.settings import SeedSettings, StudentConfig
from stages.targets.chunks import slab_bytes

STUDENT = "resnet8x4"
STUDENTS, BATCHES = (STUDENT, "resnet20", "resnet9_w8"), (64, 128, 512)
TOGETHER = 8
GPU_PASS_TARGET = 1.03
FULL, LESS = Effort(), Effort(2, 0.5)
_WHOLE = 30.0
"""Seconds of an epoch that is never cut."""


def small_teacher(where: Where) -> Found:
    here, effort = world(where), effort_of(where, FULL)
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
    config = caching(where, name, side, 1000, LARGE[name], views=1)
    turns = effort_of(where, FULL).turns
    found = teacher_figures(config, splits, fresh(where.folder), turns, target=GPU_PASS_TARGET)
    return "", named(f"{name}, 224 px", found)


def teacher_training(where: Where, batch: int) -> Found:
    """What training the teacher of results/cifar100/gpu is reckoned from."""
    here, effort = world(where), effort_of(where, FULL)
    bench, config = here.bench(effort), here.student(TEACHER, batch)
    hard = bench.hard(config)
    works = {"": hard}
    if where.on_gpu:
        works["captured, "] = bench.hard(_with(config, capture=True), hard)
    times, note = in_turns(works, effort.turns), f"{hard.shown}, {dtype_of(where)}"
    return "", named(
        f"{TEACHER}, batch {batch}",
        [speed(f"{way}trained on hard labels", hard, times[way], note) for way in works],
    )


def steps(where: Where, name: str, batch: int, effort: Effort = LESS) -> Found:
    """Epochs from the cache, with hard labels and beside the teacher; captured where that is."""
    here, effort = world(where), effort_of(where, effort)
    config, memory = here.student(name, batch), Memory(where)
    variants, note = {}, "without captured steps: they need CUDA"
    if where.on_gpu:
        variants["captured"], note = _with(config, capture=True), ""
    found = student_figures(here.bench(effort), config, here.job, variants)
    return note, named(f"{name}, batch {batch}", [*found, *memory.peak()])


def together(where: Where, batch: int) -> Found:
    """Students of one stream against as many epochs of one."""
    here, effort = world(where), effort_of(where, FULL)
    bench, config = here.bench(effort), here.student(STUDENT, batch)
    count, ways = 2 if where.quick else TOGETHER, {"": config}
    if where.on_gpu:
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
                note=dtype_of(where),
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
    effort = Effort(effort_of(where, FULL).turns, _WHOLE)
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
                note=f"{hard.shown}, {dtype_of(where)}",
            ),
            Figure(name="waiting, each slab read anew", value=works["read"].waiting, unit=""),
            Figure(name="targets of 162 views", value=gib, unit="GiB"),
        ],
    )


def precision(where: Where, batch: int) -> Found:
    """A student's cached epoch in bfloat16 against float32."""
    here, effort = world(where), effort_of(where, LESS)
    bench, config = here.bench(effort), here.student(STUDENT, batch)
    plain, half = _with(config, dtype="float32"), _with(config, dtype="bfloat16")
    hard = bench.hard(plain)
    works = {"plain": bench.cached(plain, hard), "half": bench.cached(half, hard)}
    times = in_turns(works, effort.turns)
    ratio = Ratio(
        name="bfloat16 epoch / float32 epoch",
        ours=times["half"],
        yardstick=times["plain"],
        note=hard.shown,
    )
    return "", named(f"{STUDENT}, batch {batch}", [ratio])


def compiled(where: Where, batch: int) -> Found:
    """Compiled epochs against eager ones; where steps can be captured, captured ones as well, and
    both against hard labels in the same way.
    """
    if where.quick and not where.on_gpu:
        raise SkippedError("compiling takes minutes on a CPU")
    here, effort = world(where), effort_of(where, LESS)
    bench, config = here.bench(effort), here.student(STUDENT, batch)
    ways = {"compiled": _with(config, compile=True)}
    if where.on_gpu:
        ways["compiled and captured"] = _with(config, compile=True, capture=True)
    found = student_figures(bench, config, None, ways)
    return "", named(f"{STUDENT}, batch {batch}", found[-4 * len(ways) :])


def reading(where: Where) -> Found:
    """What a slab costs that every byte is compared with its record."""
    cache = LogitCache.open(world(where).cache)
    return "", named(f"{len(cache.labels):,} rows", [hashing_ratio(cache, FULL.turns)])


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
    Part("precision", 30, partial(precision, batch=128)),
    *(_steps(name, batch) for name in STUDENTS[1:] for batch in BATCHES),
    Part("reading", 20, reading),
    Part("compiled", 180, partial(compiled, batch=64)),
)
"""In the order of what is wanted most."""
REHEARSED = tuple(part for part in RATES if not part.name.endswith(("batch 128", "batch 512")))
"""What a rehearsal runs: a student with one size of batch."""
