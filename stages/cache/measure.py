"""How large rows of real logits are on disk, before a cache is made."""

from torch import Tensor

from stages.cache.arrays import encode_shard
from stages.cache.encoding.base import Encoding
from stages.cache.layout import base_arrays, block_grid


def row_bytes_on_disk(coding: Encoding, logits: Tensor, labels: Tensor) -> float:
    """Bytes a row and view: encoded, compressed and framed as a block would be.

    logits: float32 (n, C). labels: int64 (n,). Few rows overstate the size a little: their index
    weighs more.
    """
    rows, classes = logits.shape
    grid = block_grid(rows, classes)
    specs = coding.arrays() | {"prediction": base_arrays(classes)["prediction"]}
    values = coding.encode(logits, labels) | {"prediction": logits.argmax(1)}
    return (
        sum(
            len(encode_shard(spec, grid, block, values[name][grid.rows(block)]))
            for name, spec in specs.items()
            for block in range(grid.num_blocks)
        )
        / rows
    )
