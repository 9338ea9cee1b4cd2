"""What a cache was made from, loaded again by what it says of itself."""

from pathlib import Path

import msgspec

from stages.cache import metadata
from stages.cache.arrays import open_group
from stages.cache.identity import differences, identity_from_json
from stages.cache.metadata import RootAttributes
from stages.cache.storage import Location, location
from stages.errors import (
    CacheError,
    ChangedImagesError,
    DatasetError,
    IdentityError,
    ModelError,
    PipelineError,
)
from stages.inputs.checkpoints import weights_file
from stages.inputs.datasets.shards import fixed_folder
from stages.settings import CacheConfig
from stages.teacher.job import Begun, CacheJob, prepare
from stages.user_code import FOLDERS, check_trusted

_CHANGED = ("dataset.images: ", "dataset.num_samples: ", "dataset.labels: ")
"""Of an identity, what another content of the same dataset changes."""


def recorded_job(
    path: str | Location,
    dataset: str | None = None,
    root: str | None = None,
    weights: str | None = None,
    device: str | None = None,
) -> CacheJob:
    """What stage one had when it made a cache, loaded again; the arguments say what has moved.

    Raises CacheError if the cache does not say how it was made, DatasetError or ModelError if that
    is not there, ChangedImagesError if the images are others or cannot be read any more,
    IdentityError if this is another dataset or teacher, and what `prepare` raises.
    """
    where = location(path)
    try:
        recorded = trusted_attributes(where)
        config = msgspec.convert(recorded.provenance["config"], CacheConfig)
    except (KeyError, msgspec.ValidationError) as error:
        raise CacheError(
            f"{where} does not say how it was made: {error}",
            "Run `pipeline cache-teacher` with the settings it was made with.",
        ) from error
    source = f"cache {where}"
    check_trusted(source, policy=config.augment, name=config.teacher.architecture)
    check_trusted(source, name=None if dataset else config.data.dataset)
    if config.data.eval_dataset:
        check_trusted(source, name=config.data.eval_dataset)
    replace = msgspec.structs.replace
    moved = {"dataset": dataset, "root": root}
    config = replace(
        config,
        data=replace(config.data, skip=None, **{k: v for k, v in moved.items() if v is not None}),
        teacher=replace(config.teacher, weights=weights or config.teacher.weights),
        device=device or "auto",
    )
    _check_places(where, config)
    try:
        job = prepare(config, begun=Begun.of(recorded, str(where)))
    except DatasetError as error:
        if dataset is None and config.data.dataset.startswith(FOLDERS):
            raise ChangedImagesError(error.cause, error.remedy) from error
        raise
    check_teacher(where, job)
    return job


def _check_places(where: Location, config: CacheConfig) -> None:
    """Raise DatasetError or ModelError, naming the option that helps, if what a cache was made from
    does not lie there.
    """
    weights, dataset, root = config.teacher.weights, config.data.dataset, config.data.root
    places: list[tuple[type[PipelineError], str, Path, str]] = []
    if weights is not None and weights != "pretrained":
        places.append((ModelError, "the weights", weights_file(weights)[0], "--weights"))
    if dataset.startswith(FOLDERS):
        kind, _, folder = dataset.partition(":")
        place = Path(fixed_folder(folder) if kind == "wds" else folder)
        places.append((DatasetError, "the dataset", place, f"--dataset {kind}:DIR"))
    if root is not None:
        places.append((DatasetError, "the dataset's root", Path(root), "--root"))
    for error, what, place, option in places:
        if not place.expanduser().exists():
            seen_from = "" if place.is_absolute() else f", which is {place.absolute()} from here"
            raise error(
                f"{what} of {where} should lie at {place}{seen_from}: nothing is there",
                f"Say with {option} where that is now, or go to the folder that the cache was made "
                "from.",
            )


def check_teacher(path: str | Location, job: CacheJob) -> None:
    """Raise IdentityError unless this teacher and this dataset made the cache."""
    attributes = trusted_attributes(location(path))
    theirs = identity_from_json(attributes.identity, str(path))
    if differing := differences(job.identity, theirs):
        changed = all(name.startswith(_CHANGED) for name in differing)
        raise (ChangedImagesError if changed else IdentityError)(
            f"{path} was made from something else: {'; '.join(differing[:3])}",
            "Give the --dataset and the --weights that it was made from.",
        )


def trusted_attributes(where: Location, mend: bool = False) -> RootAttributes:
    """The root attributes, or their copy where they are damaged; `mend` writes it back."""
    try:
        return metadata.read_attributes(where, open_group(where).attrs.asdict())
    except CacheError as error:
        copy = metadata.copied_attributes(where)
        if copy is None:
            raise CacheError(
                f"{where} cannot be repaired, its root attributes are damaged or not a cache's: "
                f"{error.cause}",
                "Copy zarr.json from another copy of this cache, or cache again.",
            ) from error
        attributes = metadata.read_attributes(where, copy)
        if mend:
            metadata.restore_attributes(where, copy)
        return attributes
