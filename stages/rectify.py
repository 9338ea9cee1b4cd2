"""Stage two: which rows the teacher has wrong, and what they should say instead.

    pipeline rectify digits.zarr --method pairwise --temperature 4

Runs on Dask, one task a block; each holds one block in memory. A wrong row is one whose stored
prediction (taken before any encoding) differs from the label, on that view. Rectification replaces
two of its logits, the label's and the predicted class's, and only those two are stored.

Formulas: "Can Students Beyond The Teacher?", Zhang et al., AAAI 2025, as released. With p the row,
l the label, k the predicted class and S = p_l + p_k:

    pairwise   p_l' = S (p_l + 1) / (S + 1),  p_k' = S p_k / (S + 1)      label above k, sum kept
    swap       p_l' = p_k, p_k' = p_l                                     Wen et al., 1911.07471
    blend      p' = (p + onehot(l)) / 2

Spaces: `probability-T` rectifies softmax(z / T), the target that a loss at T sees; `probability-1`
rectifies softmax(z) and may be softened to any temperature afterwards; `logit` applies `pairwise`
to raw logits, as the released training scripts do: the label then often stays below the wrong
class, and the result depends on the logits' common offset.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import dask
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.commits import Record
from stages.cache.encoding import check_temperature
from stages.cache.location import Location
from stages.cache.lock import exclusive, half_written
from stages.cache.rectified import Rectification, RectificationSettings
from stages.dask_client import existing_cluster
from stages.errors import CacheError, ConfigError
from stages.inputs.views import check_unmixed
from stages.reporting import Reporter, Silent
from stages.training.config import Settings, positive, within

Method = Literal["pairwise", "swap", "blend"]
Space = Literal["probability-T", "probability-1", "logit"]


_NAME = re.compile(r"(?!zarr\.json$)[A-Za-z0-9][\w.+-]*")
"""What can name a group of the store."""
_PAIRS_AT_ONCE = 2**20
"""Of confused classes, before equal ones are counted together."""


class RectifyConfig(Settings, frozen=True):
    """name: None for `<method>-T<temperature>`, with the space appended where it is not the
    default. scheduler: address of a Dask cluster, None for threads here. views: rectify the first
    so many views, None for all. materialise: also store whole rectified rows, for readers outside
    this project.
    """

    method: Method = "pairwise"
    space: Space = "probability-T"
    temperature: float = 4.0
    name: str | None = None
    views: int | None = None
    scheduler: str | None = None
    materialise: bool = False

    def __post_init__(self) -> None:
        within("temperature", self.temperature, 1e-2, 1e4)
        if self.views is not None:
            positive("views", self.views)
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"'{self.name}' cannot name a rectification",
                "Use letters, digits, '.', '_', '+' and '-'.",
            )
        if self.space == "logit" and self.method == "blend":
            raise ConfigError(
                "the space 'logit' is not defined for the method 'blend'",
                "Use --method pairwise (as released), or --space probability-T.",
            )

    @property
    def chosen_name(self) -> str:
        space = "" if self.space == "probability-T" else f"-{self.space}"
        return self.name or f"{self.method}-T{self.temperature:g}{space}"

    @property
    def settings(self) -> RectificationSettings:
        # Swapping commutes with softmax, and the other spaces rectify before softening.
        free = self.space != "probability-T" or self.method == "swap"
        return RectificationSettings(
            method=self.method,
            space=self.space,
            temperature=self.temperature,
            temperature_free=free,
            materialised=self.materialise,
        )


def rectify(
    path: str | Path, config: RectifyConfig, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Rectify every block of a cache that is not rectified yet; return the statistics.

    Raises CacheError if the cache is incomplete, or has this name with other settings, ViewError if
    its views mix samples (mixup, cutmix): such a row has two labels.
    """
    reporter = reporter or Silent()
    cache = LogitCache.open(path, writable=True)
    check_unmixed(cache.identity.views.policy, "rectification")
    settings = config.settings
    check_temperature(cache.encoding, 1.0 if settings.temperature_free else settings.temperature)
    name, views = config.chosen_name, _views(cache, config.views)
    with exclusive(cache.path):
        # 1) what is missing
        for leftover in half_written(cache.path):
            leftover.unlink()
        rectification = cache.create_rectification(name, config.settings)
        missing = rectification.commits.missing(views)
        if there := len(views) * cache.grid.num_blocks - len(missing):
            reporter.say(f"{there} blocks are there already")

        # 2) one task a block
        run = _run_on_threads if config.scheduler is None else _run_on_cluster
        for done, _ in enumerate(
            run(cache, rectification, missing, config.scheduler or ""), start=1
        ):
            reporter.progress("rectify", done, len(missing), "blocks")

        # 3) what came of it, from every block's record
        rectification = cache.rectification(name)  # reads the records afresh
        rectification.commits.compact_rest()
        tally = Tally(cache.num_classes)
        for _, records in rectification.commits.each_view():
            tally.add(records)
        statistics = tally.summary(cache.identity.dataset.class_names)
        rectification.write_statistics(statistics)
    return statistics


def rectify_rows(
    probabilities: Tensor, labels: Tensor, method: Method, predictions: Tensor | None = None
) -> Tensor:
    """Rectify rows of probabilities; rows whose prediction is the label stay as they are.

    probabilities: float (n, C), each row sums to 1. labels: int64 (n,). predictions: int64 (n,),
    None for the rows' own argmax. Returns (n, C) of the same dtype; each row sums to 1.
    """
    label = labels.unsqueeze(1)
    predicted = (
        probabilities.argmax(1, keepdim=True) if predictions is None else predictions[:, None]
    )
    p_label, p_predicted = probabilities.gather(1, label), probabilities.gather(1, predicted)
    new_label, new_predicted = _replaced(p_label, p_predicted, method)
    rectified = probabilities.scatter(1, label, new_label).scatter(1, predicted, new_predicted)
    if method == "blend":
        rectified = rectified / 2
    return torch.where(label == predicted, probabilities, rectified)


def replaced_logits(
    logits: Tensor, labels: Tensor, predictions: Tensor, config: RectifyConfig
) -> tuple[Tensor, Tensor]:
    """The two logits of wrong rows that rectification replaces: float32 (n,) each.

    logits: float32 (n, C) of rows whose prediction is not the label. Put in their places, the two
    make softmax(row / T) the rectified distribution; for a temperature-free one at any T.
    """
    z_label = logits.gather(1, labels[:, None]).squeeze(1).double()
    z_predicted = logits.gather(1, predictions[:, None]).squeeze(1).double()
    if config.method == "swap":
        return z_predicted.float(), z_label.float()
    if config.space == "logit":
        new_label, new_predicted = _replaced(z_label, z_predicted, config.method)
        return new_label.float(), new_predicted.float()
    temperature = config.temperature if config.space == "probability-T" else 1.0
    # p = exp(z/T - offset): the offset turns probabilities back into logits of the same row.
    offset = torch.logsumexp(logits / temperature, dim=1).double()
    p_label = (z_label / temperature - offset).exp()
    p_predicted = (z_predicted / temperature - offset).exp()
    new_label, new_predicted = _replaced(p_label, p_predicted, config.method)
    return (
        ((new_label.log() + offset) * temperature).float(),
        ((new_predicted.log() + offset) * temperature).float(),
    )


def _replaced(label: Tensor, predicted: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """The new entries of label and predicted class; for `blend` up to the factor 1/2 of the row."""
    if method == "swap":
        return predicted, label
    if method == "blend":
        return label + 1, predicted
    pair = label + predicted
    # On raw logits the pair's sum may be -1; probabilities are never near it.
    below = torch.where((pair + 1).abs() < 1e-7, torch.full_like(pair, 1e-7), pair + 1)
    return pair * (label + 1) / below, pair * predicted / below


# ---- blocks ---------------------------------------------------------------------------------


def rectify_block(cache: LogitCache, rectification: Rectification, view: int, block: int) -> None:
    """Rectify and commit one block: a Dask task."""
    arrays, statistics = rectified_block(cache, rectification.settings, view, block)
    record = {"settings": msgspec.to_builtins(rectification.settings), "statistics": statistics}
    rectification.write_block(view, block, arrays, record)


def rectified_block(
    cache: LogitCache, settings: RectificationSettings, view: int, block: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of one rectified block, each (n, ...) as layout.py names them; its statistics."""
    config = msgspec.convert(
        {"method": settings.method, "space": settings.space, "temperature": settings.temperature},
        RectifyConfig,
    )
    temperature = 1.0 if settings.temperature_free else settings.temperature
    rows = cache.read_encoded_block(view, block)
    wrong = rows.predictions != rows.labels
    at = wrong.nonzero().squeeze(1)
    labels, predictions = rows.labels[at], rows.predictions[at]
    # Right rows stay what they are: only a materialised rectification has to know them.
    whole = rows.logits(temperature) if settings.materialised else None
    logits = rows.logits(temperature, at) if whole is None else whole[at]
    new_label, new_predicted = replaced_logits(logits, labels, predictions, config)
    label_logit, predicted_logit = torch.zeros(2, len(wrong))
    label_logit[at], predicted_logit[at] = new_label, new_predicted
    arrays = {"wrong": wrong, "label_logit": label_logit, "predicted_logit": predicted_logit}
    rectified = logits.scatter_(1, labels[:, None], new_label[:, None])
    rectified.scatter_(1, predictions[:, None], new_predicted[:, None])
    if whole is not None:
        whole.index_copy_(0, at, rectified)
        arrays["log_distribution"] = torch.log_softmax(whole / temperature, dim=1)
    pairs, counts = (labels * cache.num_classes + predictions).unique(return_counts=True)
    confused = torch.stack([pairs // cache.num_classes, pairs % cache.num_classes, counts], dim=1)
    statistics = {
        "rows": len(wrong),
        "wrong": len(at),
        "label_is_argmax": int((rectified.argmax(1) == labels).sum()),
        "confused": confused.tolist(),
    }
    return arrays, statistics


def _rectify_block_at(path: Location, name: str, view: int, block: int) -> None:
    """As `rectify_block`, in a process of its own."""
    cache = LogitCache.open(path, writable=True)
    rectify_block(cache, cache.rectification(name), view, block)


class Tally:
    """Statistics over blocks, counted up view by view."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._rows: Counter[int] = Counter()
        self._wrong: Counter[int] = Counter()
        self._repaired = 0
        self._pairs = np.empty((2, 0), dtype=np.int64)  # label * C + predicted, and how often
        self._to_merge: list[NDArray[np.int64]] = []
        self._waiting = 0

    def add(self, records: Mapping[int, Record]) -> None:
        """The records of one view's blocks."""
        for _, record in sorted(records.items()):
            block = record["statistics"]
            self._rows[record["view"]] += block["rows"]
            self._wrong[record["view"]] += block["wrong"]
            self._repaired += block["label_is_argmax"]
            label, predicted, count = np.array(block["confused"], np.int64).reshape(-1, 3).T
            self._to_merge.append(np.stack([label * self._num_classes + predicted, count]))
            self._waiting += len(label)
        if self._waiting > _PAIRS_AT_ONCE:
            self._merge()

    def _merge(self) -> None:
        """Every pair once, in the order in which they were first seen."""
        pairs, counts = np.concatenate([self._pairs, *self._to_merge], axis=1)
        unique, first, which = np.unique(pairs, return_index=True, return_inverse=True)
        counted = np.zeros_like(unique)
        np.add.at(counted, which, counts)
        order = first.argsort()
        self._pairs = np.stack([unique, counted])[:, order]
        self._to_merge, self._waiting = [], 0

    def summary(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Accuracy per view, share repaired, the 20 most confused pairs (the first seen first)."""
        self._merge()
        total = sum(self._wrong.values())
        most = (-self._pairs[1]).argsort(kind="stable")[:20]
        return {
            "wrong_rows": total,
            "wrong_rate": total / sum(self._rows.values()),
            "top1_per_view": [1 - self._wrong[v] / self._rows[v] for v in sorted(self._rows)],
            "label_is_argmax": self._repaired / total if total else 1.0,
            "most_confused": [
                {
                    "label": class_names[pair // self._num_classes],
                    "predicted": class_names[pair % self._num_classes],
                    "count": count,
                }
                for pair, count in self._pairs[:, most].T.tolist()
            ],
        }


# ---- running --------------------------------------------------------------------------------


def _views(cache: LogitCache, wanted: int | None) -> range:
    complete = cache.complete_views
    if wanted is not None and wanted > cache.num_views:
        raise CacheError(
            f"{cache.path} has {cache.num_views} views, {wanted} were asked for",
            "Leave --views out, or run `pipeline cache-teacher` with more.",
        )
    views = range(cache.num_views if wanted is None else wanted)
    if not set(views) <= set(complete):
        leading = next(v for v in range(cache.num_views + 1) if v not in complete)
        raise CacheError(
            f"{cache.path} is not complete: {len(complete)} of {cache.num_views} views are",
            "Run `pipeline cache-teacher` again to finish it"
            + (f", or rectify what is there with --views {leading}." if leading else "."),
        )
    return views


def _run_on_threads(
    cache: LogitCache, rectification: Rectification, blocks: list[tuple[int, int]], _: str
) -> Iterator[None]:
    """One task a block on this machine's cores, so many blocks at a time; yields after each."""
    threads = max(1, torch.get_num_threads())
    # As a partial: Dask would take the arguments apart.
    task = dask.delayed(functools.partial(rectify_block, cache, rectification))
    for start in range(0, len(blocks), threads):
        tasks = [task(*block) for block in blocks[start:][:threads]]
        dask.compute(*tasks, scheduler="threads", num_workers=threads, optimize_graph=False)
        yield from (None for _ in tasks)


def _run_on_cluster(
    cache: LogitCache, rectification: Rectification, blocks: list[tuple[int, int]], address: str
) -> Iterator[None]:
    """One task a block on an existing Dask cluster that sees the same path."""
    from distributed import as_completed

    with existing_cluster(address) as client:
        path = cache.path.absolute() if isinstance(cache.path, Path) else cache.path
        tasks = [
            client.submit(_rectify_block_at, path, rectification.name, *b, pure=False)
            for b in blocks
        ]
        for task in as_completed(tasks, loop=client.loop):
            task.result()
            yield
