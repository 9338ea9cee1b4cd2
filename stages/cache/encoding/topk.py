"""The largest logits of a row, and enough about the rest to know its weight: for many classes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.cache.encoding.base import (
    A_ROW,
    Budget,
    Encoding,
    check_span,
    check_temperature,
    encoding,
)
from stages.cache.layout import ArraySpec
from stages.errors import CacheError

_ENCODED = 2**22
"""Logits that are encoded at once: a block of many classes is not copied whole."""
_DTYPES = ((2**8, "uint8"), (2**16, "uint16"), (2**32, "uint32"))


@encoding("topk")
@dataclass(frozen=True)
class TopK(Encoding):
    """The k largest logits, largest first; the last of them gives way to the label's where the
    label is not among them. Of the rest: its logsumexp(z / T) at some temperatures. All of a row is
    kept relative to its largest logit, so that `decode` gives 0 for that.

    So at those temperatures the probabilities of the label, of the prediction and of all the rest
    together are exact up to half precision. How the rest divides among its classes is lost:
    `decode` spreads it evenly, losses lump it together on both sides (`kept`).
    """

    num_classes: int
    k: int = 10
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    takes: ClassVar[Mapping[str, Callable[[str], Any]]] = {
        "k": int,
        "temperatures": lambda text: tuple(map(float, text.split("/"))),
    }

    def __post_init__(self) -> None:
        if not 2 <= self.k <= self.num_classes:
            raise CacheError(
                f"topk keeps 2 to {self.num_classes} logits of {self.num_classes} classes, "
                f"not {self.k}",
                "Give --encoding topk:k=NUMBER.",
            )
        if not self.temperatures or not all(0 < t < math.inf for t in self.temperatures):
            raise CacheError(
                f"topk cannot keep tails at the temperatures {self.temperatures}",
                "Give positive ones: --encoding topk:temperatures=1/2/4.",
            )

    @classmethod
    def fit(cls, logits: Tensor, budget: Budget | None = None, **given: Any) -> "TopK":
        classes = logits.shape[1]
        return TopK(classes, **{"k": min(TopK.k, classes), **given})

    @classmethod
    def restore(
        cls, parameters: Mapping[str, Any], num_classes: int, read: Callable[[str], Tensor]
    ) -> "TopK":
        temperatures = tuple(float(t) for t in parameters["temperatures"])
        return TopK(num_classes, int(parameters["k"]), temperatures)

    @property
    def parameters(self) -> dict[str, Any]:
        return {"k": self.k, "temperatures": list(self.temperatures)}

    @property
    def sizes(self) -> dict[str, int]:
        return {"k": self.k, "temperature": len(self.temperatures)}

    def arrays(self) -> dict[str, ArraySpec]:
        packed = next(dtype for most, dtype in _DTYPES if self.num_classes <= most)
        return {
            "topk_index": ArraySpec((*A_ROW, "k"), packed),
            "topk_value": ArraySpec((*A_ROW, "k"), "float16"),
            "topk_tail": ArraySpec((*A_ROW, "temperature"), "float32"),
        }

    def encode(
        self, logits: Tensor, labels: Tensor | None = None, predictions: Tensor | None = None
    ) -> dict[str, Tensor]:
        check_span(logits, torch.finfo(torch.float16).max, self.name)
        rows = max(1, _ENCODED // self.num_classes)
        runs = [slice(start, start + rows) for start in range(0, max(1, len(logits)), rows)]
        parts = [self._encoded(logits[r], None if labels is None else labels[r]) for r in runs]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encoded(self, logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        order = _largest(logits, self.k)
        logits = logits - logits.amax(1, keepdim=True)
        if labels is not None:
            absent = (order != labels[:, None]).all(1) & (labels >= 0)  # -1 is no label
            order[:, -1] = torch.where(absent, labels, order[:, -1])
        rest = logits.scatter(1, order, -math.inf)
        tails = [torch.logsumexp(rest / t, dim=1) for t in self.temperatures]
        return {
            "topk_index": order.to(getattr(torch, self.arrays()["topk_index"].dtype)),
            "topk_value": logits.gather(1, order).half(),
            "topk_tail": torch.stack(tails, dim=1),
        }

    def decode(self, arrays: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        values, rest = arrays["topk_value"].float(), self.num_classes - self.k
        if not rest:
            return torch.empty_like(values).scatter_(1, self.kept(arrays), values)
        check_temperature(self, temperature)
        tail = arrays["topk_tail"][:, self.temperatures.index(temperature), None]
        even = temperature * (tail - math.log(rest))
        rows = even.expand(-1, self.num_classes).contiguous()
        return rows.scatter_(1, self.kept(arrays), values)

    def holds(self, temperature: float) -> bool:
        return self.keeps_all or temperature in self.temperatures

    @property
    def keeps_offset(self) -> bool:
        return False

    @property
    def keeps_all(self) -> bool:
        return self.k == self.num_classes

    def kept(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["topk_index"].to(torch.int64)


def _largest(logits: Tensor, k: int) -> Tensor:
    """The classes of the k largest logits, int64 (n, k), largest first; of equal ones the first
    class comes first, as in the stored prediction. A stable sort of whole rows would say the same,
    and takes many times as long.
    """
    if k == logits.shape[1]:
        return logits.sort(dim=1, descending=True, stable=True).indices
    values, classes = logits.topk(k + 1)
    ambiguous = values[:, k - 1] == values[:, k]  # which of them belong to the k
    classes = classes[:, :k].sort(dim=1).values
    ranks = logits.gather(1, classes).sort(dim=1, descending=True, stable=True).indices
    classes = classes.gather(1, ranks)
    if bool(ambiguous.any()):
        rows = logits[ambiguous].sort(dim=1, descending=True, stable=True)
        classes[ambiguous] = rows.indices[:, :k]
    return classes
