"""How far decoded rows are from the exact ones."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from stages.cache.encoding.base import Budget, Encoding
from stages.cache.layout import BlockGrid
from stages.sizes import KL_TEMPERATURES

TEMPERATURES = KL_TEMPERATURES
_LEADING = 5
_FIRST, _GUESSES, _LEAST = 96, 8, 2.0**-60
"""Of the search for a step: the first exponent, how many are guesses, and the least excess."""
_CHECKED, _LEAST_ROWS, _MOST_ROWS = 2**22, 256, 4096


def checked_rows(num_classes: int) -> int:
    """How many rows of a block its fidelity is measured on: 4,096, of more than 1,024 classes fewer
    (256 at the least), so that double precision takes no more than the block itself.
    """
    return max(_LEAST_ROWS, min(_MOST_ROWS, _CHECKED // num_classes))


def rows_of_a_view(grid: BlockGrid, num_classes: int, skipped: Tensor) -> int:
    """How many rows of a view its fidelity is measured on. skipped: int64, the rows that are left
    out.
    """
    most, last = checked_rows(num_classes), grid.num_blocks - 1
    rows = last * min(most, grid.block_rows) + min(most, grid.length(last))
    for block, left_out in Counter((skipped // grid.block_rows).tolist()).items():
        length = grid.length(block)
        rows -= min(most, length) - min(most, length - left_out)
    return rows


class Fidelity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured on `rows` rows. KL(exact || decoded) of softmax(z / T), in nats, for each
    temperature: its mean and its 99.9 % quantile. top1_agreement: share of rows whose argmax
    survives. saturated: rows with a code at the end of its range. top5_agreement: share of rows
    whose five leading classes lead the decoded row too; None where it was not measured.
    """

    rows: int
    temperatures: tuple[float, ...]
    mean_kl: tuple[float, ...]
    high_kl: tuple[float, ...]
    top1_agreement: float
    saturated: int
    top5_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As attributes and records have it: `top5_agreement` stands beside `fidelity`, whose
        fields are those of the first version of the format.
        """
        plain: dict[str, Any] = msgspec.to_builtins(self)
        agreement = plain.pop("top5_agreement")
        return {"fidelity": plain} | ({} if agreement is None else {"top5_agreement": agreement})

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Fidelity":
        """Of a record. Raises ValueError."""
        known = {"top5_agreement": values.get("top5_agreement")}
        return msgspec.convert({**values["fidelity"], **known}, Fidelity)

    def known_kl(self, temperature: float) -> float | None:
        """The mean KL at a temperature, None where it was not measured."""
        known = dict(zip(self.temperatures, self.mean_kl, strict=True))
        return known.get(temperature)

    def holds(self, budget: Budget) -> bool:
        """Whether the mean KL is known and within a budget, at each of its temperatures."""
        known = {t: self.known_kl(t) for t in budget}
        return all(kl is not None and kl <= budget[t] for t, kl in known.items())


def row_kl(exact: Tensor, decoded: Tensor, temperature: float) -> Tensor:
    """KL of each row, float64 (n,). exact, decoded: float32 (n, C) logits.

    Never negative, but for rounding: computed in float64, where 1e-9 of a nat is still a number.
    """
    target = torch.log_softmax(exact.double() / temperature, dim=1)
    given = torch.log_softmax(decoded.double() / temperature, dim=1)
    return (target.exp() * (target - given)).sum(1).clamp(min=0)


def mean_kl(exact: Tensor, decoded: Tensor, temperature: float) -> Tensor:
    """The mean of `row_kl` over all rows: float64 ()."""
    return row_kl(exact, decoded, temperature).mean()


def holds_kl(coding: Encoding, logits: Tensor, budget: Budget) -> bool:
    """Whether rows that are encoded and decoded have at most the mean KL of a budget."""
    return kl_excess(coding, logits, budget) <= 1


def kl_excess(coding: Encoding, logits: Tensor, budget: Budget) -> float:
    """The largest part that the mean KL has of what a budget allows: at most 1 where it is held."""
    decoded = coding.decode(coding.encode(logits))
    return max(float(mean_kl(logits, decoded, t)) / kl for t, kl in budget.items())


def coarsest(excess: Callable[[int], float], finest: int, per_doubling: float) -> int | None:
    """The lowest exponent from 0 to `finest` whose excess is at most 1; None if there is none.

    excess: falls with the exponent. per_doubling: by how many exponents it falls to its half, about
    which is where the next one is tried; after a few of them the middle of what is left.
    """
    low, high, at, tried = -1, finest + 1, min(finest, _FIRST), 0
    while high - low > 1:
        over, tried = excess(at), tried + 1
        low, high = (low, at) if over <= 1 else (at, high)
        guess = (low + high) // 2
        if tried < _GUESSES and math.isfinite(over):
            guess = at + math.ceil(per_doubling * math.log2(max(over, _LEAST)))
        at = min(max(guess, low + 1), high - 1)
    return high if high <= finest else None


def measure(coding: Encoding, logits: Tensor, labels: Tensor) -> Fidelity:
    """Encode rows, decode them and compare. logits: float32 (n, C); labels: int64 (n,)."""
    return compare(coding, logits, coding.encode(logits, labels))


def compare(coding: Encoding, logits: Tensor, arrays: Mapping[str, Tensor]) -> Fidelity:
    """As `measure`, of rows that are encoded already."""
    held = [t for t in TEMPERATURES if coding.holds(t)]
    decoded = coding.decode(arrays, held[0] if held else 1.0)
    kls = [
        row_kl(logits, decoded if coding.keeps_all else coding.decode(arrays, t), t) for t in held
    ]
    same = decoded.argmax(1) == logits.argmax(1)
    return Fidelity(
        rows=len(logits),
        temperatures=tuple(held),
        mean_kl=tuple(float(kl.mean()) for kl in kls),
        high_kl=tuple(float(kl.quantile(0.999)) for kl in kls),
        top1_agreement=float(same.double().mean()),
        saturated=coding.saturated(arrays),
        top5_agreement=float(_lead_too(logits, decoded).double().mean()),
    )


def _lead_too(exact: Tensor, decoded: Tensor) -> Tensor:
    """bool (n,): whether the five leading classes of an exact row lead the decoded one: no other is
    above any of them.
    """
    few = min(_LEADING, exact.shape[1])
    least = decoded.gather(1, exact.topk(few, dim=1).indices).amin(1)
    return least >= decoded.topk(few, dim=1).values[:, -1]


def combined(parts: list[Fidelity]) -> Fidelity:
    """Of all blocks together: means weighted by rows, the largest of the high quantiles."""
    rows = sum(p.rows for p in parts)

    def weighted(values: list[float]) -> float:
        return sum(p.rows * v for p, v in zip(parts, values, strict=True)) / rows

    # Views that were added by a later version are measured at more temperatures.
    shared = [t for t in parts[0].temperatures if all(t in p.temperatures for p in parts)]
    top5 = [p.top5_agreement for p in parts]
    return Fidelity(
        rows=rows,
        temperatures=tuple(shared),
        mean_kl=tuple(
            weighted([p.mean_kl[p.temperatures.index(t)] for p in parts]) for t in shared
        ),
        high_kl=tuple(max(p.high_kl[p.temperatures.index(t)] for p in parts) for t in shared),
        top1_agreement=weighted([p.top1_agreement for p in parts]),
        saturated=sum(p.saturated for p in parts),
        top5_agreement=None if None in top5 else weighted([kl for kl in top5 if kl is not None]),
    )
