"""Several small codes in a byte: digits of a number in an odd base, around 0."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """byte = sum over i of (code[i] + limit) * base^i, for `digits` neighbouring codes within
    ±limit; base = 2 limit + 1.
    """

    digits: int
    limit: int

    def pack(self, codes: Tensor) -> Tensor:
        """Codes (n, k) of any dtype -> uint8 (n, ceil(k / digits)); missing codes count as 0, those
        beyond the limit as the limit.
        """
        whole = codes.clamp(-self.limit, self.limit).to(torch.int16) + self.limit
        whole = torch.nn.functional.pad(whole, (0, -codes.shape[1] % self.digits), value=self.limit)
        whole = whole.unflatten(1, (-1, self.digits))
        weighted = [whole[..., i] * (2 * self.limit + 1) ** i for i in range(self.digits)]
        return torch.stack(weighted).sum(0).to(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 (n, b) -> float32 (n, b digits). Without any tensor but these: nothing has to be on
        a device before a CUDA graph is captured.
        """
        base, found = 2 * self.limit + 1, []
        for _ in range(self.digits):
            found.append(packed % base)
            packed = packed // base
        return torch.stack(found, dim=2).flatten(1).float() - self.limit


PAIRS, THREES, FIVES = Packing(2, 7), Packing(3, 2), Packing(5, 1)
"""15^2, 5^3 and 3^5 are at most 256."""
