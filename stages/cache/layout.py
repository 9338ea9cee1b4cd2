"""Where everything lies in a store: array names, dimensions, dtypes, the block grid.

Pure functions; `store.py` does what they say. A block is one view and a run of rows. It is one
Zarr shard of each array with a view and a sample dimension, so that one writer owns whole objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from stages.settings import MAX_BLOCK_ROWS

FORMAT = "teacher-logit-cache"
VERSION = 1

MAX_VIEWS = 1_000_000
"""What says that there are more is damaged."""
ARRAYS = (
    *("dataset_index", "label", "prediction", "eval_label", "eval_logits", "eval_prediction"),
    *("logits", "logits_code", "logits_scale", "logits_offset"),
    *("logits_pair", "logits_three", "logits_five", "logits_top"),
    *("klt_basis", "klt_mean", "klt_step", "klt_center", "klt_predictor"),
    *("anchor_code", "anchor_pair", "anchor_three", "anchor_five", "anchor_top"),
    *("anchor_basis", "anchor_mean", "anchor_center"),
    *("topk_index", "topk_value", "topk_tail"),
)
"""Every array that the root of some cache has."""
FOLDERS = (*ARRAYS, "commits", "rectified")
"""What lies right under a root, beside its document. Anything else is not ours."""
RECTIFIED_ARRAYS = ("wrong", "label_logit", "predicted_logit", "log_distribution")

ANCHOR = 0
"""The view that all others depend on, in a cache whose encoding has such a view."""
MAX_BLOCK_BYTES = 512 * 2**20
"""Of decoded float32 rows: what one block costs in memory at the most."""
MAX_CHUNK_ROWS = 8_192
MAX_DECODED_BYTES = 2**30
"""Of the float32 rows that all threads of a stage may have decoded at once."""


class BlockId(NamedTuple):
    """Which block: a view, and the number of its run of rows."""

    view: int
    block: int


class Extent(NamedTuple):
    """How many blocks are committed, of how many rows, in how many bytes."""

    blocks: int
    rows: int
    bytes: int


@dataclass(frozen=True)
class BlockGrid:
    """How the rows of a view are cut: blocks (shards) of whole chunks, as even as possible.

    The last block is shorter where rows run out; every shard has the same nominal shape.
    """

    num_rows: int
    chunk_rows: int
    chunks_per_block: int

    @property
    def block_rows(self) -> int:
        """How many rows a block has, but for the last."""
        return self.chunk_rows * self.chunks_per_block

    @property
    def num_blocks(self) -> int:
        """How many blocks a view has."""
        return -(-self.num_rows // self.block_rows)

    def rows(self, block: int) -> slice:
        """Rows [start, stop) of a block in [0, num_blocks)."""
        start = block * self.block_rows
        return slice(start, start + self.length(block))

    def length(self, block: int) -> int:
        """How many rows a block has."""
        return min(self.block_rows, self.num_rows - block * self.block_rows)


def threads_at_once(grid: BlockGrid, num_classes: int, threads: int) -> int:
    """How many of these threads may hold a decoded block each."""
    block_bytes = 4 * num_classes * grid.block_rows
    return max(1, min(threads, MAX_DECODED_BYTES // block_bytes))


def block_grid(num_rows: int, num_classes: int, max_rows: int = MAX_BLOCK_ROWS) -> BlockGrid:
    """The grid for so many rows: no block above `max_rows` rows or MAX_BLOCK_BYTES."""
    largest = max(1, min(max_rows, MAX_BLOCK_BYTES // (4 * num_classes)))
    rows = -(-num_rows // -(-num_rows // largest))  # even blocks
    chunks = -(-rows // MAX_CHUNK_ROWS)
    chunk_rows = min(-(-rows // chunks), largest // chunks)  # rounding up must not pass the limit
    return BlockGrid(num_rows, chunk_rows, chunks)


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: its dimensions by name and its dtype.

    stored_order: the order of the dimensions inside a chunk's bytes, None for the array's own.
    views: whose blocks have it; it has room for all of them whichever these are.
    """

    dimensions: tuple[str, ...]
    dtype: str
    stored_order: tuple[int, ...] | None = None
    views: Literal["all", "first", "others"] = "all"

    @property
    def by_block(self) -> bool:
        """Whether the array is written block by block (and grows with the views)."""
        return self.dimensions[:2] == ("view", "sample")

    def of_view(self, view: int) -> bool:
        """Whether the blocks of a view have it."""
        return self.views in ("all", "first" if view == ANCHOR else "others")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the whole array. sizes: of every dimension."""
        return tuple(sizes[d] for d in self.dimensions)

    def shard(self, sizes: Mapping[str, int], grid: BlockGrid) -> tuple[int, ...]:
        """The shape of one block."""
        return (1, grid.block_rows, *self.shape(sizes)[2:])

    def chunk(self, sizes: Mapping[str, int], grid: BlockGrid) -> tuple[int, ...]:
        """The shape of what is compressed at once."""
        return (1, grid.chunk_rows, *self.shape(sizes)[2:])


def prediction_dtype(num_classes: int) -> str:
    """The smallest of two dtypes that holds every class."""
    return "uint16" if num_classes <= 2**16 else "uint32"


def base_arrays(
    num_classes: int, labelled: bool = True, tested: bool = True
) -> dict[str, ArraySpec]:
    """The arrays of a cache that its encoding does not decide. labelled: its samples have labels.
    tested: it has a test split.
    """
    arrays = {"dataset_index": ArraySpec(("sample",), "int64")}
    if labelled:
        arrays["label"] = ArraySpec(("sample",), "int32")
    arrays["prediction"] = ArraySpec(("view", "sample"), prediction_dtype(num_classes))
    if not tested:
        return arrays
    return arrays | {
        "eval_label": ArraySpec(("eval_sample",), "int32"),
        "eval_logits": ArraySpec(("eval_sample", "class"), "float16"),
        "eval_prediction": ArraySpec(("eval_sample",), prediction_dtype(num_classes)),
    }


def rectified_arrays(materialise: bool) -> dict[str, ArraySpec]:
    """The arrays of one rectification, in the group rectified/<name>."""
    arrays = {
        "wrong": ArraySpec(("view", "sample"), "bool"),
        "label_logit": ArraySpec(("view", "sample"), "float32"),
        "predicted_logit": ArraySpec(("view", "sample"), "float32"),
    }
    if materialise:
        arrays["log_distribution"] = ArraySpec(("view", "sample", "class"), "float16")
    return arrays


def whole_key(array: str, spec: ArraySpec) -> str:
    """The one object of an array that is stored whole."""
    return f"{array}/c" + "/0" * len(spec.dimensions)


def block_key(array: str, spec: ArraySpec, at: BlockId) -> str:
    """The object that holds a block of an array (Zarr's default chunk keys)."""
    return f"{array}/c/{at.view}/{at.block}" + "/0" * (len(spec.dimensions) - 2)
