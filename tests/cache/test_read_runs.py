"""Some rows of a view: the same answers as from the whole view, for the samples that were read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.cache import LogitCache, arrays
from stages.errors import CacheError

CHUNKS = [slice(334, 668), slice(0, 334), slice(668, 1000)]
CASES = {
    "one chunk": [CHUNKS[0]],
    "two, backwards": [CHUNKS[2], CHUNKS[1]],
    "all": CHUNKS,
    "across blocks": [slice(300, 700)],
    "one row": [slice(999, 1000)],
}


@pytest.fixture(scope="module")
def my_cache(rectified_cache: Path) -> LogitCache:
    """Three views of 1,000 rows in three blocks, with one rectification."""
    return LogitCache.open(rectified_cache)


@pytest.mark.parametrize("runs", CASES.values(), ids=CASES)
@pytest.mark.parametrize("view", [0, 2])
def test_the_same_answers(my_cache: LogitCache, runs: Sequence[slice], view: int) -> None:
    whole = my_cache.read_view(view, "pairwise-T4")
    some = my_cache.read_view(view, "pairwise-T4", runs)
    samples = torch.cat([my_cache.dataset_index[run] for run in runs])
    samples = samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(some.rows(samples), whole.rows(samples))
    assert torch.equal(some.wrong(samples), whole.wrong(samples))
    assert torch.equal(some.rectified_rows(samples), whole.rectified_rows(samples))


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("runs", CASES.values(), ids=CASES)
def test_views_are_read_in_pieces(
    my_cache: LogitCache, monkeypatch: pytest.MonkeyPatch, runs: Sequence[slice], chunks: int
) -> None:
    """Pieces of one chunk, of two, and as here a whole view in one go."""
    array = arrays.get_array(my_cache.group, "prediction")
    expected = torch.cat([torch.from_numpy(array[1, run].astype("int32")) for run in runs])
    asked: list[slice] = []

    def values(array: Any, view: int, piece: slice) -> torch.Tensor:
        asked.append(piece)
        return whole(array, view, piece)

    whole = arrays.read_values
    monkeypatch.setattr(arrays, "read_values", values)
    monkeypatch.setattr(arrays, "_PIECE_BYTES", chunks * 334 * 2)

    assert torch.equal(arrays.read_rows(array, 1, runs), expected)
    assert max(piece.stop - piece.start for piece in asked) <= chunks * 334
    assert all(piece.start % 334 == 0 or piece.start in {r.start for r in runs} for piece in asked)


def test_only_these_rows_are_held(my_cache: LogitCache) -> None:
    some = my_cache.read_view(1, "pairwise-T4", [CHUNKS[2]])
    assert {len(array) for array in some.arrays.values()} == {332}
    assert some.rectified is not None
    sizes = {len(t) for t in (some.labels, some.predictions, some.rectified.label_logit)}
    assert sizes == {332}
    held = [*some.arrays.values(), some.labels, some.predictions, some.row_of]
    held += [some.rectified.label_logit, some.rectified.predicted_logit]
    index = 8 * (332 + 1000)  # labels, and where each sample is
    assert sum(t.untyped_storage().nbytes() for t in held) == 332 * my_cache.row_bytes + index


@pytest.mark.parametrize("ask", ["rows", "wrong", "rectified_rows"])
def test_a_sample_that_was_not_read(my_cache: LogitCache, ask: str) -> None:
    some = my_cache.read_view(0, "pairwise-T4", [CHUNKS[0]])
    here, elsewhere = my_cache.dataset_index[400], my_cache.dataset_index[700]
    with pytest.raises(CacheError, match=f"sample {int(elsewhere)} is not among the rows"):
        getattr(some, ask)(torch.stack([here, elsewhere]))
