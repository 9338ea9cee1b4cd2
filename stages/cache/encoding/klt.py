"""Whole rows in few bits: rotated to where they are uncorrelated, rounded, entropy-coded by zstd.

The dataset's mean row is subtracted, the rest is rotated by the orthonormal eigenbasis of the
logits' covariance (Karhunen-Loeve transform) and rounded to a uniform step. A rotation keeps
lengths, so a step means the same error in every direction, and the components are uncorrelated, so
that coding each of them alone loses little. Most components of a trained teacher hold two to four
bits. Chunks are stored component-major: zstd then sees one component after another.

Softmax ignores the mean of a row, so the mean is a component by itself, the last one: however large
it is, it changes nothing of what the others say.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.cache.encoding.base import (
    PLAIN_BUDGET,
    Budget,
    Encoding,
    check_range,
    encoding,
)
from stages.cache.encoding.fidelity import holds_kl
from stages.cache.encoding.klt_basis import eigenbasis
from stages.cache.encoding.klt_steps import check_step
from stages.cache.encoding.klt_top import KltTop
from stages.cache.layout import ArraySpec
from stages.errors import CacheError
from stages.sizes import budget_in_words

_HEADROOM = 1.5
"""How much larger than the calibration's largest code a code may be."""
_MARGIN = 0.9
"""Of the KL budget: rows beyond the calibration differ a little."""
_SEARCHED = 2**21
"""Logits that the step is searched on: 8,192 rows of up to 256 classes, 2,097 of 1,000."""
_COARSEST, _STEPS_PER_OCTAVE, _OCTAVES = 8.0, 8, 16
_MOST_CLASSES = 4096
"""Above, a whole eigenbasis costs more than it saves: C^2 numbers, as large a product a row."""


@encoding("klt")
@dataclass(frozen=True, eq=False)
class Klt(Encoding):
    """logits = mean + (code * step) @ basis.

    basis: float32 (component, class), orthonormal, largest variance first, but for the last row,
    which is constant: the others sum to 0. mean: float32 (class,).
    step: float32 (component,), equal but for the leading components, which take a coarser one
    where int8 would not hold their codes: a few coarse components of many cost hardly any KL, a
    second byte costs half as much space again.
    """

    basis: Tensor
    mean: Tensor
    step: Tensor
    dtype: str = "int8"
    takes: ClassVar[Mapping[str, Callable[[str], Any]]] = {"step": float, "top": int}

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        given = super().parse(text)
        if given.get("top") == 0:
            del given["top"]
        return given

    @classmethod
    def stored_name(cls, given: Mapping[str, Any]) -> str:
        return KltTop.name if "top" in given else cls.name

    @classmethod
    def fit(cls, logits: Tensor, budget: Budget | None = None, **given: Any) -> "Encoding":
        """Basis and mean of these rows, and the coarsest step that holds the budget on them; with
        `top` what `KltTop.fit` makes.

        logits: float32 (n, C), a fair draw of rows. budget: as of `Encoding.fit`; not looked at
        where `step` is given. Raises CacheError if no step holds it, for a step that cannot be, or
        if there are too many classes.
        """
        if "top" in given:
            return KltTop.fit(logits, budget, **given)
        if logits.shape[1] > _MOST_CLASSES:
            raise CacheError(
                f"klt is for up to {_MOST_CLASSES:,} classes, not {logits.shape[1]:,}",
                "Use --encoding klt-top or topk.",
            )
        check_step(cls.name, step := given.get("step"))
        check_range(logits, torch.finfo(torch.float32).max, cls.name)
        mean = logits.double().mean(0)
        basis = eigenbasis(logits.double() - mean).float().contiguous()
        mean = mean.float()
        peaks = _rotated(logits, mean, basis).abs().amax(0) * _HEADROOM
        if step is not None:
            dtype = "int8" if bool((peaks[:-1] <= 127 * step).all()) else "int16"
            return Klt(basis, mean, _steps(peaks, dtype, step), dtype)
        searched = logits[: max(1, _SEARCHED // logits.shape[1])]
        budget = PLAIN_BUDGET if budget is None else budget
        aimed = {t: _MARGIN * kl for t, kl in budget.items()}
        # int8 first: where it holds the budget, it takes half the bytes.
        for dtype in ("int8", "int16"):

            def with_step(exponent: int) -> Klt:
                step = _COARSEST * 2 ** (-exponent / _STEPS_PER_OCTAVE)
                return Klt(basis, mean, _steps(peaks, dtype, step), dtype)  # noqa: B023

            def holds(exponent: int) -> bool:
                return holds_kl(with_step(exponent), searched, aimed)

            finest = _STEPS_PER_OCTAVE * _OCTAVES
            if holds(finest):  # KL falls with the exponent
                return with_step(bisect_left(range(finest), True, key=holds))
        raise CacheError(
            f"no step of the encoding klt holds a KL of {budget_in_words(budget)}",
            "Use --encoding float32.",
        )

    @classmethod
    def restore(
        cls, parameters: Mapping[str, Any], num_classes: int, read: Callable[[str], Tensor]
    ) -> "Klt":
        basis, mean, step = (read(f"klt_{n}") for n in ("basis", "mean", "step"))
        shapes = tuple(tuple(t.shape) for t in (basis, mean, step))
        if shapes != ((num_classes, num_classes), (num_classes,), (num_classes,)):
            raise ValueError("calibration of another shape")
        if any(t.dtype != torch.float32 for t in (basis, mean, step)):
            raise ValueError("calibration of another dtype")
        return Klt(basis, mean, step, str(parameters["dtype"]))

    @property
    def parameters(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "step": float(self.step.min())}

    @property
    def sizes(self) -> dict[str, int]:
        return {"component": len(self.basis)}

    def arrays(self) -> dict[str, ArraySpec]:
        dimensions = ("view", "sample", "component")
        return {"logits_code": ArraySpec(dimensions, self.dtype, stored_order=(0, 2, 1))}

    def calibration_arrays(self) -> dict[str, ArraySpec]:
        return {
            "klt_basis": ArraySpec(("component", "class"), "float32"),
            "klt_mean": ArraySpec(("class",), "float32"),
            "klt_step": ArraySpec(("component",), "float32"),
        }

    def calibration(self) -> dict[str, Tensor]:
        return {"klt_basis": self.basis, "klt_mean": self.mean, "klt_step": self.step}

    def encode(
        self, logits: Tensor, labels: Tensor | None = None, predictions: Tensor | None = None
    ) -> dict[str, Tensor]:
        check_range(logits, torch.finfo(torch.float32).max, self.name)
        basis, mean, step = (t.to(logits.device) for t in (self.basis, self.mean, self.step))
        codes = (_rotated(logits, mean, basis) / step).round()
        dtype = getattr(torch, self.dtype)
        limit = torch.iinfo(dtype).max
        return {"logits_code": codes.clamp(-limit, limit).to(dtype)}

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        scaled = arrays["logits_code"].float() * self.step
        return torch.addmm(self.mean, scaled, self.basis)

    def saturated(self, arrays: Mapping[str, Tensor]) -> int:
        codes = arrays["logits_code"]
        return int((codes.abs() == torch.iinfo(codes.dtype).max).any(1).sum())

    def to(self, device: torch.device) -> "Klt":
        moved = {n: getattr(self, n).to(device) for n in ("basis", "mean", "step")}
        return dataclasses.replace(self, **moved)


def _rotated(logits: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """(logits - mean) @ basis.T, float32 (n, C). The mean of a row comes off first: beside a large
    one float32 would keep less of the rest.
    """
    offset = logits.mean(1, keepdim=True)
    rotated = torch.addmm(-(basis @ mean), logits - offset, basis.T)
    rotated[:, -1] += offset[:, 0] * len(basis) ** 0.5
    return rotated


def _steps(peaks: Tensor, dtype: str, step: float) -> Tensor:
    """The step of each component: coarser where a code would not fit."""
    return (peaks / torch.iinfo(getattr(torch, dtype)).max).clamp(min=step)
