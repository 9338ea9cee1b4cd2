"""How large rows of real logits are on disk, before a cache is made."""

import torch
import zarr
from torch import Tensor
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from stages.cache.arrays import create_array
from stages.cache.encoding import Encoding
from stages.cache.layout import base_arrays, block_grid


def row_bytes_on_disk(coding: Encoding, logits: Tensor) -> float:
    """Bytes a row and view: encoded, compressed and framed as a block would be, in memory.

    logits: float32 (n, C). Few rows overstate the size a little: their index weighs more.
    """
    rows, classes = logits.shape
    objects: dict[str, Buffer] = {}
    store = MemoryStore(objects)
    group = zarr.create_group(store)
    sizes = {"view": 1, "sample": rows, "class": classes}
    specs = coding.arrays() | {"prediction": base_arrays(classes)["prediction"]}
    values = coding.encode(logits) | {"prediction": logits.argmax(1)}
    for name, spec in specs.items():
        array = create_array(group, name, spec, sizes, block_grid(rows, classes))
        array[0] = values[name].to(getattr(torch, spec.dtype)).numpy()
    written = sum(len(content) for key, content in objects.items() if "/c/" in key)
    return written / rows
