"""Datasets of WebDataset shards: tar files of images and their classes, read by offset."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets.compressed import (
    SAMPLED_MODES,
    check_command,
    common_mode,
)
from stages.inputs.datasets.dataset import (
    ImageDataset,
    PassedOver,
    Skip,
    Source,
    dataset,
    digest,
    fixed_sample,
    in_memory,
)
from stages.inputs.datasets.listing import not_taken
from stages.inputs.datasets.manifest import manifest_path, remembered_as
from stages.inputs.datasets.shards import common_folder, shards_of
from stages.inputs.datasets.skipping import blackened, skipped_numbers
from stages.inputs.datasets.tar_index import NO_LABEL, TarListing, index_shards
from stages.inputs.datasets.tar_reader import Shard, TarImages

CLASSES_FILE = "classes.txt"
"""Names of the classes, one a line, beside the shards or in the folder above."""


def _passed_over(source: Source) -> list[PassedOver]:
    shards = shards_of(source)
    return [
        PassedOver(shard.name, f"{count:,} {kind}")
        for shard in _listing(source, shards).shards
        for kind, count in shard.passed_over.items()
    ]


@dataset("wds:", passed_over=_passed_over, tested_elsewhere=True)
def web_dataset(source: Source) -> ImageDataset:
    """Shards of one split, in order, and in each the images in theirs. Raises DatasetError."""
    shards = shards_of(source)
    base, listing = common_folder(shards), _listing(source, shards)
    command = check_command(source.spec)
    if source.test is not None:
        command += f" --test {check_command(source.test)}"
    paths, labels = listing.paths, np.array(listing.labels, dtype=np.int64)
    labelled = _labelled(labels, paths, base, source)
    names = _class_names(source, listing) if labelled else ()
    if labelled and (above := np.flatnonzero(labels >= len(names))).size:
        raise DatasetError(
            f"the label of {base / paths[above[0]]} is {labels[above[0]]}, and there are "
            f"{len(names):,} classes",
            f"Name every class in {CLASSES_FILE}, a line each, beside the training shards.",
        )
    found, sizes = _left_out(source.skips, paths, listing.sizes, str(base))
    load = _loading(source, base, shards, listing, command, found)
    lines = (f"{path}\t{size}\n" for path, size in zip(paths, sizes, strict=True))
    return ImageDataset(
        "wds",
        source.split,
        names,
        torch.from_numpy(labels),
        load,
        in_memory(load, len(paths), source.feeding),
        digest(line.encode(errors="surrogateescape") for line in lines),
        not_taken(base, listing.passed_over, f"pipeline check-data {command}"),
        tuple(found),
        source.exif,
        labelled=labelled,
        in_order=True,
        jpeg_side=source.jpeg_side,
        decoder=source.decoder,
    )


# ---- details --------------------------------------------------------------------------------


def _listing(source: Source, shards: Sequence[Path]) -> TarListing:
    """What the shards hold, from the index that is remembered of them where they are the same."""
    base = common_folder(shards)
    labelled = not (source.no_labels and source.split == "train")
    names = [os.path.relpath(shard, base) for shard in shards]
    kind = "wds" if labelled else "wds without labels"
    path = manifest_path("\n".join([kind, *names]), base)
    return remembered_as(
        TarListing, path, base, lambda: index_shards(base, names, labelled), source.rescan
    )


def _labelled(labels: NDArray[np.int64], paths: Sequence[str], base: Path, source: Source) -> bool:
    """Whether the images have classes. Raises DatasetError where some have and others not, and for
    test images without.
    """
    without = np.flatnonzero(labels == NO_LABEL)
    if not without.size:
        return True
    some = base / paths[without[0]]
    if without.size < len(labels):
        raise DatasetError(
            f"{some} has no label, {len(labels) - without.size:,} other images have one",
            "A sample needs KEY.cls, or KEY.json with label or cls. Or use --no-labels.",
        )
    if source.split == "test":
        raise DatasetError(
            f"the test images of {source.spec} have no labels: {some}",
            "Give --test none, or labelled shards.",
        )
    return False


def _class_names(source: Source, listing: TarListing) -> tuple[str, ...]:
    """Those of the training shards, where there are any: as their file of names has them, else the
    numbers up to the highest label. Raises DatasetError.
    """
    shards = shards_of(source)
    if source.split == "test":
        with suppress(DatasetError):
            shards = shards_of(replace(source, split="train"))
    base = common_folder(shards)
    for folder in (base, base.absolute().parent):
        if (file := folder / CLASSES_FILE).is_file():
            return _names_in(file)
    labels, own = listing.labels, shards == shards_of(source)
    if not own:
        labels = _listing(replace(source, split="train", rescan=False), shards).labels
        own = max(labels) == NO_LABEL
        labels = listing.labels if own else labels
    if min(labels) == 1 and (source.split == "train" or not own):
        raise DatasetError(
            f"the labels of {base} begin with 1",
            f"Labels count from 0: subtract 1. If class 0 has no images, write {CLASSES_FILE}.",
        )
    return tuple(map(str, range(max(labels) + 1)))


def _names_in(file: Path) -> tuple[str, ...]:
    try:
        return tuple(file.read_text(encoding="utf-8").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"cannot read {file}: {error}", "It has the name of a class in each line, as UTF-8."
        ) from error


def _left_out(
    skips: Sequence[Skip], paths: Sequence[str], sizes: list[int], where: str
) -> tuple[list[Skip], list[int]]:
    """The samples of a skip list, each with its path, size and number; and the sizes of all images,
    of those in the list as it has them. Raises DatasetError.
    """
    named = {skip.path: skip for skip in reversed(skips) if skip.path is not None}
    numbers = {path: i for i, path in enumerate(paths) if path in named} if named else {}
    sizes = list(sizes)
    for path, skip in named.items():
        if path not in numbers:
            raise DatasetError(
                f"the skip list names {skip.name}, which is not among the images of {where}",
                "Correct the line, or remove it.",
            )
        sizes[numbers[path]] = sizes[numbers[path]] if skip.bytes is None else skip.bytes
    numbered = [
        skip if skip.path is None else Skip(skip.split, numbers[skip.path]) for skip in skips
    ]
    found = [skip.sample or 0 for skip in skipped_numbers(numbered, len(paths), where)]
    return [Skip(skips[0].split, i, paths[i], sizes[i]) for i in found], sizes


def _loading(
    source: Source,
    base: Path,
    shards: Sequence[Path],
    listing: TarListing,
    command: str,
    skips: Sequence[Skip],
) -> Callable[[int], Tensor]:
    """What decodes the images, black where they are left out."""
    stats = [(shard, os.stat(shard)) for shard in shards]
    known = tuple(
        Shard(str(shard.absolute()), stat.st_size, stat.st_mtime_ns) for shard, stat in stats
    )
    counts = [len(shard.members) for shard in listing.shards]
    offsets = [offset for shard in listing.shards for offset in shard.offsets]
    number = np.repeat(np.arange(len(counts)), counts)
    places = np.stack([number, np.array(offsets), np.array(listing.sizes)], 1).astype(np.int64)
    members = TarImages(base, known, tuple(listing.paths), places, command)
    left_out = {skip.sample for skip in skips}
    sampled = [i for i in fixed_sample(len(places))[:SAMPLED_MODES] if i not in left_out]
    mode = common_mode(map(members.compressed, sampled))
    members = replace(members, mode=mode, decoding=source.decoding)
    return blackened(members, skips, len(places))
