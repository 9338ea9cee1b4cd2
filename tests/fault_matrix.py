"""What lies in a cache and in a run, what can happen to it, and who reads it: the fault matrix.

A cell is one object, one harm and one reader. Its outcome is `detected` (a PipelineError, a fault
of verify), `harmless` (what the reader gives is, byte for byte, what it gives of what is intact) or
`mended` (repair: every byte is as it was). Anything else is a failure, and is described.
"""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from damage import everything, flipped, tree
from helpers import metrics, resized, student_of
from safetensors.torch import save

from pipeline.report import write_report
from stages.cache import LogitCache
from stages.cache.records import seal_records
from stages.cache_teacher import CacheJob, cache_teacher
from stages.data import Splits
from stages.errors import PipelineError
from stages.evaluate import evaluate_run
from stages.inputs.models import load_model
from stages.rectify import rectify
from stages.repair import repair
from stages.settings import (
    BiasSettings,
    LossSettings,
    ModelSettings,
    RectifyConfig,
    SeedSettings,
    StudentConfig,
    TrainSettings,
)
from stages.train_student import train_student
from stages.training.run_directory import RunDirectory
from stages.verify import verify

NAME = "pairwise-T4"
EPOCHS = 3
Tree = Mapping[str, bytes]


# ---- what is intact -------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A cache of some views with a rectification, and runs of a student of it.

    trees: `cache`, its records of view 1 a file a block; `before`, with one view less; `mended`,
    with all records compacted, as repair leaves it; `other`, of another view seed; `finished`, a
    run of three epochs; `half` and `early`, after two and one; `another`, of other first weights;
    `another-half`, that one after two.
    """

    home: Path
    job: CacheJob
    trees: Mapping[str, Tree]
    views: int

    @property
    def config(self) -> StudentConfig:
        return student(self.home / "cache", 0, EPOCHS)


def make_world(job: CacheJob, home: Path, encoding: str = "klt", views: int = 2) -> World:
    """60 samples in two blocks. job: any of the digits; its teacher is taken."""
    trees: dict[str, Tree] = {}

    def tiny(views: int, seed: int = 0) -> CacheJob:
        changes = {"block_rows": 30, "encoding": encoding, "views": views, "seed": seed}
        return resized(job, 60, 20, **changes)

    for name, seed in (("cache", 0), ("other", 1)):
        path = home / name
        for number in (views - 1, views):
            cache_teacher(tiny(number, seed), path)
            rectify(path, RectifyConfig())
            if name == "cache":
                trees["before" if number < views else "mended"] = tree(path)
        _loosen(path)
        trees[name] = tree(path)
    mine = tiny(views - 1)
    for names, seed in (
        (("early", "half", "finished"), 0),
        (("another-early", "another-half", "another"), 1),
    ):
        config = student(home / "cache", seed, EPOCHS)
        trees |= zip(names, _snapshots(config, home / "run", mine.splits), strict=True)
        shutil.rmtree(home / "run")
    return World(home, mine, trees, views)


def _loosen(path: Path) -> None:
    """The records of view 1, a file a block, as they are while it is written."""
    cache = LogitCache.open(path)
    for log in (cache.commits, cache.rectification(NAME).commits):
        folder = path / "commits" / log.part
        for block, record in log.of_view(1).items():
            file = folder / f"v00001/b{block:05d}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(seal_records([record]))
        (folder / "v00001.json").unlink()


def student(cache: Path, seed: int, epochs: int) -> StudentConfig:
    return student_of(
        cache,
        model=ModelSettings(architecture="resnet8"),
        train=TrainSettings(epochs=epochs, batch_size=20),
        loss=LossSettings(name="kd"),
        bias=BiasSettings(mode="rectify"),
        seed=SeedSettings(init=seed),
    )


def _snapshots(config: StudentConfig, out: Path, splits: Splits) -> list[Tree]:
    """The run directory after the checkpoint of each epoch, the last once it has finished."""
    found: list[Tree] = []
    save_checkpoint = RunDirectory.save_checkpoint

    def saved(run: RunDirectory, state: Mapping[str, Any]) -> None:
        save_checkpoint(run, state)
        found.append(tree(out))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", saved)
        train_student(config, out, splits=splits)
    return [*found[: EPOCHS - 1], tree(out)]


def write(content: Tree, path: Path) -> Path:
    """A folder with these files and no others."""
    shutil.rmtree(path, ignore_errors=True)
    for key, some in content.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(some)
    return path


# ---- harms ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where harms take contents from: the same things earlier, and other ones of their kind."""

    intact: Tree
    stale: Tree
    other: Tree


def alike(key: str, keys: list[str]) -> str:
    """Another object of the same kind: the same array or file with another number, if there is one,
    else the next in the same role.
    """

    def kind(name: str) -> str:
        return re.sub(r"(?<=[/vb])\d+(?=[/.]|$)", "#", name)

    def role(name: str) -> str:
        return Path(name).name if name.endswith((".json", ".pt")) else "values"

    others = [k for k in keys if k != key]
    same = [k for k in others if kind(k) == kind(key)]
    return [*same, *(k for k in others if role(k) == role(key)), *others][0]


Harm = Callable[[Source, str, random.Random], dict[str, bytes | None]]
"""What becomes of some objects: key -> content, None where it is deleted."""


def _changed(change: Callable[[bytes, random.Random], bytes]) -> Harm:
    def harm(source: Source, key: str, draw: random.Random) -> dict[str, bytes | None]:
        content = source.intact[key]
        return {key: change(content, draw) if content else content}

    return harm


def _swapped(source: Source, key: str, draw: random.Random) -> dict[str, bytes | None]:
    other = alike(key, sorted(source.intact))
    return {key: source.intact[other], other: source.intact[key]}


HARMS: dict[str, Harm] = {
    "bit": _changed(lambda c, d: flipped(c, d.randrange(len(c)), 1 << d.randrange(8))),
    "byte": _changed(lambda c, d: flipped(c, d.randrange(len(c)), d.randrange(1, 256))),
    "cut": _changed(lambda c, d: c[: d.randrange(len(c))]),
    "emptied": lambda s, key, d: {key: b""},
    "deleted": lambda s, key, d: {key: None},
    "swapped": _swapped,
    "stale": lambda s, key, d: {key: s.stale.get(key)},
    "of-another": lambda s, key, d: {key: s.other[key]} if key in s.other else {},
}


def harmed(source: Source, key: str, how: str) -> Tree | None:
    """Everything, with one harm; None where that changes nothing."""
    draw = random.Random(f"{how} {key}")
    after: dict[str, bytes | None] = {**source.intact, **HARMS[how](source, key, draw)}
    left = {name: content for name, content in after.items() if content is not None}
    return None if left == source.intact else left


# ---- readers --------------------------------------------------------------------------------


class ToldError(Exception):
    """Faults, as verify tells them; or that something is missing, where a reader says that."""


def digest(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(save({str(n): t.contiguous() for n, t in enumerate(tensors)})).hexdigest()


def opened(world: World, store: Path) -> object:
    cache = LogitCache.open(store)
    rectifications = [cache.rectification(name) for name in cache.rectifications]
    views = [cache.complete_views, *(r.commits.complete(world.views) for r in rectifications)]
    known = [cache.fidelity, *(r.statistics for r in rectifications)]
    if views != 2 * [[*range(world.views)]] or not all(known):
        raise ToldError("what is missing is told as missing")
    return (
        *(cache.num_views, cache.identity.digest(), cache.encoding.digest(), cache.provenance),
        *(cache.pixel_probes, cache.fidelity, cache.top1_per_view),
        digest([cache.labels, cache.dataset_index]),
        [(r.name, r.settings, r.statistics, r.commits.views) for r in rectifications],
    )


def read(world: World, store: Path) -> object:
    return digest(everything(store, world.views))


def trained(world: World, store: Path) -> object:
    run = world.home / "trained"
    try:
        train_student(student(store, 0, 2), run, splits=world.job.splits)
        return _weights(run)
    finally:
        shutil.rmtree(run, ignore_errors=True)


def _weights(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def rectified(world: World, store: Path) -> object:
    statistics = rectify(store, RectifyConfig(method="swap"))
    return statistics, {k: c for k, c in tree(store).items() if "swap-T4" in k}


def verified(world: World, store: Path) -> object:
    if faults := verify(store, threads=1).faults:
        raise ToldError(faults[0].where)
    return _said(store)


def _said(store: Path) -> dict[str, object]:
    """What every object says: documents may be spelt otherwise."""
    return {k: json.loads(c) if k.endswith("zarr.json") else c for k, c in tree(store).items()}


def repaired(world: World, store: Path) -> object:
    faults = verify(store, threads=1).faults
    if not faults:
        return _said(store)
    if left := repair(store, world.job, faults).faults:
        raise ToldError(left[0].where)
    mended = tree(store) == world.trees["mended"]
    return _said(write(world.trees["cache"], store)) if mended else "other bytes"


def evaluated(world: World, store: Path) -> object:
    return _measured(write(world.trees["finished"], world.home / "evaluated"), store, world)


def _measured(run: Path, cache: Path, world: World) -> bytes:
    with pytest.MonkeyPatch.context() as patch:  # of the digits, these are the first 20
        patch.setattr("stages.evaluate.load_dataset", lambda *_, **__: world.job.splits.test)
        found = evaluate_run(run, device="cpu", caches=[str(cache)])
    if found.recorded_top1 is None:
        raise ToldError("nothing is recorded")
    return msgspec.json.encode(found)


def reported(world: World, path: Path) -> object:
    file = write_report([str(path)], str(world.home / "page.html"), overwrite=True)
    page = file.read_text()
    less = (f"{views} of {world.views}" for views in range(world.views))
    message = (*less, "is not recorded", ">?<")
    if any(words in page for words in message) or (
        (path / "commits").exists() and "top-1 on the test split" not in page
    ):
        raise ToldError("what is missing is told as missing")
    return page


Reader = Callable[[World, Path], object]
OF_A_CACHE: dict[str, Reader] = {
    "open": opened,
    "read_view": read,
    "train-student": trained,
    "rectify": rectified,
    "verify": verified,
    "repair": repaired,
    "evaluate": evaluated,
    "report": reported,
}


def resumed(world: World, run: Path) -> object:
    train_student(world.config, run, resume=True, splits=world.job.splits)
    return _weights(run), [(line["epoch"], line["loss"]) for line in metrics(run)]


def as_weights(world: World, run: Path) -> object:
    model = load_model(None, str(run), 10, 1)
    state = model.module.state_dict()
    return digest([state[name] for name in sorted(state)]), model.statistics, model.architecture


OF_A_RUN: dict[str, tuple[str, Reader]] = {
    "resume": ("half", resumed),
    "evaluate": ("finished", lambda world, run: _measured(run, world.home / "cache", world)),
    "report": ("finished", reported),
    "weights": ("finished", as_weights),
}


# ---- cells ----------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Cell:
    """what: `cache` or `run`."""

    what: str
    key: str
    harm: str
    reader: str


def source(world: World, cell: Cell) -> Source:
    trees = world.trees
    if cell.what == "cache":
        return Source(trees["cache"], trees["before"], trees["other"])
    if OF_A_RUN[cell.reader][0] == "half":
        return Source(trees["half"], trees["early"], trees["another-half"])
    return Source(trees["finished"], trees["half"], trees["another"])


def cells(world: World) -> Iterator[Cell]:
    """The whole product."""
    for key in sorted(world.trees["cache"]):
        for harm in HARMS:
            for reader in OF_A_CACHE:
                yield Cell("cache", key, harm, reader)
    for reader, (state, _) in OF_A_RUN.items():
        for key in sorted(world.trees[state]):
            for harm in HARMS:
                yield Cell("run", key, harm, reader)


class Matrix:
    """Runs cells in a world; what a reader gives of what is intact is kept."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._truths: dict[tuple[str, str], object] = {}

    def outcome(self, cell: Cell) -> str:
        """`detected`, `harmless`, `mended`, `no change`, or what is wrong."""
        after = harmed(source(self.world, cell), cell.key, cell.harm)
        if after is None:
            return "no change"
        truth = self._truth(cell)
        try:
            found = self._read(cell, after)
        except (PipelineError, ToldError):
            return "detected"
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200]
        if found != truth:
            return "silently wrong"
        return "mended" if cell.reader == "repair" else "harmless"

    def _truth(self, cell: Cell) -> object:
        where = cell.what, cell.reader
        if where not in self._truths:
            self._truths[where] = self._read(cell, source(self.world, cell).intact)
        return self._truths[where]

    def _read(self, cell: Cell, content: Tree) -> object:
        path = write(content, self.world.home / f"harmed-{cell.what}")
        reader = OF_A_CACHE[cell.reader] if cell.what == "cache" else OF_A_RUN[cell.reader][1]
        return reader(self.world, path)
