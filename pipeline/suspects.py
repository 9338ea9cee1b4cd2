"""The list of samples whose labels may be wrong, shown and written."""

import csv
from pathlib import Path

from pipeline.console import Console
from stages.cache import LogitCache
from stages.errors import ConfigError
from stages.settings import RectifyConfig
from stages.suspects import suspected_labels

_SHOWN = 10


def show_suspects(console: Console, path: str, config: RectifyConfig) -> None:
    """Say how many labels are suspected and show the first of them; write all of them where that
    was asked for. Raises ConfigError if the file cannot be written.
    """
    cache = LogitCache.open(path)
    names = cache.identity.dataset.class_names
    rows = [
        (s.sample, names[s.label], names[s.predicted], s.views)
        for s in suspected_labels(cache, config.chosen_name)
    ]
    columns = ("sample", "label", "predicted", "views")
    title = (
        f"{len(rows):,} labels may be wrong ({len(rows) / cache.num_samples:.2%} of the samples)"
    )
    console.table(title, columns, rows[:_SHOWN])
    if cache.identity.teacher.folds is None and rows:
        console.say("The teacher was trained on these labels, and may know some by heart")
    if config.suspects is None:
        return
    try:
        with Path(config.suspects).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
    except OSError as error:
        raise ConfigError(f"cannot write {config.suspects}: {error.strerror}") from error
