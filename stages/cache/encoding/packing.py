"""Several small codes in a byte: digits of a number in an odd base, around 0."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding


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

    def table(self, device: torch.device | None = None) -> Tensor:
        """The codes of every byte: float32 (256, digits)."""
        byte, base = torch.arange(256, device=device), 2 * self.limit + 1
        codes = [byte // base**i % base - self.limit for i in range(self.digits)]
        return torch.stack(codes, dim=1).float()

    def unpack(self, packed: Tensor, table: Tensor) -> Tensor:
        """uint8 (n, b) -> float32 (n, b digits). table: as `table` gives it, on the same device."""
        return embedding(packed.int(), table).flatten(1)


PAIRS, THREES, FIVES = Packing(2, 7), Packing(3, 2), Packing(5, 1)
"""15^2, 5^3 and 3^5 are at most 256."""
