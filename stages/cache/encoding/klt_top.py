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

from stages.cache.encoding.base import (
    A_ROW,
    DEFAULT_BUDGET,
    Budget,
    Encoding,
    check_range,
    encoding,
)
from stages.cache.encoding.fidelity import coarsest, kl_excess
from stages.cache.encoding.klt_basis import Rows
from stages.cache.encoding.klt_integers import DEAD_ZONE, KINDS, SHARED, WIDEST, integers
from stages.cache.encoding.packing import PAIRS
from stages.cache.encoding.ranking import leading
from stages.cache.layout import ArraySpec, prediction_dtype
from stages.errors import CacheError
from stages.sizes import budget_in_words

COARSEST_STEP = 64.0
_MARGIN = 0.97
"""Of the KL budget: rows beyond the calibration differ a little."""
_SEARCHED = 2**21
"""Logits that the step is searched on."""
_STEPS_PER_OCTAVE, _OCTAVES, _SEARCHED_FROM = 32, 12, 16.0
_AT_ONCE = 2**24
"""Logits that are encoded or decoded at once: a block of many classes is not held several times."""
_FAR = 1e12
"""Units: no code reaches as far, and products with it are finite."""
_FEW, _LEADING = 256, (8, 16)
"""How many classes are refined, up to so many classes and above."""


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
        classes, step = logits.shape[1], given.get("step")
        top = given.get("top", min(_LEADING[classes > _FEW], classes))
        if not 1 <= top <= classes:
            raise CacheError(
                f"klt-top refines 1 to {classes} classes of {classes}, not {top}",
                "Give --encoding klt:top=NUMBER.",
            )
        check_step(step)
        check_range(logits, torch.finfo(torch.float32).max, cls.name)
        rows = Rows.of(logits)
        if step is not None:
            return cls(top=top, **integers(rows, step))
        budget = DEFAULT_BUDGET if budget is None else budget
        aimed = {t: _MARGIN * kl for t, kl in budget.items()}
        searched = logits[: max(1, _SEARCHED // classes)]

        def with_step(exponent: int) -> KltTop:
            return cls(top=top, **integers(rows, _step(exponent)))

        found = coarsest(
            lambda exponent: kl_excess(with_step(exponent), searched, aimed),
            _STEPS_PER_OCTAVE * _OCTAVES,
            _STEPS_PER_OCTAVE / 2,  # the KL falls with the square of the step
        )
        if found is None:
            raise CacheError(
                f"no step of the encoding {cls.name} holds a KL of {budget_in_words(budget)}",
                "Use --encoding float32.",
            )
        return with_step(found)

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
            self._encoded(logits[run], predictions[run].long()) for run in self._runs(len(logits))
        ]
        arrays = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        dtype = getattr(torch, self.arrays()["prediction"].dtype)
        return {"prediction": predictions.to(dtype), **arrays}

    def _encoded(self, logits: Tensor, predictions: Tensor) -> dict[str, Tensor]:
        mean_of_row = logits.mean(1, keepdim=True)
        exact = ((logits - mean_of_row) / self.unit).clamp(-_FAR, _FAR)
        lengths = self._matrix.square().sum(1).clamp(min=1)
        components = ((exact - self._mean) @ self._matrix.T) / lengths
        components -= self.center[predictions]
        drawn = (components.abs() - DEAD_ZONE + 0.5).floor().clamp(min=0) * components.sign()
        wide, *shared = drawn.split(self._counts, dim=1)
        offset = ((mean_of_row - self.offset) / self.offset_step).round()
        code = torch.cat([wide, offset], 1).clamp(-WIDEST, WIDEST).to(torch.int8)
        arrays = {"logits_code": code} | {
            f"logits_{name}": KINDS[name].pack(codes)
            for name, codes in zip(SHARED, shared, strict=True)
        }
        classes, entries = leading(self._coarse(arrays, predictions), predictions, self.top)
        errors = (exact.gather(1, classes) - entries) / self.fine
        return {**arrays, "logits_top": PAIRS.pack(errors.round())}

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        rows = len(arrays["prediction"])
        runs = self._runs(rows)
        if len(runs) == 1:
            return self._decoded(arrays)
        logits = torch.empty((rows, len(self.mean)), device=self.mean.device)
        for run in runs:
            logits[run] = self._decoded({name: array[run] for name, array in arrays.items()})
        return logits

    def _decoded(self, arrays: Mapping[str, Tensor]) -> Tensor:
        predictions = arrays["prediction"].long()
        rows = self._coarse(arrays, predictions)
        known = min(self.top + 1, rows.shape[1])  # of those that are not refined the largest too
        classes, entries = leading(rows, predictions, known)
        fine = PAIRS.unpack(arrays["logits_top"], self._tables["top"])[:, : self.top]
        entries[:, : self.top].add_(fine, alpha=self.fine)
        highest = entries[:, 1:].amax(1) + self.margin
        entries[:, 0] = torch.maximum(entries[:, 0], highest)
        rows.scatter_(1, classes, entries)
        offset = arrays["logits_code"][:, -1:].float() * self.offset_step + self.offset
        return rows.mul_(self.unit).add_(offset)

    def _coarse(self, arrays: Mapping[str, Tensor], predictions: Tensor) -> Tensor:
        """Rows in units, float32 (n, C): sums of whole numbers below 2^24, exact in any order.

        bfloat16 holds codes but no entries of the basis: autocast is kept out, and a user's choice
        of bfloat16 for all products is met with double precision.
        """
        parts = [arrays["logits_code"][:, : self.wide].float()]
        parts += [
            KINDS[name].unpack(arrays[f"logits_{name}"], self._tables[name]) for name in SHARED
        ]
        codes = torch.cat(parts, 1).add_(self.center.index_select(0, predictions))
        with torch.autocast(codes.device.type, enabled=False):
            if torch.get_float32_matmul_precision() == "medium":
                return (self._mean.double() + codes.double() @ self._matrix.double()).float()
            return torch.addmm(self._mean, codes, self._matrix)

    def _runs(self, rows: int) -> list[slice]:
        size = max(1, _AT_ONCE // len(self.mean))
        return [slice(start, start + size) for start in range(0, max(1, rows), size)]

    def saturated(self, arrays: Mapping[str, Tensor]) -> int:
        return int((arrays["logits_code"].abs() == WIDEST).any(1).sum())

    def to(self, device: torch.device) -> "KltTop":
        moved = {n: getattr(self, n).to(device) for n in ("basis", "mean", "center")}
        made = dataclasses.replace(self, **moved)
        # Made now: nothing is, while a CUDA graph is captured.
        _ = made._matrix, made._mean, made._tables
        return made

    @cached_property
    def _matrix(self) -> Tensor:
        return self.basis.float()

    @cached_property
    def _mean(self) -> Tensor:
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


def _step(exponent: int) -> float:
    return float(_SEARCHED_FROM * 2 ** (-exponent / _STEPS_PER_OCTAVE))


def check_step(step: float | None) -> None:
    """Raise CacheError for a step that cannot be."""
    if step is not None and not 0 < step <= COARSEST_STEP:
        raise CacheError(
            f"klt takes a step above 0 and up to {COARSEST_STEP:g}, not {step}",
            "Give --encoding klt:step=NUMBER.",
        )
