"""Which runs can be trained in one process, from one stream of batches.

Images are cropped and targets are read once for all students of a group. They must see the same
batches: runs of a group agree in everything except model, loss, bias and the seed of first weights.
"""

from collections.abc import Sequence

import msgspec

from pipeline.sweep.grid import Run
from stages.train_student import StudentConfig
from stages.training.config import BiasSettings, LossSettings, ModelSettings


def grouped(runs: Sequence[Run], most: int | None) -> list[list[Run]]:
    """Runs in groups of at most `most` (None for any number), in the order of their first runs."""
    alike: dict[StudentConfig, list[Run]] = {}
    for run in runs:
        alike.setdefault(shared(run.config), []).append(run)
    size = most or len(runs)
    return [group[i : i + size] for group in alike.values() for i in range(0, len(group), size)]


def shared(config: StudentConfig) -> StudentConfig:
    """The configuration, without what runs of one group may differ in."""
    return msgspec.structs.replace(
        config,
        model=ModelSettings(architecture=""),
        loss=LossSettings(),
        bias=BiasSettings(),
        seed=msgspec.structs.replace(config.seed, init=0),
    )
