"""What people do instead, as simply as it can be said: three ways to keep a teacher's rows, the
released code's way to rectify them, and torchvision's way to augment.

Simple on purpose, in one process and without loader workers, as the slab that they are compared
with is. None is a copy of a project's code; each keeps what the project it is named after keeps.
"""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

BATCH = 256
KEPT = 10


class Baseline(Protocol):
    """Rows on a disk. `batches`: of samples in an order, int64 (n,), float32 (B, C) each."""

    def batches(self, order: Tensor) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class FilePerSample:
    """One torch.save of a row for each sample, as torchdistill's cache was."""

    folder: Path

    @staticmethod
    def write(logits: NDArray[np.float32], folder: Path) -> "FilePerSample":
        (folder / "files").mkdir()
        for sample, row in enumerate(torch.from_numpy(logits)):
            torch.save(row.clone(), folder / "files" / f"{sample}.pt")
        return FilePerSample(folder / "files")

    def batches(self, order: Tensor) -> Iterator[Tensor]:
        for part in order.split(BATCH):
            files = (self.folder / f"{sample}.pt" for sample in part.tolist())
            yield torch.stack([torch.load(file, weights_only=True) for file in files])


@dataclass(frozen=True)
class PicklePerImage:
    """One pickle an image with the ten largest probabilities and the crop, as FKD keeps them; the
    rest of a row is spread evenly. Gives probabilities.
    """

    folder: Path
    classes: int

    @staticmethod
    def write(logits: NDArray[np.float32], folder: Path) -> "PicklePerImage":
        (folder / "pickles").mkdir()
        crop = np.array([0.0, 0.0, 1.0, 1.0], dtype=np.float32)
        for sample, (index, value) in enumerate(zip(*largest(logits), strict=True)):
            kept = {"index": index, "value": value, "crop": crop, "flip": False}
            (folder / "pickles" / f"{sample}.pkl").write_bytes(pickle.dumps(kept, protocol=5))
        return PicklePerImage(folder / "pickles", logits.shape[1])

    def batches(self, order: Tensor) -> Iterator[Tensor]:
        for part in order.split(BATCH):
            files = (self.folder / f"{sample}.pkl" for sample in part.tolist())
            kept = [pickle.loads(file.read_bytes()) for file in files]
            index, value = (np.stack([one[name] for one in kept]) for name in ("index", "value"))
            yield whole_rows(index, value, self.classes)


@dataclass(frozen=True)
class RecordsBySeek:
    """Records of one size in one file, each found by a seek: a seed, ten probabilities and their
    classes in 44 bytes, as TinyViT keeps them; the rest is spread evenly. Gives probabilities.
    """

    path: Path
    classes: int

    @staticmethod
    def _record(classes: int) -> np.dtype[np.void]:
        kept = min(KEPT, classes)
        return np.dtype(
            [("seed", "<i4"), ("value", "<f2", (kept,)), ("index", "<i2", (kept,))], align=False
        )

    @staticmethod
    def write(logits: NDArray[np.float32], folder: Path) -> "RecordsBySeek":
        classes = logits.shape[1]
        records = np.zeros(len(logits), RecordsBySeek._record(classes))
        records["index"], records["value"] = largest(logits)
        (folder / "records.bin").write_bytes(records.tobytes())
        return RecordsBySeek(folder / "records.bin", classes)

    def batches(self, order: Tensor) -> Iterator[Tensor]:
        record = self._record(self.classes)
        with self.path.open("rb") as file:
            for part in order.split(BATCH):
                found = []
                for sample in part.tolist():
                    file.seek(sample * record.itemsize)
                    found.append(file.read(record.itemsize))
                records = np.frombuffer(b"".join(found), record)
                yield whole_rows(records["index"], records["value"], self.classes)


def largest(logits: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.float16]]:
    """The classes and the probabilities of each row's ten largest logits: (N, k) each."""
    best = torch.softmax(torch.from_numpy(logits), dim=1).topk(min(KEPT, logits.shape[1]))
    return best.indices.numpy().astype(np.int16), best.values.numpy().astype(np.float16)


def whole_rows(index: NDArray[np.int16], value: NDArray[np.float16], classes: int) -> Tensor:
    """float32 (n, C): probabilities that are known, and an even share of the rest elsewhere."""
    values = torch.from_numpy(value.astype(np.float32))
    even = (1 - values.sum(1, keepdim=True)).clamp(min=0) / max(1, classes - index.shape[1])
    rows: Tensor = even.expand(-1, classes).contiguous()
    rows.scatter_(1, torch.from_numpy(index.astype(np.int64)), values)
    return rows


def rectified_row_by_row(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Pairwise rectification in a Python loop over rows, as the released training code does it:
    float32 (n, C) probabilities.
    """
    rows = torch.softmax(logits / temperature, dim=1)
    for row, label in zip(rows, labels, strict=True):
        predicted = row.argmax()
        if predicted != label:
            pair = row[label] + row[predicted]
            new_label = pair * (row[label] + 1) / (pair + 1)
            row[predicted] = pair * row[predicted] / (pair + 1)
            row[label] = new_label
    return rows


def augmented_one_by_one(images: Tensor, samples: Sequence[int], pad: int) -> Iterator[Tensor]:
    """torchvision's crop and flip, image by image: uint8 (B, C, H, W). From torch's generators."""
    size = tuple(images.shape[-2:])
    augment = v2.Compose([v2.RandomCrop(size, padding=pad), v2.RandomHorizontalFlip()])
    for start in range(0, len(samples), BATCH):
        yield torch.stack([augment(images[sample]) for sample in samples[start : start + BATCH]])
