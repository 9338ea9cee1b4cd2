"""What the blocks of logits and of rectifications should be."""

from collections.abc import Iterator
from typing import Any

import torch

from stages.cache import LogitCache
from stages.cache.arrays import read_array
from stages.cache.commits import Record, ViewRecords
from stages.cache.metadata import all_arrays
from stages.cache.rectified import Rectification
from stages.errors import CacheError
from stages.rectify import config_of, rectified_block, settings_of
from stages.tally import Tally
from stages.verify.blocks import Part
from stages.verify.faults import Fault


def logits_part(cache: LogitCache) -> Part:
    def consistent(view: int, block: int, record: Record) -> Iterator[str]:
        rows = cache.read_block(view, block)
        if not bool(torch.isfinite(rows.logits).all()):
            yield "decodes to logits that are not finite"
        right = rows.predictions == rows.labels
        unseen = cache.skipped_rows(block, record)
        if not bool(right[unseen].all()) or int(right[~unseen].sum()) != record.get("right"):
            yield "its predictions are not those its record counted"

    def whole() -> list[Fault]:
        if cache.fidelity is None:
            return [Fault("fidelity", "is not declared: stage one has not finished")]
        return []

    all_specs = all_arrays(cache.num_classes, cache.encoding).items()
    specs = {name: spec for name, spec in all_specs if spec.by_block}
    views = range(cache.num_views)
    return Part(cache.commits, "", specs, views, consistent, lambda _: None, whole)


def rectified_part(
    cache: LogitCache, rectification: Rectification, bad: set[tuple[int, int]]
) -> Part:
    """bad: blocks whose logits are damaged, which say nothing about what was made from them."""
    name, settings = f"rectified/{rectification.name}", rectification.settings
    if settings_of(config_of(settings)) != settings:
        raise CacheError("its settings contradict each other", f"Delete {name} and rectify again.")

    def consistent(view: int, block: int, record: Record) -> Iterator[str]:
        if (view, block) in bad:
            return
        made, statistics = rectified_block(cache, settings, view, block)
        if _plain(statistics) != _plain(record.get("statistics")):
            yield "its statistics are not those of its rows"
        for array, values in made.items():
            stored = read_array(rectification.group, array, view, cache.grid.rows(block))
            close = torch.allclose(stored.float(), values.float(), rtol=1e-3, atol=1e-3)
            if not close:
                yield f"{array} is not what the rows give"

    tally = Tally(cache.num_classes)

    def whole() -> list[Fault]:
        summary = tally.summary(cache.identity.dataset.class_names)
        if _plain(rectification.statistics) != _plain(summary):
            return [Fault(name, "its statistics are not those of its blocks")]
        return []

    def count(records: ViewRecords) -> None:
        if not bad:  # else not all have been looked at
            tally.add(records)

    specs = rectification.specs
    return Part(rectification.commits, f"{name}/", specs, None, consistent, count, whole)


def _plain(value: Any) -> Any:
    """JSON has no tuples and no floats that are integers."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
