"""Make golden caches: one for each encoding and one of mixed views, and what they must say.

    python tests/golden/make.py NAME...

Run once for each name of `CACHES`; what is committed stays. `truth.npz` is the teacher's own
float32 logits, taken before any encoding: `<cache>-<view>` (N, C) in dataset order, and of the test
split `<cache>-test` (M, C), for the first caches, which had one teacher, `test`.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from stages.cache_teacher import cache_teacher
from stages.data import Splits, load_data
from stages.rectify import rectify
from stages.settings import (
    CacheConfig,
    DataSettings,
    ModelSettings,
    RectifyConfig,
    TeacherConfig,
    TeacherSettings,
    TrainSettings,
)
from stages.teacher.job import prepare
from stages.teacher.logits import TeacherPass
from stages.train_teacher import train_teacher

HERE = Path(__file__).parent.absolute()
CACHES = {
    "float32": ("float32", "pad-crop:pad=1"),
    "float16": ("float16", "pad-crop:pad=1"),
    "uint8": ("uint8", "pad-crop:pad=1"),
    "klt": ("klt", "pad-crop:pad=1"),
    "klt-top": ("klt:top=3", "pad-crop:pad=1"),
    "klt-anchored": ("klt-anchored:top=3", "pad-crop:pad=1"),
    "topk": ("topk:k=3,temperatures=1/4", "pad-crop:pad=1"),
    "mixed": ("float16", "pad-crop:pad=1+mixup"),
}
VIEWS, SAMPLES, TEST = 2, 24, 10


def first(splits: Splits) -> Splits:
    """A few images of each split."""

    def some(dataset, size):  # type: ignore[no-untyped-def]
        images, labels = dataset.images[:size], dataset.labels[:size]
        return dataclasses.replace(dataset, labels=labels, images=images, load=images.__getitem__)

    return Splits(some(splits.train, SAMPLES), some(splits.test, TEST))


def main() -> None:
    torch.set_num_threads(1)
    data = DataSettings(dataset="digits", workers=0)
    whole = load_data(data)
    teacher = TeacherConfig(
        data=data,
        model=ModelSettings(architecture="resnet8"),
        augment="pad-crop:pad=1",
        train=TrainSettings(epochs=2),
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that provenance has no path of this machine
        train_teacher(teacher, Path("teacher"), splits=whole)
        with np.load(HERE / "truth.npz") as known:
            truth = dict(known)
        for name in sys.argv[1:]:
            encoding, augment = CACHES[name]
            config = CacheConfig(
                data=data,
                teacher=TeacherSettings(weights="teacher"),
                views=VIEWS,
                augment=augment,
                encoding=encoding,
                block_rows=12,
                device="cpu",
            )
            job = prepare(config, first(whole))
            cache_teacher(job, f"{name}.zarr")
            if name != "mixed":
                rectify(f"{name}.zarr", RectifyConfig())
                rectify(f"{name}.zarr", RectifyConfig(method="swap"))
            teacher = TeacherPass.of(job)
            for view in range(VIEWS):
                samples = torch.arange(SAMPLES)
                truth[f"{name}-{view}"] = teacher.logits(samples, view).numpy()
            truth[f"{name}-test"] = TeacherPass.on_test(job).logits(torch.arange(TEST), 0).numpy()
            shutil.rmtree(HERE / f"{name}.zarr", ignore_errors=True)
            shutil.copytree(f"{name}.zarr", HERE / f"{name}.zarr")
        truth["train_labels"] = first(whole).train.labels.numpy()
        truth["test_labels"] = first(whole).test.labels.numpy()
        np.savez_compressed(HERE / "truth.npz", **truth)


if __name__ == "__main__":
    main()
