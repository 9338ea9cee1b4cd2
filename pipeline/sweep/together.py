"""Which runs can be trained in one process, from one stream of batches.

Images are cropped and targets are read once for all students of a group. Which settings they must
share is known to `check_one_stream`; model, loss, bias, optimiser and the seed of first weights may
differ.
"""

from collections.abc import Sequence

from pipeline.sweep.grid import Run
from stages.errors import ConfigError
from stages.student_checks import check_one_stream


def grouped(runs: Sequence[Run], most: int | None) -> list[list[Run]]:
    """Runs in groups of at most `most` (None for any number), in the order of their first runs."""
    groups: list[list[Run]] = []
    for run in runs:
        room = (g for g in groups if most is None or len(g) < most)
        fitting = next((g for g in room if _share_a_stream([*g, run])), None)
        if fitting is None:
            groups.append([run])
        else:
            fitting.append(run)
    return groups


def _share_a_stream(runs: Sequence[Run]) -> bool:
    configs = [run.config for run in runs]
    if len({config.model.image_size for config in configs}) > 1:
        return False
    try:
        check_one_stream(configs)
    except ConfigError:
        return False
    return True
