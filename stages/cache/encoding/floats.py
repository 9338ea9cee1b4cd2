"""The logits themselves, in single or half precision."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.cache.encoding.base import (
    A_ROW,
    ALONG_CLASSES,
    Encoding,
    check_range,
    check_span,
    encoding,
)
from stages.cache.layout import ArraySpec


@encoding("float32")
@dataclass(frozen=True)
class Float32(Encoding):
    """Exact; the default for up to 10 classes: a row is small as it is."""

    default_up_to = 10

    def arrays(self) -> dict[str, ArraySpec]:
        return {"logits": ArraySpec(ALONG_CLASSES, "float32")}

    def encode(
        self, logits: Tensor, labels: Tensor | None = None, predictions: Tensor | None = None
    ) -> dict[str, Tensor]:
        check_range(logits, torch.finfo(torch.float32).max, self.name)
        return {"logits": logits.float()}

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        return arrays["logits"].float()


@encoding("float16")
@dataclass(frozen=True)
class Float16(Encoding):
    """logit = offset + difference, the offset a row's largest logit in single precision, the
    difference in half: 11 significant bits of the distance to the largest, whatever the offset. KL
    to the exact row about 1e-7 at T=1.
    """

    def arrays(self) -> dict[str, ArraySpec]:
        return {
            "logits": ArraySpec(ALONG_CLASSES, "float16"),
            "logits_offset": ArraySpec(A_ROW, "float32"),
        }

    def encode(
        self, logits: Tensor, labels: Tensor | None = None, predictions: Tensor | None = None
    ) -> dict[str, Tensor]:
        check_span(logits, torch.finfo(torch.float16).max, self.name)
        largest = logits.float().amax(1)
        return {"logits": (logits - largest[:, None]).half(), "logits_offset": largest}

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        return arrays["logits"].float() + arrays["logits_offset"][:, None]
