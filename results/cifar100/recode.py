"""A float32 cache with its rows in another encoding, as stage one would have written it."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import fit_encoding, fit_rows
from stages.cache.layout import BlockId
from stages.cache.metadata import NewCache
from stages.sizes import parse_budget


def recoded(
    exact: LogitCache,
    path: Path,
    spec: str,
    max_kl: str | None = None,
    change: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> LogitCache:
    """The cache at `path`, made or completed. The encoding is fitted to the exact first rows.

    spec: as of --encoding. max_kl: as of --max-kl. change: what is kept of logits, float32 (n, C).
    """
    if not LogitCache.exists(path):
        some = slice(fit_rows(exact.num_classes))
        logits = exact.read_block(0, 0).logits[some]
        second = exact.read_block(1, 0).logits[some] if exact.num_views > 1 else None
        labels = exact.row_labels[: len(logits)]
        budget = None if max_kl is None else parse_budget(max_kl, "max_kl")
        LogitCache.create(
            path,
            NewCache(
                identity=exact.identity,
                coding=fit_encoding(spec, logits, labels, budget, second),
                num_views=exact.num_views,
                dataset_index=exact.dataset_index,
                labels=exact.labels,
                eval_labels=exact.eval_logits()[1],
                pixel_probes=exact.pixel_probes,
                provenance=exact.provenance,
            ),
        )
    cache = LogitCache.open(path, writable=True)
    for view in range(exact.num_views):
        for block in range(exact.grid.num_blocks):
            if not cache.commits.has(BlockId(view, block)):
                rows = exact.read_block(view, block)
                cache.write_block(view, block, change(rows.logits), rows.predictions, {})
    if not cache.eval_commits.is_complete(0):
        cache.write_eval_logits(exact.eval_logits()[0], {})
        cache.write_fidelity()
    return cache
