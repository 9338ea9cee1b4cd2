"""Whole rows in coarse steps, the leading classes of each row in finer ones.

What a student learns of a row is mostly its leading classes, and the teacher's answer is stored
beside the row anyway. So rows are coded as `klt` codes them, but coarsely and as differences to the
mean row of their prediction; and the errors of the leading classes are coded once more, in finer
steps. Which classes these are is not stored: the decoder ranks its own coarse row.

Both sides must rank alike, on every device and with every library. So a coarse row is a sum of
integers below 2^24, which float32 adds without rounding in any order; of equal ones the lower class
comes first. All that follows is in integers too, but for the last line: the same bits everywhere.

zstd spends a bit on every byte at least, and codes many neighbouring columns alike. So components
that stay within ±7 share a byte by two, within ±2 by three, within ±1 by five, and each kind has an
array of its own (`packing.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.cache.encoding.base import A_ROW, Budget, Encoding, check_range, encoding
from stages.cache.encoding.exact import by_runs, exact_sum, runs
from stages.cache.encoding.fidelity import kl_excess
from stages.cache.encoding.klt_basis import Rows
from stages.cache.encoding.klt_integers import DEAD_ZONE, KINDS, SHARED, WIDEST, integers
from stages.cache.encoding.klt_steps import checked, coarsest_step, searched_rows
from stages.cache.encoding.packing import PAIRS
from stages.cache.encoding.ranking import leading
from stages.cache.layout import ArraySpec, prediction_dtype

_FAR = 1e12
"""Units: no code reaches as far, and products with it are finite."""


@encoding("klt-top")
@dataclass(frozen=True, eq=False)
class KltTop(Encoding):
    """z = mean + (code + center[prediction]) @ basis, in units; the `top` leading classes of z, the
    prediction before all others, get `fine` times their own code added; the prediction is then
    raised above all others by `margin` where it is not. logits = z * unit + offset.

    basis: int16 (component, class), the components in bytes first, then those in halves, thirds and
    fifths of bytes. mean: int32 (class,). center: int8 (class, component). step: of a code, in
    logits. top: how many classes are refined. unit: in logits. fine, margin: in units. wide: how
    many components take a byte; pair, three, five: how many bytes have 2, 3 and 5. offset,
    offset_step: of the mean of a row's logits.
    """

    basis: Tensor
    mean: Tensor
    center: Tensor
    step: float
    top: int
    unit: float
    fine: int
    wide: int
    pair: int
    three: int
    five: int
    offset: float
    offset_step: float
    default_up_to: ClassVar[float] = math.inf
    otherwise: ClassVar[str | None] = "klt"  # which has codes of two bytes as well
    takes: ClassVar[Mapping[str, Callable[[str], Any]]] = {"step": float, "top": int}

    # ---- making one -------------------------------------------------------------------------

    @classmethod
    def fit(cls, logits: Tensor, budget: Budget | None = None, **given: Any) -> "KltTop":
        """Means and basis of these rows, and the coarsest step that holds the budget on them.

        logits: float32 (n, C), a fair draw of rows. budget: as of `Encoding.fit`; not looked at
        where `step` is given. Raises CacheError if no step holds it, or for a step or a number of
        classes that cannot be.
        """
        top, step = checked(cls.name, logits, given)
        rows = Rows.of(logits)
        if step is None:
            searched = logits[: searched_rows(logits)]
            step = coarsest_step(
                lambda step, aimed: kl_excess(
                    cls(top=top, **integers(rows, step)), searched, aimed
                ),
                cls.name,
                budget,
            )
        return cls(top=top, **integers(rows, step))

    @classmethod
    def restore(
        cls, parameters: Mapping[str, Any], num_classes: int, read: Callable[[str], Tensor]
    ) -> "KltTop":
        basis, mean, center = (read(f"klt_{n}") for n in ("basis", "mean", "center"))
        shapes = tuple(tuple(t.shape) for t in (basis, mean, center))
        components = len(basis)
        if shapes != ((components, num_classes), (num_classes,), (num_classes, components)):
            raise ValueError("calibration of another shape")
        # What is read may be held in a wider dtype than it is stored in.
        coding = cls(
            basis.to(torch.int16),
            mean.to(torch.int32),
            center.to(torch.int8),
            **{f.name: _plain(parameters[f.name], f.type) for f in _SCALARS},
        )
        if min(coding._counts) < 0 or sum(coding._counts) != components:
            raise ValueError("another number of components")
        if not (1 <= coding.top <= num_classes and coding.fine >= 1):
            raise ValueError("another number of classes")
        return coding

    # ---- what it is -------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in _SCALARS}

    @property
    def shown(self) -> dict[str, Any]:
        return {
            "step": round(self.step, 3) or self.step,
            "top": self.top,
            "components": len(self.basis),
        }

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "component": len(self.basis),
            "wide": self.wide + 1,
            "top_pair": -(-self.top // PAIRS.digits),
            **{name: self._sizes[name] for name in SHARED},
        }

    @property
    def _sizes(self) -> dict[str, int]:
        """How many bytes a row has of each kind."""
        return {"wide": self.wide, "pair": self.pair, "three": self.three, "five": self.five}

    @property
    def _counts(self) -> list[int]:
        """How many components there are of each kind."""
        return [size * KINDS[name].digits for name, size in self._sizes.items()]

    @property
    def margin(self) -> int:
        """How far the prediction is above all others, in units."""
        return max(1, self.fine // 8)

    def arrays(self) -> dict[str, ArraySpec]:
        columns = {"logits_code": ("wide", "int8"), "logits_top": ("top_pair", "uint8")}
        columns |= {f"logits_{n}": (n, "uint8") for n in SHARED}
        prediction = ArraySpec(A_ROW, prediction_dtype(len(self.mean)))
        return {"prediction": prediction} | {
            name: ArraySpec((*A_ROW, dimension), dtype, stored_order=(0, 2, 1))
            for name, (dimension, dtype) in columns.items()
        }

    def calibration_arrays(self) -> dict[str, ArraySpec]:
        return {
            "klt_basis": ArraySpec(("component", "class"), "int16"),
            "klt_mean": ArraySpec(("class",), "int32"),
            "klt_center": ArraySpec(("class", "component"), "int8"),
        }

    def calibration(self) -> dict[str, Tensor]:
        return {"klt_basis": self.basis, "klt_mean": self.mean, "klt_center": self.center}

    # ---- encoding and decoding --------------------------------------------------------------

    def encode(
        self, logits: Tensor, labels: Tensor | None = None, predictions: Tensor | None = None
    ) -> dict[str, Tensor]:
        check_range(logits, torch.finfo(torch.float32).max, self.name)
        predictions = logits.argmax(1) if predictions is None else predictions
        parts = [
            self.encode_around(self.mean_row, logits[run], predictions[run].long())
            for run in runs(logits)
        ]
        arrays = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        dtype = getattr(torch, self.arrays()["prediction"].dtype)
        return {"prediction": predictions.to(dtype), **arrays}

    def encode_around(self, base: Tensor, logits: Tensor, predictions: Tensor) -> dict[str, Tensor]:
        """The arrays of rows, but for `prediction`, as differences to `base`: whole numbers in
        units, float32 (C,) or (n, C).
        """
        mean_of_row = logits.mean(1, keepdim=True)
        exact = ((logits - mean_of_row) / self.unit).clamp(-_FAR, _FAR)
        lengths = self._matrix.square().sum(1).clamp(min=1)
        components = ((exact - base) @ self._matrix.T) / lengths
        components -= self.center[predictions]
        drawn = (components.abs() - DEAD_ZONE + 0.5).floor().clamp(min=0) * components.sign()
        wide, *shared = drawn.split(self._counts, dim=1)
        offset = ((mean_of_row - self.offset) / self.offset_step).round()
        code = torch.cat([wide, offset], 1).clamp(-WIDEST, WIDEST).to(torch.int8)
        arrays = {"logits_code": code} | {
            f"logits_{name}": KINDS[name].pack(codes)
            for name, codes in zip(SHARED, shared, strict=True)
        }
        coarse = exact_sum(base, self.codes(arrays, predictions), self._matrix)
        classes, entries = leading(coarse, predictions, self.top)
        errors = (exact.gather(1, classes) - entries) / self.fine
        return {**arrays, "logits_top": PAIRS.pack(errors.round())}

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        return by_runs(arrays, len(self.mean), lambda some: self.decode_around(self.mean_row, some))

    def decode_around(self, base: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """The way back from `encode_around`, with `prediction` among the arrays: float32 (n, C)."""
        predictions = arrays["prediction"].long()
        rows = exact_sum(base, self.codes(arrays, predictions), self._matrix)
        known = min(self.top + 1, rows.shape[1])  # of those that are not refined the largest too
        classes, entries = leading(rows, predictions, known)
        fine = PAIRS.unpack(arrays["logits_top"], self._tables["top"])[:, : self.top]
        entries[:, : self.top].add_(fine, alpha=self.fine)
        highest = entries[:, 1:].amax(1) + self.margin
        entries[:, 0] = torch.maximum(entries[:, 0], highest)
        rows.scatter_(1, classes, entries)
        offset = arrays["logits_code"][:, -1:].float() * self.offset_step + self.offset
        return rows.mul_(self.unit).add_(offset)

    def codes(self, arrays: Mapping[str, Tensor], predictions: Tensor) -> Tensor:
        """What the basis is multiplied by: whole numbers, float32 (n, r). predictions: int64."""
        parts = [arrays["logits_code"][:, : self.wide].float()]
        parts += [
            KINDS[name].unpack(arrays[f"logits_{name}"], self._tables[name]) for name in SHARED
        ]
        return torch.cat(parts, 1).add_(self.center.index_select(0, predictions))

    @property
    def reach(self) -> Tensor:
        """How far `codes` can go, whatever the arrays hold: float32 (r,)."""
        kinds = [
            (KINDS[name].limit, count) for name, count in zip(KINDS, self._counts, strict=True)
        ]
        limits = torch.cat([torch.full((count,), float(limit)) for limit, count in kinds])
        return limits + self.center.float().abs().amax(0)

    def saturated(self, arrays: Mapping[str, Tensor]) -> int:
        return int((arrays["logits_code"].abs() == WIDEST).any(1).sum())

    def to(self, device: torch.device) -> "KltTop":
        moved = {n: getattr(self, n).to(device) for n in ("basis", "mean", "center")}
        made = dataclasses.replace(self, **moved)
        # Made now: nothing is, while a CUDA graph is captured.
        _ = made._matrix, made.mean_row, made._tables
        return made

    @cached_property
    def _matrix(self) -> Tensor:
        return self.basis.float()

    @cached_property
    def mean_row(self) -> Tensor:
        """`mean` as `encode_around` takes it."""
        return self.mean.float()

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        """The codes of every byte, of each kind."""
        kinds = {name: KINDS[name] for name in SHARED} | {"top": PAIRS}
        return {name: kind.table(self.mean.device) for name, kind in kinds.items()}


_SCALARS = [
    field for field in dataclasses.fields(KltTop) if field.name not in ("basis", "mean", "center")
]


def _plain(value: Any, kind: Any) -> Any:
    """A number of a store's parameters. Raises ValueError for another kind, or none at all."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"{value!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is not finite")
    return value
