"""Views of a sample beside one of them: the first whole, of the others what it does not say.

Views of a sample are much alike. So the first view, the anchor, is coded as `klt-top` codes it, in
finer steps; a row of any other is predicted from the anchor's codes of the same sample, by linear
regression, and what is left is coded as `klt-top` codes whole rows, around that prediction and with
means and a basis of its own.

The leading classes are ranked on both sides here too. So the weights of the regression are whole
numbers, in the units of what they are added to: a coarse row is one sum of whole numbers below
2^24, the same bits everywhere (`exact.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.cache.encoding.base import Budget, Encoding, check_range, encoding
from stages.cache.encoding.exact import by_runs, exact_sum, runs
from stages.cache.encoding.fidelity import mean_kl
from stages.cache.encoding.klt_basis import Rows
from stages.cache.encoding.klt_integers import Beside, integers
from stages.cache.encoding.klt_steps import checked, coarsest_step, searched_rows
from stages.cache.encoding.klt_top import KltTop
from stages.cache.layout import ArraySpec
from stages.errors import CacheError

FINER = 1.5
"""How many times finer the anchor's steps are than those of `klt-top` at the same budget: what the
anchor says is read by all other views.
"""
_RIDGE, _LEAST_RIDGE = 1e-3, 1.0
"""Of the mean variance of a code, and the least: rows may be few, or all the same."""
_LEFT = 1e-3
"""The least share of a row that the others do not decide."""


@encoding("klt-anchored")
@dataclass(frozen=True, eq=False)
class KltAnchored(Encoding):
    """anchor: of rows of the first view. others: of what is left of those of other views.
    predictor: int16 (the anchor's components, class), in units of `others`; the prediction of a row
    is the anchor's `KltTop.codes` of the same sample times it.
    """

    anchor: KltTop
    others: KltTop
    predictor: Tensor
    takes: ClassVar[Mapping[str, Callable[[str], Any]]] = {"step": float, "top": int}
    of_anchor: ClassVar[Mapping[str, str]] = {
        "anchor_prediction": "prediction",
        **{n: n for n in ("anchor_code", "anchor_pair", "anchor_three", "anchor_five")},
    }

    # ---- making one -------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        logits: Tensor,
        budget: Budget | None = None,
        second: Tensor | None = None,
        **given: Any,
    ) -> "KltAnchored":
        """The anchor's steps are `FINER` times finer than those of `klt-top`; of the others the
        coarsest that holds the budget on the second view.

        logits, budget: as of `KltTop.fit`. second: float32 (n, C), the second view of the same
        samples. given: `step` of the others and `top`. Raises CacheError without a second view, and
        as `KltTop.fit` does.
        """
        if second is None:
            raise CacheError(
                f"{cls.name} keeps views as differences to the first, and there is one view",
                "Give --views 2 or more, or --encoding klt-top.",
            )
        top, step = checked(cls.name, logits, given)
        check_range(second, torch.finfo(torch.float32).max, cls.name)
        plain = KltTop.fit(logits, budget, top=top).step if step is None else step
        anchor = KltTop(top=top, **integers(Rows.of(logits), plain / FINER))
        arrays = anchor.encode(logits)
        codes = anchor.codes(arrays, arrays["prediction"].long())
        weights, predicted = _regression(codes, second)
        rows, beside = Rows.of(second - predicted, second.argmax(1)), Beside(weights, anchor.reach)
        if step is None:
            some = slice(searched_rows(second))

            def excess(step: float, aimed: Budget) -> float:
                others, predictor = _around(rows, beside, step, top)
                by_all = exact_sum(others.mean_row, codes[some], predictor.float())
                by_others = others.mean_row + (predicted[some] / others.unit).round()
                bases = (by_all, by_others)  # as for these rows, and as for those to come
                return max(_excess(others, base, second[some], aimed) for base in bases)

            step = coarsest_step(excess, cls.name, budget)
        return cls(anchor, *_around(rows, beside, step, top))

    @classmethod
    def restore(
        cls, parameters: Mapping[str, Any], num_classes: int, read: Callable[[str], Tensor]
    ) -> "KltAnchored":
        of_anchor = {_bare(name): x for name, x in parameters.items() if name != _bare(name)}
        anchor = KltTop.restore(of_anchor, num_classes, lambda name: read(_stored(name)))
        others = KltTop.restore(parameters, num_classes, read)
        predictor = read("klt_predictor")
        if tuple(predictor.shape) != (len(anchor.basis), num_classes):
            raise ValueError("a predictor of another shape")
        return cls(anchor, others, predictor.to(torch.int16))

    # ---- what it is -------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Any]:
        return self.others.parameters | _anchors(self.anchor.parameters)

    @property
    def shown(self) -> dict[str, Any]:
        return {**self.others.shown, "anchor_step": self.anchor.shown["step"]}

    @property
    def sizes(self) -> dict[str, int]:
        return self.others.sizes | _anchors(self.anchor.sizes)

    def arrays(self) -> dict[str, ArraySpec]:
        others, anchor = self.others.arrays(), self.anchor.arrays()
        prediction = {"prediction": others.pop("prediction")}
        del anchor["prediction"]
        return (
            prediction
            | {name: dataclasses.replace(spec, views="others") for name, spec in others.items()}
            | {
                _stored(name): dataclasses.replace(_of_anchor(spec), views="first")
                for name, spec in anchor.items()
            }
        )

    def calibration_arrays(self) -> dict[str, ArraySpec]:
        anchor = self.anchor.calibration_arrays()
        return {
            **self.others.calibration_arrays(),
            **{_stored(name): _of_anchor(spec) for name, spec in anchor.items()},
            "klt_predictor": ArraySpec(("anchor_component", "class"), "int16"),
        }

    def calibration(self) -> dict[str, Tensor]:
        anchor = {_stored(name): x for name, x in self.anchor.calibration().items()}
        return {**self.others.calibration(), **anchor, "klt_predictor": self.predictor}

    # ---- encoding and decoding --------------------------------------------------------------

    def encode(
        self, logits: Tensor, labels: Tensor | None = None, predictions: Tensor | None = None
    ) -> dict[str, Tensor]:
        check_range(logits, torch.finfo(torch.float32).max, self.name)
        arrays = self.anchor.encode(logits, labels, predictions)
        return {_stored(name): array for name, array in arrays.items()}

    def encode_beside(
        self,
        anchor: Mapping[str, Tensor],
        logits: Tensor,
        labels: Tensor | None = None,
        predictions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        check_range(logits, torch.finfo(torch.float32).max, self.name)
        predictions = logits.argmax(1) if predictions is None else predictions
        parts = [
            self.others.encode_around(
                self._predicted({name: x[run] for name, x in anchor.items()}),
                logits[run],
                predictions[run].long(),
            )
            for run in runs(logits)
        ]
        arrays = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        dtype = getattr(torch, self.arrays()["prediction"].dtype)
        return {"prediction": predictions.to(dtype), **arrays, **anchor}

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        if "logits_code" not in arrays:
            return self.anchor.decode({_original(name): x for name, x in arrays.items()})
        return by_runs(
            arrays,
            self.predictor.shape[1],
            lambda some: self.others.decode_around(self._predicted(some), some),
        )

    def _predicted(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """What the anchor says of rows, in units of `others`: whole numbers, float32 (n, C).
        arrays: by the names of `of_anchor`.
        """
        own = {_original(name): arrays[name] for name in self.of_anchor}
        codes = self.anchor.codes(own, arrays["anchor_prediction"].long())
        return exact_sum(self.others.mean_row, codes, self._weights)

    def saturated(self, arrays: Mapping[str, Tensor]) -> int:
        if "logits_code" not in arrays:
            return self.anchor.saturated({_original(name): x for name, x in arrays.items()})
        return self.others.saturated(arrays)

    def to(self, device: torch.device) -> "KltAnchored":
        made = KltAnchored(
            self.anchor.to(device), self.others.to(device), self.predictor.to(device)
        )
        _ = made._weights  # made now: nothing is, while a CUDA graph is captured
        return made

    @cached_property
    def _weights(self) -> Tensor:
        return self.predictor.float()


# ---- fitting --------------------------------------------------------------------------------


def _regression(codes: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of rows without their offset, float32 (n, C), on codes, float32 (n, k).

    Returns its weights, float32 (k, C), and float32 (n, C) what is predicted of each row by all
    others: leaving a row out divides what is left of it by 1 - h, h its leverage (Cook and
    Weisberg 1982, section 2.2; of a ridge the same by the Sherman-Morrison formula). So few rows do
    not look better predicted than those to come.
    """
    x, y = codes.double(), (rows - rows.mean(1, keepdim=True)).double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    gram = x.T @ x
    ridge = (_RIDGE * gram.diagonal().mean()).clamp(min=_LEAST_RIDGE)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=x.dtype))
    weights = torch.cholesky_solve(x.T @ (y - mean_y), factor)
    leverage = (torch.linalg.solve_triangular(factor, x.T, upper=False)).square().sum(0)
    left = y - mean_y - x @ weights
    left /= (1 - 1 / len(y) - leverage).clamp(min=_LEFT)[:, None]
    predicted = y - left - (mean_y - mean_x @ weights)
    return weights.float(), predicted.float()


def _around(rows: Rows, beside: Beside, step: float, top: int) -> tuple[KltTop, Tensor]:
    """`others` and `predictor` for one step. rows: what is left of them."""
    fields = integers(rows, step, beside)
    components = len(fields["basis"]) - len(beside.weights)
    basis, predictor = fields.pop("basis").split([components, len(beside.weights)])
    return KltTop(basis=basis.clone(), top=top, **fields), predictor.clone()


def _excess(others: KltTop, base: Tensor, rows: Tensor, budget: Budget) -> float:
    """As `kl_excess`, of rows around `base`."""
    predictions = rows.argmax(1)
    arrays = others.encode_around(base, rows, predictions)
    decoded = others.decode_around(base, {**arrays, "prediction": predictions})
    return max(float(mean_kl(rows, decoded, t)) / kl for t, kl in budget.items())


# ---- names ----------------------------------------------------------------------------------

_PREFIX, _THEIRS = "anchor_", ("logits_", "klt_")


def _stored(name: str) -> str:
    """An array of `klt-top` as that of the anchor: logits_code is anchor_code."""
    kind = next((kind for kind in _THEIRS if name.startswith(kind)), None)
    return name if kind is None else _PREFIX + name.removeprefix(kind)


def _original(name: str) -> str:
    """The way back, of arrays that are written block by block."""
    bare = _bare(name)
    return name if name == bare else bare if bare == "prediction" else f"logits_{bare}"


def _bare(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _anchors(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters or sizes of the anchor, by names of their own."""
    return {_PREFIX + name: value for name, value in values.items()}


def _of_anchor(spec: ArraySpec) -> ArraySpec:
    """With dimensions of its own, but for those that every array has."""
    shared = ("view", "sample", "class")
    own = tuple(d if d in shared else _PREFIX + d for d in spec.dimensions)
    return dataclasses.replace(spec, dimensions=own)
