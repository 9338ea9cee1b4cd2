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
    prediction_dtype,
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
    ("rows", "classes", "max_rows", "lengths"),
    [
        pytest.param(50_000, 100, 65_536, [50_000], id="cifar-100-is-one-block"),
        pytest.param(1000, 10, 350, [334, 334, 332], id="even-blocks"),
        pytest.param(1, 10, 65_536, [1], id="one-row"),
        pytest.param(10, 10, 1, [1] * 10, id="a-row-a-block"),
        pytest.param(3, 2**27, 65_536, [1, 1, 1], id="bytes-decide"),
    ],
)
def test_block_lengths(rows: int, classes: int, max_rows: int, lengths: list[int]) -> None:
    grid = block_grid(rows, classes, max_rows)

    assert [grid.length(b) for b in range(grid.num_blocks)] == lengths


@pytest.mark.parametrize(
    ("rows", "classes", "threads", "at_once"),
    [(50_000, 100, 16, 16), (1_281_167, 1_000, 64, 4), (100_000, 21_841, 4, 2), (10, 2, 1, 1)],
)
def test_threads_hold_no_more_than_a_gigabyte_of_decoded_rows(
    rows: int, classes: int, threads: int, at_once: int
) -> None:
    assert threads_at_once(block_grid(rows, classes), classes, threads) == at_once


def test_block_keys_are_the_objects_zarr_writes(finished_cache: Path) -> None:
    specs = {"prediction": base_arrays(10)["prediction"]}
    keys = {
        block_key(name, spec, BlockId(view, block))
        for name, spec in specs.items()
        for view in range(3)
        for block in range(3)
    } | {f"logits/c/{view}/{block}/0" for view in range(3) for block in range(3)}

    files = {str(p.relative_to(finished_cache)) for p in finished_cache.rglob("*") if p.is_file()}
    assert {name for name in files if re.match("(logits|prediction)/c/", name)} == keys


@pytest.mark.parametrize(
    ("name", "view", "block", "key"),
    [
        pytest.param("wrong", 12, 3, "wrong/c/12/3", id="two-dimensions"),
        pytest.param("log_distribution", 0, 7, "log_distribution/c/0/7/0", id="three"),
    ],
)
def test_block_key(name: str, view: int, block: int, key: str) -> None:
    assert block_key(name, rectified_arrays(materialise=True)[name], BlockId(view, block)) == key


@pytest.mark.parametrize(
    ("classes", "dtype"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_predictions_fit_their_dtype(classes: int, dtype: str) -> None:
    assert prediction_dtype(classes) == dtype
