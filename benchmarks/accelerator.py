"""What only a GPU shows: compiled students, precisions, resident slabs, students together."""

from collections.abc import Callable

import msgspec

from benchmarks.cases import Figures
from benchmarks.measure import Ratio, in_turns
from benchmarks.training import Bench
from benchmarks.worlds import World
from stages.settings import StudentConfig
from stages.targets.chunks import slab_bytes

TOGETHER = 8
ROWS = (
    "compiled epoch / eager epoch",
    "bfloat16 epoch / float32 epoch",
    "epoch with all slabs resident / with each read anew",
    f"{TOGETHER} students together / {TOGETHER} epochs alone",
)


def accelerator_figures(world: World, bench: Bench) -> Figures:
    """All of them for a world's first student, in the same turns."""
    replace = msgspec.structs.replace
    config = world.student(world.plan.students[0])
    hard = bench.hard(config)
    two_slabs = 2 * slab_bytes([world.cache], len(world.splits.train))

    def student(config: StudentConfig) -> Callable[[], float]:
        return bench.cached(config, hard)

    works: dict[str, Callable[[], float]] = {
        "plain": student(config),
        "float32": student(replace(config, train=replace(config.train, dtype="float32"))),
        "bfloat16": student(replace(config, train=replace(config.train, dtype="bfloat16"))),
        "compiled": student(replace(config, train=replace(config.train, compile=True))),
        "read anew": student(replace(config, slab_memory=str(two_slabs))),
    }
    group = [world.student(config.model.architecture, init) for init in range(TOGETHER)]
    works["together"] = bench.together(group)
    times = in_turns(works, bench.turns)
    alone = tuple(TOGETHER * taken for taken in times["plain"])
    pairs = {
        ROWS[0]: (times["compiled"], times["plain"]),
        ROWS[1]: (times["bfloat16"], times["float32"]),
        ROWS[2]: (times["plain"], times["read anew"]),
        ROWS[3]: (times["together"], alone),
    }
    note = f"{config.model.architecture}, {config.train.dtype}, {world.plan.name}"
    return [
        Ratio(name=name, ours=ours, yardstick=yardstick, note=note)
        for name, (ours, yardstick) in pairs.items()
    ]
