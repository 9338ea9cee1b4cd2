import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.cache.layout import (
    MAX_BLOCK_BYTES,
    MAX_CHUNK_ROWS,
    BlockId,
    base_arrays,
    block_grid,
    block_key,
    rectified_arrays,
    threads_at_once,
)


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int]:
    """(num_rows, num_classes, max_rows) of at most some 100 blocks."""
    num_classes = draw(st.integers(1, 400_000))
    max_rows = draw(st.integers(1, 70_000))
    largest = min(max_rows, MAX_BLOCK_BYTES // (4 * num_classes))
    return draw(st.integers(1, 100 * largest)), num_classes, max_rows


@given(grids())
def test_blocks_cover_every_row_once_and_keep_their_limits(case: tuple[int, int, int]) -> None:
    num_rows, num_classes, max_rows = case
    grid = block_grid(num_rows, num_classes, max_rows)

    end = 0
    for block in range(grid.num_blocks):
        rows = grid.rows(block)
        assert rows.start == end
        assert rows.stop - rows.start == grid.length(block) > 0
        end = rows.stop
    assert end == num_rows
    assert grid.block_rows <= max_rows
    assert grid.block_rows * num_classes * 4 <= MAX_BLOCK_BYTES
    assert 1 <= grid.chunk_rows <= MAX_CHUNK_ROWS
    assert grid.block_rows % grid.chunk_rows == 0


@pytest.mark.parametrize(
    ("rows", "classes", "threads", "at_once"),
    [(50_000, 100, 16, 16), (1_281_167, 1_000, 64, 4), (100_000, 21_841, 4, 2), (10, 2, 1, 1)],
)
def test_threads_hold_no_more_than_a_gigabyte_of_decoded_rows(
    rows: int, classes: int, threads: int, at_once: int
) -> None:
    assert threads_at_once(block_grid(rows, classes), classes, threads) == at_once


def test_block_keys_are_the_objects_zarr_writes(finished_cache: Path) -> None:
    spec = base_arrays(10)["prediction"]
    blocks = [BlockId(view, block) for view in range(3) for block in range(3)]
    keys = {block_key("prediction", spec, at) for at in blocks}
    keys |= {f"logits/c/{view}/{block}/0" for view, block in blocks}
    files = {str(p.relative_to(finished_cache)) for p in finished_cache.rglob("*") if p.is_file()}
    assert {name for name in files if re.match("(logits|prediction)/c/", name)} == keys
    log_distribution = rectified_arrays(materialise=True)["log_distribution"]
    assert block_key("x", log_distribution, BlockId(0, 7)) == "x/c/0/7/0"
