"""Stage two, beside rectification: the temperature that calibrates the teacher.

    pipeline calibrate folds.zarr
    pipeline train-student folds.zarr --calibrate ...

Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2): one number, which changes no
prediction. A teacher is more confident on samples that it has been trained on than on new images:
fit the temperature on out-of-fold rows, or on those of a teacher that was trained on other data.
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.calibrated import Calibrated, Rows
from stages.cache.lock import exclusive
from stages.errors import CacheError
from stages.inputs.views import check_unmixed
from stages.reporting import Reporter, Silent
from stages.scores import score
from stages.settings import RectifyConfig

LEAST, MOST = 0.05, 20.0
"""The range of temperatures that is searched."""
MAX_ROWS, MAX_VALUES, MAX_VIEWS = 65_536, 2**24, 16
"""How much is decoded: rows, logits, and views that rows are taken from."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least mean negative log-likelihood of the labels.

    logits: float (n, C), n > 0. labels: int64 (n,). Raises CacheError where there is none between
    LEAST and MOST: for rows that are all right the likelihood grows as the temperature falls.
    """
    from scipy.optimize import minimize_scalar

    z = logits.double()
    z = z - z.gather(1, labels[:, None])  # the label's is 0: what is left is a logsumexp

    def nll(inverse: float) -> float:
        return float(torch.logsumexp(z * inverse, dim=1).mean())

    # Of the inverse it is convex.
    found: Any = minimize_scalar(  # type: ignore[no-untyped-call]
        nll, bounds=(1 / MOST, 1 / LEAST), method="bounded", options={"xatol": 1e-7}
    )
    temperature = 1 / float(found.x)
    if not 1.001 * LEAST < temperature < 0.999 * MOST:
        raise CacheError(
            f"no temperature from {LEAST:g} to {MOST:g} fits: the teacher has "
            f"{float((z <= 0).all(1).double().mean()):.2%} of these rows right",
            "Calibrate on rows that the teacher has not seen: a cache of folds, or --on test.",
        )
    return temperature


def calibrate(path: str | Path, on: Rows = "train", reporter: Reporter | None = None) -> Calibrated:
    """Fit the temperature of a cache and keep it among the cache's attributes, in the place of an
    earlier one.

    Raises CacheError where samples have no labels, where only part of each row is kept, and what
    `fit_temperature` raises; ViewError for rows of views that mix samples: each has two labels.
    """
    reporter = reporter or Silent()
    cache = LogitCache.open(path, writable=True)
    if not cache.encoding.keeps_all:
        raise CacheError(
            f"{cache.path} keeps part of each row, and calibration needs all of it",
            "Cache with another --encoding.",
        )
    if on == "train":
        cache.require_labels("calibration")
        check_unmixed(cache.identity.views.policy, "calibration on views", "use --on test")
        logits, labels, predictions = _view_rows(cache)
        if cache.identity.teacher.folds is None:
            reporter.say(
                "the teacher may have been trained on these samples: then it is more confident on "
                "them than on new images, and the temperature is too low"
            )
    else:
        shown = cache.eval_shown
        logits, labels = (part[shown] for part in cache.eval_logits())
        predictions = cache.eval_predictions()[shown]
        reporter.say("fitted on labels of the test split: students that use it have seen them")
    temperature = fit_temperature(logits, labels)
    before, after = (score(logits / t, labels, predictions) for t in (1.0, temperature))
    found = Calibrated(temperature, on, len(labels), after.nll, before.nll, after.ece, before.ece)
    with exclusive(cache.path):  # opened anew: its attributes may have changed meanwhile
        LogitCache.open(path, writable=True).write_calibrated(found)
    return found


def with_calibration(config: RectifyConfig, cache: LogitCache) -> RectifyConfig:
    """The settings of a rectification of calibrated rows: rows divided by t and softened by T are
    rows softened by t T, so that it is one at this temperature, under a name that says so.

    Raises CacheError where the cache is not calibrated.
    """
    if not config.calibrate:
        return config
    by = cache.calibration
    return msgspec.structs.replace(
        config,
        calibrate=False,
        name=config.chosen_name,
        temperature=config.temperature * by,
    )


def _view_rows(cache: LogitCache) -> tuple[Tensor, Tensor, Tensor]:
    """A fair draw of rows: logits float32 (n, C), labels and predictions int64 (n,)."""
    parts = []
    for view, run in fair_draw(cache, MAX_ROWS, MAX_VALUES, MAX_VIEWS):
        targets, samples = cache.read_view(view, None, [run]), cache.dataset_index[run]
        seen = ~torch.isin(samples, cache.skipped())
        rows = targets.rows(samples[seen])
        parts.append((rows, targets.labels[seen], targets.predictions[seen].long()))
    logits, labels, predictions = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits, labels, predictions


def fair_draw(
    cache: LogitCache, max_rows: int, max_values: int, max_views: int
) -> list[tuple[int, slice]]:
    """Runs of rows of the complete views, (view, rows): all of them, or other samples in every view
    where that is too much. Rows lie in random order, so that a run is a fair draw.

    At most `max_rows` rows and `max_values` logits, but one row a view, of at most `max_views`
    views where not all rows are taken. Raises CacheError where no view is complete.
    """
    views, samples = cache.complete_views, cache.num_samples
    if not views:
        raise CacheError(
            f"no view of {cache.path} is complete", "Run `pipeline cache-teacher` again."
        )
    budget = max(1, min(max_rows, max_values // cache.num_classes))
    if len(views) * samples > budget and len(views) > max_views:
        views = [views[at * len(views) // max_views] for at in range(max_views)]
    each = min(samples, max(1, budget // len(views)))
    starts = [turn * each % (samples - each + 1) for turn in range(len(views))]
    return [(view, slice(start, start + each)) for view, start in zip(views, starts, strict=True)]
