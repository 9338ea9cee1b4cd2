"""All metadata of a new store, and the arrays that are written once."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stages.cache import arrays, layout, root
from stages.cache.encoding import Encoding, encoding_attributes
from stages.cache.identity import Identity
from stages.cache.layout import ArraySpec
from stages.cache.location import Location


def all_arrays(num_classes: int, coding: Encoding) -> dict[str, ArraySpec]:
    """Every array at the root of a cache with this encoding."""
    return layout.base_arrays(num_classes) | coding.arrays() | coding.calibration_arrays()


def create_store(
    where: Location,
    identity: Identity,
    coding: Encoding,
    num_views: int,
    whole: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    block_rows: int,
) -> None:
    """Documents and whole arrays of a new cache; the root attributes come last and make it one.

    whole: the values of the arrays that are written once, by name. attributes: the root attributes
    beside identity and encoding.
    """
    classes = len(identity.dataset.class_names)
    samples = len(whole["dataset_index"])
    sizes = {
        "view": num_views,
        "sample": samples,
        "class": classes,
        "eval_sample": len(whole["eval_label"]),
        **coding.sizes,
    }
    grid = layout.block_grid(samples, classes, block_rows)
    group = root.unfinished_group(where)
    for name, spec in all_arrays(classes, coding).items():
        arrays.create_array(group, name, spec, sizes, grid)
    for name, values in whole.items():
        array = arrays.get_array(group, name)
        array[...] = values.numpy().astype(array.dtype)
    group.create_group("commits")
    group.create_group("rectified")
    root.write_attributes(
        group,
        {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            "identity": identity.to_json(),
            "identity_digest": identity.digest(),
            "encoding": encoding_attributes(coding),
            "shared_arrays": {
                name: arrays.array_digest(name, spec, whole[name])
                for name, spec in layout.base_arrays(classes).items()
                if name in whole
            },
            **attributes,
        },
    )
