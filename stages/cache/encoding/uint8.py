"""One byte a logit, between the smallest and the largest of its row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stages.cache.encoding.base import ALONG_CLASSES, Encoding, check_range
from stages.cache.layout import ArraySpec

_LEVELS = 255


@dataclass(frozen=True)
class Uint8(Encoding):
    """logit = offset + scale * code, scale and offset of each row in half precision.

    The error of an entry is at most half a step, (largest - smallest) / 510, up to the rounding of
    scale and offset. Simple and dense; `klt` is smaller at the same KL.
    """

    name: ClassVar[str] = "uint8"

    def arrays(self) -> dict[str, ArraySpec]:
        return {
            "logits_code": ArraySpec(ALONG_CLASSES, "uint8"),
            "logits_scale": ArraySpec(("view", "sample"), "float16"),
            "logits_offset": ArraySpec(("view", "sample"), "float16"),
        }

    def encode(self, logits: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        half = torch.finfo(torch.float16)
        check_range(logits, half.max / 2, self.name)
        offset = logits.amin(1).half()
        # Codes are taken from the rounded offset and scale, so that their error is not added.
        span = (logits.amax(1) - offset.float()).clamp(min=0)
        scale = (span / _LEVELS * (1 + half.eps)).clamp(min=half.tiny).half()
        codes = ((logits - offset.float()[:, None]) / scale.float()[:, None]).round()
        return {
            "logits_code": codes.clamp(0, _LEVELS).to(torch.uint8),
            "logits_scale": scale,
            "logits_offset": offset,
        }

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        scale, offset = (arrays[f"logits_{n}"].float()[:, None] for n in ("scale", "offset"))
        return torch.addcmul(offset, arrays["logits_code"].float(), scale)
