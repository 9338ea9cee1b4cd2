"""Look at every image before hours are spent on them: what is broken, odd, twice there, not taken.

pipeline check-data folder:images --skip-out skip.txt
pipeline cache-teacher --dataset folder:images --skip skip.txt ...
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from stages.data import Splits
from stages.errors import DatasetError, refusals
from stages.files import replace_file
from stages.inputs.counter_hash import permute
from stages.inputs.datasets import ImageDataset, Source, Split, load_dataset, passed_over
from stages.inputs.datasets.compressed import Mode, decode, opened
from stages.inputs.datasets.dataset import without
from stages.inputs.datasets.listing import named_folder
from stages.reporting import Reporter, Silent

Kind = Literal["broken", "odd mode", "duplicate", "not taken"]
KINDS: tuple[Kind, ...] = ("broken", "odd mode", "duplicate", "not taken")
_AT_ONCE = 4096
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """Something about one file or sample. name: as a skip list has it; size: in bytes, if known."""

    split: Split
    kind: Kind
    name: str
    what: str
    size: int | None = None


@dataclass
class CheckedData:
    """What was found in how many images of each split."""

    images: dict[Split, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def broken(self) -> list[Finding]:
        """What was found of images that cannot be used."""
        return [finding for finding in self.findings if finding.kind == "broken"]

    def count(self, split: Split, kind: Kind) -> int:
        """How many findings of a kind a split has."""
        return sum(f.split == split and f.kind == kind for f in self.findings)


def check_data(
    spec: str,
    root: str | None = None,
    workers: int | None = None,
    amount: int | None = None,
    reporter: Reporter | None = None,
    test: str | None = None,
) -> CheckedData:
    """Decode the images of both splits, or a fixed sample of `amount` of each. workers: threads;
    None for one a core. test: what is tested on, if not the dataset's test split. Raises
    DatasetError for what is no dataset.
    """
    reporter, checked = reporter or Silent(), CheckedData()
    first: dict[str, tuple[str, int]] = {}
    splits: tuple[Split, ...] = ("train",) if test == "none" else ("train", "test")
    for split in splits:
        dataset = load_dataset(spec, split, root=root, feeding="stream", rescan=True, test=test)
        chosen = _chosen(dataset, amount)
        checked.images[split] = len(chosen)
        for done, (index, seen) in enumerate(_seen(dataset, chosen, workers), start=1):
            checked.findings += _findings(dataset, index, seen, first)
            reporter.progress(f"check {split}", done, len(chosen), "images")
        if split == "test" and dataset.tested_share:
            continue  # its files lie among those of the other split
        passed = passed_over(Source(spec, split, root, test=test))
        checked.findings += [Finding(split, "not taken", path, kind) for path, kind in passed]
    checked.findings.sort(key=lambda finding: KINDS.index(finding.kind))
    return checked


def check_sample(splits: Splits, amount: int | None, workers: int | None = None) -> None:
    """Decode some images of both splits, None for all, where they are not in memory already.

    Raises DatasetError if any is broken.
    """
    broken: list[Finding] = []
    command = ""
    for dataset in (splits.train, splits.test):
        if dataset.images is not None:
            continue
        for index, seen in _seen(dataset, _chosen(dataset, amount), workers):
            if seen.error is not None:
                broken += _findings(dataset, index, seen, {})
                command = seen.error.remedy
    if broken:
        more = f" and {len(broken) - _SHOWN:,} more" if len(broken) > _SHOWN else ""
        listed = "; ".join(f"{f.name} ({f.what})" for f in broken[:_SHOWN])
        raise DatasetError(f"{len(broken):,} images cannot be used: {listed}{more}", command)


def write_skip_list(file: str | Path, findings: Sequence[Finding]) -> int:
    """Add the broken images to a skip list, keeping what is there; return how many are new.

    Raises DatasetError if it cannot be written.
    """
    path = Path(file).expanduser()
    with refusals(DatasetError, f"cannot write {path}", "Choose another --skip-out."):
        there = path.read_bytes() if path.exists() else b""
        known = {line.partition(b"\t")[0].strip() for line in there.split(b"\n")}
        lines = [
            f"{f.name}\t{'' if f.size is None else f.size}\t{f.what}\n".encode()
            for f in findings
            if f.name.encode() not in known
        ]
        start = there or b"# Left out with --skip: a file or SPLIT:NUMBER, its bytes, why.\n"
        if lines:
            replace_file(path, [start, b"" if start.endswith(b"\n") else b"\n", *lines])
    return len(lines)


# ---- details --------------------------------------------------------------------------------


@runtime_checkable
class _Compressed(Protocol):
    """What loads compressed images. compressed: index -> (its file or bytes, its name)."""

    mode: Mode
    command: str

    def compressed(self, index: int) -> tuple[Path | bytes, str]: ...


@dataclass(frozen=True)
class _Seen:
    """digest: of the content, hex. mode: Pillow's, None where pixels are all there is."""

    digest: str = ""
    mode: str | None = None
    error: DatasetError | None = None


def _chosen(dataset: ImageDataset, amount: int | None) -> list[int]:
    size = len(dataset)
    drawn = torch.arange(size)
    if amount is not None and amount < size:
        drawn = permute(torch.arange(amount), size, 0).sort().values
    return [int(index) for index in without(drawn, dataset.skipped)]


def _seen(
    dataset: ImageDataset, chosen: Sequence[int], workers: int | None
) -> Iterator[tuple[int, _Seen]]:
    """Each image as it was found; files in threads, a user's own code in this one."""
    load = getattr(dataset.load, "load", dataset.load)  # as it is, also where samples are skipped
    if not isinstance(load, _Compressed):
        yield from ((index, _loaded(load, index)) for index in chosen)
        return
    threads = os.cpu_count() or 1 if workers is None else max(1, workers)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(chosen), _AT_ONCE):
            some = chosen[start : start + _AT_ONCE]
            yield from zip(some, pool.map(partial(_decoded, load), some), strict=True)


def _loaded(load: Any, index: int) -> _Seen:
    try:
        pixels = load(index).contiguous()
    except DatasetError as error:
        return _Seen(error=error)
    shape = str(tuple(pixels.shape)).encode()
    return _Seen(hashlib.sha256(shape + pixels.numpy().tobytes()).hexdigest())


def _decoded(load: _Compressed, index: int) -> _Seen:
    mode = None
    try:
        source, name = load.compressed(index)
        with opened(source, name, load.command) as image:  # also tells of what cannot be opened
            mode = image.mode
        content = source if isinstance(source, bytes) else source.read_bytes()
        decode(content, name, load.mode, load.command)
    except DatasetError as error:
        return _Seen(mode=mode, error=error)
    return _Seen(hashlib.sha256(content).hexdigest(), mode)


def _findings(
    dataset: ImageDataset, index: int, seen: _Seen, first: dict[str, tuple[str, int]]
) -> Iterator[Finding]:
    """What there is to say of an image. first: digest -> name and label of the first of its kind,
    which is kept up.
    """
    load: Any = getattr(dataset.load, "load", dataset.load)
    name, size = _name(dataset, load, index), None
    if seen.error is not None:
        source, shown = _source(load, index)
        if isinstance(source, bytes) and getattr(load, "paths", None) is not None:
            size = len(source)
        elif isinstance(source, Path) and source.exists():
            size = source.stat().st_size
        cause = seen.error.cause
        what = cause.partition(f"{shown}: ")[2] or cause.partition(f"{shown} ")[2] or cause
        yield Finding(dataset.split, "broken", name, what, size)
        return
    if seen.mode is not None and seen.mode != load.mode:
        what = f"{seen.mode}, shown as {load.mode}"
        yield Finding(dataset.split, "odd mode", name, what)
    label = int(dataset.labels[index])
    twin, twins_label = first.setdefault(seen.digest, (name, label))
    if twin != name:
        other = ", of another class" if label != twins_label else ""
        yield Finding(dataset.split, "duplicate", name, f"the same as {twin}{other}")


def _source(load: Any, index: int) -> tuple[Path | bytes | None, str]:
    """Where an image is read from, None where that is not known, and what errors call it."""
    if not isinstance(load, _Compressed):
        return None, ""
    try:
        return load.compressed(index)
    except DatasetError:
        return None, ""


def _name(dataset: ImageDataset, load: Any, index: int) -> str:
    """A sample as a skip list has it."""
    paths: tuple[str, ...] | None = getattr(load, "paths", None)
    if paths is not None:
        name = f"{named_folder(load.root.name, dataset.split)}/{paths[index]}"
        if name.isprintable():  # a line has room for it
            return name
    return f"{dataset.split}:{index}"
