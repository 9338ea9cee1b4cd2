"""Logits <-> stored arrays: one frozen class an encoding.

Each has `arrays()` (what lies in the store), `encode` (float32 rows -> arrays) and `decode` (the
way back, on whatever device the arrays are). Rows are independent of each other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from stages.cache.layout import ArraySpec
from stages.errors import CacheError


class Encoding(Protocol):
    """How rows of logits are stored."""

    name: ClassVar[str]

    def arrays(self) -> dict[str, ArraySpec]: ...
    def encode(self, logits: Tensor) -> dict[str, Tensor]: ...
    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Float32:
    """The logits themselves. Exact; the default for up to 10 classes."""

    name: ClassVar[str] = "float32"
    dtype: ClassVar[torch.dtype] = torch.float32

    def arrays(self) -> dict[str, ArraySpec]:
        return {"logits": ArraySpec(("view", "sample", "class"), self.name)}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """float32 (n, C) -> arrays. Raises CacheError where a logit does not fit the dtype."""
        limit = torch.finfo(self.dtype).max
        if logits.numel() and (largest := float(logits.abs().max())) > limit:
            raise CacheError(
                f"a teacher logit of {largest:.3g} does not fit in {self.name}",
                "Use --encoding float32.",
            )
        return {"logits": logits.to(self.dtype)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """arrays -> float32 (n, C)."""
        return arrays["logits"].float()


@dataclass(frozen=True)
class Float16(Float32):
    """Half precision: 11 significant bits; KL to the exact row about 3e-7 at T=1."""

    name: ClassVar[str] = "float16"
    dtype: ClassVar[torch.dtype] = torch.float16


ENCODINGS: dict[str, type[Encoding]] = {"float32": Float32, "float16": Float16}


def encoding(name: str, num_classes: int) -> Encoding:
    """The encoding of this name; `auto` is float32 up to 10 classes and float16 above."""
    if name == "auto":
        name = "float32" if num_classes <= 10 else "float16"
    if name not in ENCODINGS:
        raise CacheError(f"unknown encoding '{name}'", f"Known: auto, {', '.join(ENCODINGS)}.")
    return ENCODINGS[name]()


def row_bytes(coding: Encoding, num_classes: int) -> int:
    """Bytes of one encoded row before compression."""
    return sum(
        math.prod(spec.shape({"view": 1, "sample": 1, "class": num_classes}))
        * getattr(torch, spec.dtype).itemsize
        for spec in coding.arrays().values()
    )
