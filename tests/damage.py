"""What can happen to the files of a cache, and everything that a reader can get out of it."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.metadata import sealed
from stages.cache.records import seal_records, unsealed
from stages.errors import CacheError
from stages.verify import verify

Change = Callable[[dict[str, Any]], object]


def tree(store: Path) -> dict[str, bytes]:
    """Every file under a folder: relative path -> content."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def same_content(key: str, one: bytes | None, other: bytes | None) -> bool:
    """Whether two files hold the same; of a document of Zarr, whether it says the same: white space
    may differ.
    """
    if one == other or one is None or other is None or not key.endswith("zarr.json"):
        return one == other
    try:
        first, second = (json.dumps(json.loads(text), sort_keys=True) for text in (one, other))
    except ValueError:
        return False
    return first == second


@contextmanager
def harmed(file: Path, content: bytes | None) -> Iterator[None]:
    """A file with another content, or without it; as it was afterwards."""
    before = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def at_call(number: int, error: type[BaseException], work: Callable[..., Any]) -> Any:
    """The same function, but for one call: the `number`-th ends in an error."""
    calls = itertools.count(1)

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == number:
            raise error
        return work(*arguments)

    return interrupted


def flipped(content: bytes, at: int, mask: int = 1) -> bytes:
    """The content with one byte changed."""
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


def flip(file: Path, at: float = 0.5) -> None:
    """Change one byte of a file. at: where, in [0, 1)."""
    content = file.read_bytes()
    file.write_bytes(flipped(content, int(at * len(content))))


def everything(
    path: str | Path, views: int = 2, rectified: str | None = "pairwise-T4"
) -> list[Tensor]:
    """Whatever a reader gets: labels, order, the test split, every row of every view."""
    cache = LogitCache.open(path)
    samples = torch.arange(cache.num_samples)
    found = [cache.labels, cache.dataset_index, *cache.eval_logits()]
    for view in range(views):
        targets = cache.read_view(view, rectified)
        found += [targets.rows(samples), targets.predictions, targets.wrong(samples)]
        if rectified is not None:
            found.append(targets.rectified_rows(samples))
    return found


def values(found: dict[str, bytes]) -> dict[str, bytes]:
    """All but the commit records, which may lie there twice: compaction was interrupted."""
    return {key: content for key, content in found.items() if not key.startswith("commits/")}


def records(path: str | Path) -> list[dict[tuple[int, int], dict[str, Any]]]:
    """What is committed, compacted or not."""
    cache = LogitCache.open(path)
    parts = [cache.commits, cache.eval_commits, cache.rectification("pairwise-T4").commits]
    return [dict(sorted(part.records.items())) for part in parts]


def found_by_verify(store: Path) -> bool:
    """Whether verify reports something, as faults or, where nothing can be believed, as an error.
    Any other error comes through.
    """
    try:
        return bool(verify(store, threads=1).faults)
    except CacheError:
        return True


def same(found: list[Tensor], truth: list[Tensor]) -> bool:
    """Whether two readers got the same."""
    return len(found) == len(truth) and all(map(torch.equal, found, truth))


def refused_or_true(path: str | Path, truth: list[Tensor]) -> bool:
    """Whether a reader gets a CacheError or the truth; any other error comes through."""
    try:
        return same(everything(path), truth)
    except CacheError:
        return True


# ---- damage that somebody took care to hide -------------------------------------------------


def edit_json(file: Path, change: Change) -> None:
    """Change a JSON document and write it as Zarr does."""
    document = json.loads(file.read_bytes())
    change(document)
    file.write_bytes(json.dumps(document, indent=2).encode())


def edit_attributes(store: Path, change: Change, group: str = "") -> None:
    """Change the attributes of a group and seal them again; of the root, their copy as well."""

    def sealed_again(document: dict[str, Any]) -> None:
        change(document["attributes"])
        document["attributes"] = sealed(document["attributes"])

    edit_json(store / group / "zarr.json", sealed_again)
    if not group:
        attributes = json.loads((store / "zarr.json").read_bytes())["attributes"]
        (store / "commits" / "attributes.json").write_bytes(seal_records([attributes]))


def edit_record(
    store: Path, block: int, change: Change, view: int = 0, part: str = "logits"
) -> None:
    """Change the record of one block of a complete view and seal it again."""
    file = store / "commits" / part / f"v{view:05d}.json"
    records = unsealed(file.read_bytes())
    change(records[block])
    file.write_bytes(seal_records(records))
