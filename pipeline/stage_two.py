"""Tables of stage two: rectified rows, labels that may be wrong, the temperature of a teacher."""

import csv
from pathlib import Path
from typing import Any

from pipeline.console import Console
from stages.cache import LogitCache
from stages.cache.calibrated import Calibrated
from stages.errors import ConfigError, refusals
from stages.settings import RectifyConfig
from stages.suspects import suspected_labels

_SHOWN = 10


def show_rectification(console: Console, name: str, statistics: dict[str, Any]) -> None:
    """What stage two found."""
    top1 = statistics["top1_per_view"]
    console.table(
        f"rectification '{name}'",
        ("what", "value"),
        [
            (
                "teacher top-1 per view",
                f"{sum(top1) / len(top1):.2%} ({min(top1):.2%} to {max(top1):.2%})",
            ),
            ("wrong rows", f"{statistics['wrong_rows']:,} ({statistics['wrong_rate']:.2%})"),
            *(
                [("left as they are", f"{statistics['trusted_rows']:,}: the teacher is confident")]
                if "trusted_rows" in statistics
                else []
            ),
            ("label is now the argmax", f"{statistics['label_is_argmax']:.2%} of those rectified"),
            *(
                (f"confused: {pair['label']} taken for {pair['predicted']}", f"{pair['count']:,}")
                for pair in statistics["most_confused"][:5]
            ),
        ],
    )


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
        console.say("The teacher may have been trained on these labels, and agree with wrong ones")
    if config.suspects is None:
        return
    with (
        refusals(ConfigError, f"cannot write {config.suspects}"),
        Path(config.suspects).open("w", newline="") as file,
    ):
        csv.writer(file).writerows([columns, *rows])


def show_calibrated(console: Console, found: Calibrated) -> None:
    """The temperature that was fitted, and what it changes."""
    rows = [
        ("negative log-likelihood", f"{found.nll_before:.4f} nats", f"{found.nll:.4f} nats"),
        ("expected calibration error", f"{found.ece_before:.2%}", f"{found.ece:.2%}"),
    ]
    title = f"temperature {found.temperature:.4g}, fitted on {found.rows:,} {found.on} rows"
    console.table(title, ("of these rows", "at 1", "calibrated"), rows)
