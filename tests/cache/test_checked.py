"""What is read is what was written: every byte is compared with a digest, and read once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from damage import edit_record, flipped, harmed
from test_store import BLOCKS, SETTINGS, create, logits_of_view
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from stages.cache import LogitCache, arrays
from stages.cache.blocks import CheckedStore, checked, described
from stages.cache.layout import ArraySpec, BlockGrid, BlockId
from stages.errors import CacheError

SPEC = ArraySpec(("view", "sample", "class"), "uint8")  # of random bytes: no shard is compressed
GRID = BlockGrid(num_rows=1100, chunk_rows=100, chunks_per_block=6)  # the last chunk is not there


def shard(block: int = 0, seed: int = 0) -> tuple[torch.Tensor, bytes]:
    rows = GRID.length(block)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(256, (rows, 3), dtype=torch.uint8, generator=generator)
    return values, arrays.encode_shard(SPEC, GRID, block, values)


class Counting(WrapperStore[Any]):
    """Counts the bytes that are read, by itself and its copies."""

    def __init__(self, store: Any, sizes: list[int] | None = None) -> None:
        super().__init__(store)
        self.sizes: list[int] = [] if sizes is None else sizes

    def _with_store(self, store: Any) -> "Counting":
        return Counting(store, self.sizes)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        if value is not None and "/c/" in key:
            self.sizes.append(len(value))
        return value


# ---- parts of an object; tests/test_cache_format.py has their digests ------------------------


RUNS = {
    "all": [slice(0, 1100)],
    "a-block": [slice(0, 600)],
    "a-chunk": [slice(300, 400)],
    "rows-within": [slice(310, 320)],
    "two-chunks": [slice(0, 100), slice(900, 1000)],
    "across-blocks": [slice(550, 650)],
    "a-chunk-that-is-not-whole": [slice(1050, 1100)],
}


@pytest.fixture
def stored() -> tuple[torch.Tensor, Counting, dict[str, Any]]:
    """A view of two shards in memory; what their records say."""
    counting = Counting(MemoryStore())
    group = zarr.create_group(counting)
    sizes = {"view": 1, "sample": 1100, "class": 3}
    arrays.create_array(group, "a", SPEC, sizes, GRID)
    values, objects = [], {}
    for block in (0, 1):
        rows, content = shard(block, seed=block)
        key = f"a/c/0/{block}/0"
        sync(counting.set(key, default_buffer_prototype().buffer.from_bytes(content)))
        objects[key] = described(content, GRID.chunks_per_block)
        values.append(rows)
    return torch.cat(values), counting, objects


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_runs_of_rows_are_checked_and_read_once(
    stored: tuple[torch.Tensor, Counting, dict[str, Any]], runs: list[slice]
) -> None:
    values, counting, objects = stored
    array = arrays.get_array(zarr.open_group(counting, mode="r"), "a")
    expected = arrays.read_rows(array, 0, runs)
    unchecked = sorted(counting.sizes)
    counting.sizes.clear()

    found = arrays.read_rows(checked(array, objects), 0, runs)

    assert torch.equal(found, torch.cat([values[run] for run in runs]))
    assert torch.equal(found, expected)
    assert sorted(counting.sizes) == unchecked != []


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_whatever_bytes_are_read_are_compared(
    stored: tuple[torch.Tensor, Counting, dict[str, Any]], runs: list[slice]
) -> None:
    """Another shard of the same size, whole in itself: its checksums hold."""
    _, counting, objects = stored
    array = arrays.get_array(zarr.open_group(counting, mode="r"), "a")
    for block in (0, 1):
        _, other = shard(block, seed=9)
        key = f"a/c/0/{block}/0"
        assert len(other) == objects[key]["bytes"]
        sync(counting.set(key, default_buffer_prototype().buffer.from_bytes(other)))

    with pytest.raises(CacheError, match=r"a/c/0/[01]/0 is damaged: its sha256") as caught:
        arrays.read_rows(checked(array, objects), 0, runs)
    assert "--repair" in caught.value.remedy


def test_spans_that_are_no_parts_are_right_as_well(
    stored: tuple[torch.Tensor, Counting, dict[str, Any]],
) -> None:
    _, counting, objects = stored
    prototype, key = default_buffer_prototype(), "a/c/0/0/0"
    content = sync(counting.get(key, prototype)).to_bytes()  # type: ignore[union-attr]
    for asked, expected in (
        (RangeByteRequest(3, 77), content[3:77]),
        (RangeByteRequest(0, len(content)), content),
        (OffsetByteRequest(50), content[50:]),
        (SuffixByteRequest(9), content[-9:]),
    ):
        found = sync(CheckedStore(counting, objects).get(key, prototype, asked))
        assert found is not None
        assert found.to_bytes() == expected


HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda content: None,
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "flip": lambda content: flipped(content, 9),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_harmed_object_is_refused(tmp_path: Path, harm: Callable[[bytes], bytes | None]) -> None:
    _, content = shard()
    (tmp_path / "o").write_bytes(content)
    store = CheckedStore(LocalStore(tmp_path), {"o": described(content, 6)})
    with harmed(tmp_path / "o", harm(content)), pytest.raises(CacheError):
        sync(store.get("o", default_buffer_prototype()))
    assert sync(store.get("o", default_buffer_prototype())).to_bytes() == content  # type: ignore[union-attr]


# ---- a whole cache --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two caches of the same shapes with other contents, a rectification in each. Read only."""
    made = []
    for seed in (0, 100):
        cache = create(tmp_path_factory.mktemp("caches") / "c.zarr", other=bool(seed))
        rectification = cache.create_rectification("r", SETTINGS)
        for view in range(2):
            for block in range(BLOCKS):
                rows = cache.grid.rows(block)
                logits = logits_of_view(view + seed)[cache.dataset_index[rows]]
                cache.write_block(view, block, logits, logits.argmax(1), {})
                some = torch.randn(2, len(logits), generator=torch.Generator().manual_seed(view))
                values = dict(zip(("label_logit", "predicted_logit"), some + seed, strict=True))
                values["wrong"] = logits.argmax(1) != cache.row_labels[rows]
                rectification.blocks.write(BlockId(view, block), values, {})
            rectification.commits.compact(view)
        cache.write_eval_logits(torch.eye(4, 3) * (1 + seed), {})
        made.append(cache.path)
    return made[0], made[1]


def copied(caches: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
    mine, other = (Path(shutil.copytree(c, folder / n)) for c, n in zip(caches, "ab", strict=True))
    return mine, other


@pytest.mark.parametrize(
    ("key", "readers"),
    [
        ("logits/c/{}/0/0", "view runs block"),
        ("prediction/c/{}/0", "view runs block predictions"),
        ("rectified/r/label_logit/c/{}/0", "view runs"),
        ("rectified/r/predicted_logit/c/{}/0", "view runs"),
    ],
)
def test_objects_exchanged_between_views_are_refused(
    caches: tuple[Path, Path], tmp_path: Path, key: str, readers: str
) -> None:
    mine, _ = copied(caches, tmp_path)
    one, other = mine / key.format(0), mine / key.format(1)
    contents = one.read_bytes(), other.read_bytes()
    assert contents[0] != contents[1]
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    for name, read in {
        "view": lambda cache: cache.read_view(0, "r"),
        "runs": lambda cache: cache.read_view(0, "r", runs=[slice(0, 4)]),
        "block": lambda cache: cache.read_block(0, 0),
        "predictions": lambda cache: cache.predictions(0),
    }.items():
        if name in readers:
            with pytest.raises(CacheError, match=key.format(0)):
                read(LogitCache.open(mine))
        else:
            read(LogitCache.open(mine))


@pytest.mark.parametrize("array", ["dataset_index", "label", "eval_label"])
def test_shared_arrays_of_another_cache_are_refused_when_it_is_opened(
    caches: tuple[Path, Path], tmp_path: Path, array: str
) -> None:
    mine, other = copied(caches, tmp_path)
    shutil.copy(other / array / "c/0", mine / array / "c/0")
    with pytest.raises(CacheError, match=f"array '{array}' is damaged") as caught:
        LogitCache.open(mine)
    assert "--repair" in caught.value.remedy
    LogitCache.open(mine, check=False)


@pytest.mark.parametrize("array", ["eval_logits/c/0/0", "eval_prediction/c/0"])
def test_a_test_split_of_another_cache_is_refused(
    caches: tuple[Path, Path], tmp_path: Path, array: str
) -> None:
    mine, other = copied(caches, tmp_path)
    content = (other / array).read_bytes()
    if content == (mine / array).read_bytes():  # the same answers to other scales
        content = flipped(content, 10)
    (mine / array).write_bytes(content)
    cache = LogitCache.open(mine)
    with pytest.raises(CacheError, match=array):
        _ = cache.eval_logits(), cache.eval_predictions()


@pytest.mark.parametrize("parts", [[[1]], 7, [["x", "y"]], [[None, ""]]], ids=str)
def test_parts_that_make_no_sense_are_told(
    caches: tuple[Path, Path], tmp_path: Path, parts: object
) -> None:
    mine, _ = copied(caches, tmp_path)
    edit_record(mine, 0, lambda record: record["objects"]["logits/c/0/0/0"].update(parts=parts))
    with pytest.raises(CacheError, match="not readable"):
        LogitCache.open(mine).read_view(0)
