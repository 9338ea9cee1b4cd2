"""A small cache made from another one, to be written to: the other stays as it is."""

from pathlib import Path

import msgspec
import torch

from stages.cache import LogitCache
from stages.cache.encoding import FIT_ROWS, Encoding, fit_encoding
from stages.cache.metadata import NewCache
from stages.cache.targets import Block

MOST_LOGITS = 2**24
"""Of one view: 64 MiB of decoded rows, 167,772 rows of 100 classes."""


def excerpt_rows(cache: LogitCache) -> int:
    """How many rows of each view an excerpt has: all, where they are not too many to measure on."""
    return min(cache.num_samples, max(1, MOST_LOGITS // cache.num_classes))


def excerpt(cache: LogitCache, path: Path, views: int, encoding: str | None = None) -> LogitCache:
    """The first rows of `views` views of a cache, as a cache of its own whose sample i is row i.
    More views than the cache has complete are its views again.

    encoding: another one, fitted to these rows; None for the cache's own with its calibration.
    Raises CacheError if no view is complete.
    """
    complete, rows = cache.complete_views or [0], excerpt_rows(cache)
    first = _rows(cache, complete[0], rows)
    coding: Encoding = cache.encoding
    if encoding is not None:
        some = slice(FIT_ROWS)
        second = _rows(cache, complete[1 % len(complete)], rows).logits[some]
        coding = fit_encoding(encoding, first.logits[some], first.labels[some], second=second)
    replace = msgspec.structs.replace
    dataset = replace(cache.identity.dataset, num_samples=rows)
    made = LogitCache.create(
        path,
        NewCache(
            identity=replace(cache.identity, dataset=dataset),
            coding=coding,
            num_views=views,
            dataset_index=torch.arange(rows),
            labels=first.labels,
            eval_labels=first.labels[:1],
            pixel_probes=cache.pixel_probes,
            provenance={},
        ),
    )
    for view in range(views):
        source = complete[view % len(complete)]
        block = first if source == complete[0] else _rows(cache, source, rows)
        for number in range(made.grid.num_blocks):
            here = made.grid.rows(number)
            made.write_block(view, number, block.logits[here], block.predictions[here], {})
    return made


def _rows(cache: LogitCache, view: int, rows: int) -> Block:
    """The first rows of a view, decoded."""
    targets = cache.read_view(view, runs=[slice(0, rows)])
    temperature = decoded_at(cache.encoding)
    logits = targets.rows(cache.dataset_index[:rows], temperature)
    return Block(logits, targets.labels, targets.predictions)


def decoded_at(encoding: Encoding) -> float:
    """A temperature for which rows can be decoded: 1 where there is a choice."""
    return 1.0 if encoding.holds(1.0) else float(encoding.parameters["temperatures"][0])
