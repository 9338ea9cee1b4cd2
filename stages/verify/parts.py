"""What the blocks of logits and of rectifications should be."""

from collections.abc import Iterator
from typing import Any

import torch

from stages.cache import LogitCache
from stages.cache.commits import Record, ViewRecords
from stages.cache.layout import BlockId
from stages.cache.rectified import Rectification
from stages.errors import CacheError
from stages.rectify import config_of, rectified_block, settings_of
from stages.tally import Tally
from stages.verify.blocks import Part
from stages.verify.faults import Fault


def logits_part(cache: LogitCache) -> Part:
    """The teacher's logits of all views."""

    def consistent(at: BlockId, record: Record) -> Iterator[str]:
        rows = cache.read_block(*at)
        if not bool(torch.isfinite(rows.logits).all()):
            yield "decodes to logits that are not finite"
        right = rows.predictions == rows.labels
        unseen = cache.skipped_rows(at.block, record)
        if not bool(right[unseen].all()) or int(right[~unseen].sum()) != record.get("right"):
            yield "its predictions are not those its record counted"

    def whole() -> list[Fault]:
        if cache.fidelity is None:
            return [Fault("fidelity", "is not declared: stage one has not finished")]
        return []

    views = range(cache.num_views)
    return Part(cache.blocks, views, consistent, lambda _: None, whole)


def rectified_part(cache: LogitCache, rectification: Rectification, bad: set[BlockId]) -> Part:
    """bad: blocks whose logits are damaged, which say nothing about what was made from them."""
    name, settings = f"rectified/{rectification.name}", rectification.settings
    if settings_of(config_of(settings)) != settings:
        raise CacheError("its settings contradict each other", f"Delete {name} and rectify again.")

    def consistent(at: BlockId, record: Record) -> Iterator[str]:
        if at in bad:
            return
        made, statistics = rectified_block(cache, settings, at)
        if _plain(statistics) != _plain(record.get("statistics")):
            yield "its statistics are not those of its rows"
        rows = [cache.grid.rows(at.block)]
        stored = rectification.blocks.read(made, at.view, rows, at.block)
        for array, values in made.items():
            if not torch.allclose(stored[array].float(), values.float(), rtol=1e-3, atol=1e-3):
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

    return Part(rectification.blocks, None, consistent, count, whole)


def _plain(value: Any) -> Any:
    """JSON has no tuples and no floats that are integers."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
