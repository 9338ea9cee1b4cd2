"""What only a GPU shows: compiled students, precisions, resident slabs, students together."""

from collections.abc import Callable

import msgspec

from benchmarks.cases import Figures
from benchmarks.worlds import World
from pipeline.bench.measure import Ratio, in_turns
from pipeline.bench.training import Bench
from stages.training.budget import slab_bytes
from stages.training.config import TrainSettings

TOGETHER = 8
ROWS = (
    "compiled epoch / eager epoch",
    "bfloat16 epoch / float32 epoch",
    "epoch with all slabs resident / with each read anew",
    f"{TOGETHER} students together / {TOGETHER} epochs alone",
)
CAN_COMPILE = "compile" in TrainSettings.__struct_fields__


def accelerator_figures(world: World, bench: Bench) -> Figures:
    """All of them for a world's first student, in the same turns."""
    replace = msgspec.structs.replace
    config = world.student(world.plan.students[0])
    two_slabs = 2 * slab_bytes([world.cache], len(world.splits.train))
    works: dict[str, Callable[[], float]] = {
        "plain": bench.student(config),
        "float32": bench.student(replace(config, train=replace(config.train, dtype="float32"))),
        "bfloat16": bench.student(replace(config, train=replace(config.train, dtype="bfloat16"))),
        "read anew": bench.student(replace(config, slab_memory=str(two_slabs))),
    }
    group = [world.student(config.model.architecture, init) for init in range(TOGETHER)]
    works["together"] = bench.together(group)
    if CAN_COMPILE:
        compiled = msgspec.convert(
            {**msgspec.to_builtins(config.train), "compile": True}, TrainSettings
        )
        works["compiled"] = bench.student(replace(config, train=compiled))
    times = in_turns(works, bench.turns)
    alone = tuple(TOGETHER * taken for taken in times["plain"])
    pairs = {
        ROWS[0]: (times.get("compiled"), times["plain"]),
        ROWS[1]: (times["bfloat16"], times["float32"]),
        ROWS[2]: (times["plain"], times["read anew"]),
        ROWS[3]: (times["together"], alone),
    }
    note = f"{config.model.architecture}, {config.train.dtype}, {world.plan.name}"
    return [
        Ratio(name=name, ours=ours, yardstick=yardstick, note=note)
        for name, (ours, yardstick) in pairs.items()
        if ours is not None
    ]
