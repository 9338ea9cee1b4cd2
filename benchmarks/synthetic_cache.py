"""Caches of synthetic logits (`imagenet_data.py`): samples with a label and no image."""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.imagenet_data import SyntheticTeacher
from stages.cache import LogitCache
from stages.cache.encoding import FIT_ROWS, fit_encoding
from stages.cache.identity import DatasetIdentity, Identity, TeacherIdentity, ViewsIdentity
from stages.cache.metadata import NewCache
from stages.inputs.counter_hash import permute
from stages.inputs.datasets.dataset import digest
from stages.settings import MAX_BLOCK_ROWS

CLASSES, TEST_SAMPLES = 100, 100


def labels_of(samples: int) -> Tensor:
    """int64 (samples,), sorted by class as folders are."""
    return torch.arange(samples) * CLASSES // samples


def new_cache(path: Path, views: int, samples: int, block_rows: int = MAX_BLOCK_ROWS) -> LogitCache:
    """A cache as `klt`, without any block."""
    order, labels = permute(torch.arange(samples), samples, 0), labels_of(samples)
    fitted, known = labels[order[:FIT_ROWS]], labels.to(torch.int32).numpy().tobytes()
    names = tuple(f"class {i}" for i in range(CLASSES))
    coding = fit_encoding("klt", SyntheticTeacher(CLASSES).block(0, 0, fitted), fitted)
    return LogitCache.create(
        path,
        NewCache(
            Identity(
                TeacherIdentity("synthetic", "synthetic", (0.5,), (0.5,), None),
                DatasetIdentity("synthetic", "train", samples, names, digest([known]), "none"),
                ViewsIdentity("none", {}, 1, 0),
                "float32",
            ),
            coding,
            views,
            order,
            labels,
            labels_of(TEST_SAMPLES),
            pixel_probes=[],
            provenance={"teacher": "synthetic logits, see benchmarks/imagenet_data.py"},
            block_rows=block_rows,
        ),
    )


def written_cache(path: Path, views: int, samples: int) -> LogitCache:
    """A cache with every block of its views."""
    cache, teacher = new_cache(path, views, samples), SyntheticTeacher(CLASSES)
    for view, block in ((v, b) for v in range(views) for b in range(cache.grid.num_blocks)):
        logits = teacher.block(view, block, cache.row_labels[cache.grid.rows(block)])
        cache.write_block(view, block, logits, logits.argmax(1), {})
    return LogitCache.open(path)
