"""The whole numbers of `klt-top`: means and basis of a teacher's rows for one step.

A coarse row is a sum of whole numbers. The unit is chosen so that no row, whatever its codes, can
pass 2^24: float32 adds such numbers without rounding, in any order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.cache.encoding.klt_basis import Rows
from stages.cache.encoding.packing import FIVES, PAIRS, THREES, Packing

FINER = 3
"""How many fine steps one coarse step has."""
DEAD_ZONE = 0.1
"""Of a step: codes are drawn towards 0 by as much, which saves more bytes than it costs in KL."""
WIDEST, _ENTRY = 127, 2047
"""The largest magnitudes: of a code of a byte, and of an entry of the basis. The last has 11 bits,
which TF32 holds as well.
"""
KINDS = {"wide": Packing(1, WIDEST), "pair": PAIRS, "three": THREES, "five": FIVES}
"""How components are coded, the widest first."""
SHARED = ("pair", "three", "five")
"""The kinds of which several share a byte."""
_EXACT = 2**24
_HEADROOM = 1.5
"""How much larger than the calibration's largest code a code of a byte may be."""


def integers(rows: Rows, step: float, beside: "Beside | None" = None) -> dict[str, Any]:
    """The fields of `KltTop` that follow from rows and step: all but `top`. beside: what rows are
    added to; its weights, in units, are then the last rows of `basis`.
    """
    members = _members(rows, step)
    steps = (rows.peak * (_HEADROOM / WIDEST)).clamp(min=step)
    basis = _joined({name: rows.basis[m] * steps[m, None] for name, m in members.items()}).double()
    center = _joined({name: (rows.center[:, m] / steps[m]).T for name, m in members.items()})
    center = center.round().clamp(-WIDEST, WIDEST)
    sizes = {name: _bytes(name, len(m)) for name, m in members.items()}
    kinds = [(KINDS[name], size) for name, size in sizes.items()]
    limits = [torch.full((kind.digits * size,), kind.limit) for kind, size in kinds]
    reach = torch.cat(limits) + center.abs().amax(1)
    if beside is not None:
        basis = torch.cat([basis, beside.weights.double()])
        reach = torch.cat([reach, beside.reach])
    unit, fine, whole = _in_units(basis, rows.mean.double(), reach.double(), step)
    offset_step = max(rows.offset_peak * _HEADROOM / WIDEST, step * len(rows.mean) ** -0.5)
    offset, offset_step = torch.tensor([rows.offset, offset_step]).tolist()  # as float32
    return {
        "basis": whole.to(torch.int16),
        "mean": (rows.mean.double() / unit).round().to(torch.int32),
        "center": center.T.to(torch.int8).contiguous(),
        "step": step,
        "unit": unit,
        "fine": fine,
        **sizes,
        "offset": offset,
        "offset_step": offset_step,
    }


@dataclass(frozen=True)
class Beside:
    """Other whole numbers that decide a row as well, times weights. weights: float32 (k, C), in
    logits. reach: float32 (k,), the largest magnitudes of those numbers.
    """

    weights: Tensor
    reach: Tensor


def _members(rows: Rows, step: float) -> dict[str, Tensor]:
    """Which components are coded in which kind, int64 each. Those that never reach a code are left
    out.
    """
    beyond = [rows.high > step * (KINDS[name].limit + 0.5 + DEAD_ZONE) for name in SHARED]
    reached = rows.peak > step * (0.5 + DEAD_ZONE)
    order = torch.stack([reached, *beyond]).int().sum(0)
    return {name: (order == 4 - i).nonzero()[:, 0] for i, name in enumerate(KINDS)}


def _bytes(name: str, components: int) -> int:
    """How many bytes hold so many components; of those that share bytes one at the least, so that
    every cache has the same arrays.
    """
    return max(int(name in SHARED), -(-components // KINDS[name].digits))


def _joined(parts: Mapping[str, Tensor]) -> Tensor:
    """The components of all kinds, (r, ...), each kind filled up to whole bytes by empty ones."""
    filled = [
        torch.nn.functional.pad(
            part, (0, 0, 0, _bytes(name, len(part)) * KINDS[name].digits - len(part))
        )
        for name, part in parts.items()
    ]
    return torch.cat(filled)


def _in_units(basis: Tensor, mean: Tensor, reach: Tensor, step: float) -> tuple[float, int, Tensor]:
    """The unit, a float32 value, in which entries of the basis have 11 bits and no row can pass
    2^24; how many of them a fine step has; and the basis in it, in whole numbers.

    basis: float64 (r, C), in logits. reach: float64 (r,), the largest codes.
    """
    unit = float(basis.abs().max()) / _ENTRY or step / _ENTRY
    while True:
        unit = float(torch.tensor(unit * (1 + 2**-20)))
        fine, whole = max(1, round(step / FINER / unit)), (basis / unit).round_()
        largest = reach @ whole.abs() + (mean / unit).round().abs()
        if float(largest.max()) + (PAIRS.limit + 1) * fine < _EXACT:
            return unit, fine, whole
        unit *= 2
