"""The logits themselves, in single or half precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stages.cache.encoding.base import ALONG_CLASSES, Encoding, check_range
from stages.cache.layout import ArraySpec


@dataclass(frozen=True)
class Float32(Encoding):
    """Exact; the default for up to 10 classes."""

    name: ClassVar[str] = "float32"
    dtype: ClassVar[torch.dtype] = torch.float32

    def arrays(self) -> dict[str, ArraySpec]:
        return {"logits": ArraySpec(ALONG_CLASSES, self.name)}

    def encode(self, logits: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        check_range(logits, torch.finfo(self.dtype).max, self.name)
        return {"logits": logits.to(self.dtype)}

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        return arrays["logits"].float()


@dataclass(frozen=True)
class Float16(Float32):
    """Half precision: 11 significant bits; KL to the exact row about 3e-7 at T=1."""

    name: ClassVar[str] = "float16"
    dtype: ClassVar[torch.dtype] = torch.float16
