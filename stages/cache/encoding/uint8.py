"""One byte a logit, between the smallest and the largest of its row."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.cache.encoding.base import A_ROW, ALONG_CLASSES, Encoding, check_span, encoding
from stages.cache.layout import ArraySpec

_LEVELS = 255


@encoding("uint8")
@dataclass(frozen=True)
class Uint8(Encoding):
    """logit = offset + scale * code: the offset of a row, its smallest logit, in single precision,
    the scale in half.

    The error of an entry is at most half a step, (largest - smallest) / 510, up to the rounding of
    the scale. Simple and dense; `klt` is smaller at the same KL.
    """

    def arrays(self) -> dict[str, ArraySpec]:
        return {
            "logits_code": ArraySpec(ALONG_CLASSES, "uint8"),
            "logits_scale": ArraySpec(A_ROW, "float16"),
            "logits_offset": ArraySpec(A_ROW, "float32"),
        }

    def encode(
        self, logits: Tensor, labels: Tensor | None = None, predictions: Tensor | None = None
    ) -> dict[str, Tensor]:
        half = torch.finfo(torch.float16)
        check_span(logits, half.max * _LEVELS / 2, self.name)
        offset = logits.float().amin(1)
        # Codes are taken from the rounded scale, so that its error is not added.
        span = logits.amax(1) - offset
        scale = (span / _LEVELS * (1 + half.eps)).clamp(min=half.tiny).half()
        codes = ((logits - offset[:, None]) / scale.float()[:, None]).round()
        return {
            "logits_code": codes.clamp(0, _LEVELS).to(torch.uint8),
            "logits_scale": scale,
            "logits_offset": offset,
        }

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        scale, offset = (arrays[f"logits_{n}"].float()[:, None] for n in ("scale", "offset"))
        return torch.addcmul(offset, arrays["logits_code"].float(), scale)
