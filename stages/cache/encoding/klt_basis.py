"""What is known of a teacher's rows: means, an orthonormal basis, how far components go."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_EXACT = 2048
"""Classes up to which the basis is that of the whole covariance; above, the leading part of it."""
_MOST_COMPONENTS = 1024
"""Above: as many as the heads of most such models have features, and rows of a head have no other
components.
"""
_OVERSAMPLED, _AT_ONCE = 16, 2**24
_EXCEEDED = 1000
_ROWS_PER_CLASS = 4
"""From so many rows a class on, the mean row of each prediction is worth knowing."""


def eigenbasis(rows: Tensor) -> Tensor:
    """Orthonormal (C, C) of float64 rows (n, C): largest variance first, the constant row last."""
    rows = rows - rows.mean(1, keepdim=True)
    covariance = rows.T @ rows
    # The constant direction has no variance here; this makes it the first of all.
    first = 1 + 2 * covariance.diagonal().sum()
    _, vectors = torch.linalg.eigh(covariance + first / len(covariance))
    basis: Tensor = vectors.T.flip(0).roll(-1, 0)
    basis[-1] = len(basis) ** -0.5  # exactly, so that no offset leaks into the others
    return basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()


@dataclass(frozen=True)
class Rows:
    """What a fair draw of rows says; logits here are without the offset of their row.

    mean: float32 (C,), sums to 0. basis: float32 (r, C), orthonormal, largest variance first, each
    sums to 0. center: float32 (C, r), for each prediction the mean of the components of its rows,
    drawn towards 0 where few rows or much spread say little. peak, high: float32 (r,), the largest
    distance of a component to its center, and that which one row of 1,000 exceeds. offset,
    offset_peak: the mean of the rows' offsets, and their largest distance to it.
    """

    mean: Tensor
    basis: Tensor
    center: Tensor
    peak: Tensor
    high: Tensor
    offset: float
    offset_peak: float

    @staticmethod
    def of(logits: Tensor, predictions: Tensor | None = None) -> "Rows":
        """logits: float32 (n, C), finite. predictions: int64 (n,); their argmax if None.

        Beside them a few numbers a row and C a component are in memory at once, and of up to 2,048
        classes their double.
        """
        classes = logits.shape[1]
        offsets = torch.cat([part.double().mean(1) for part in _parts(logits)])
        offset = float(offsets.mean())
        sums = torch.stack([part.double().sum(0) for part in _parts(logits)]).sum(0)
        mean = (sums / len(logits) - sums.mean() / len(logits)).float()
        predictions = logits.argmax(1) if predictions is None else predictions
        counts = predictions.bincount(minlength=classes).float()[:, None]
        known = len(logits) >= _ROWS_PER_CLASS * classes
        centred = _Centred(logits, mean, predictions)
        if known:
            centred = centred.around(counts)
        basis = centred.basis() if classes <= _EXACT else centred.leading_basis()
        components = _Centred(logits, mean, predictions).times(basis.T)
        center = torch.zeros(classes, len(basis))
        if known:
            center = _shrunk_means(components, predictions, counts)
        distance = (components - center[predictions]).abs()
        few = len(distance) // _EXCEEDED
        return Rows(
            mean=mean,
            basis=basis,
            center=center,
            peak=distance.amax(0),
            high=distance.topk(few + 1, dim=0).values[-1],
            offset=offset,
            offset_peak=float((offsets - offset).abs().max()),
        )


@dataclass(frozen=True)
class _Centred:
    """Rows without their offset, minus `mean`, minus the mean of those of the same prediction where
    that is given: float32 (C, C). Never in memory as a whole.
    """

    logits: Tensor
    mean: Tensor
    predictions: Tensor
    of_class: Tensor | None = None

    def around(self, counts: Tensor) -> "_Centred":
        """The same around the mean of each prediction. Few rows do not say it: two more count as
        0, so that no row becomes its own mean.
        """
        sums = torch.zeros(len(counts), len(self.mean))
        for start, part in self._runs():
            sums.index_add_(0, self.predictions[start : start + len(part)], part)
        return _Centred(self.logits, self.mean, self.predictions, sums / (counts + 2))

    def basis(self) -> Tensor:
        """All components but the constant one: float32 (C - 1, C)."""
        rows = torch.cat([part for _, part in self._runs()]).double()
        return eigenbasis(rows)[:-1].float().contiguous()

    def leading_basis(self) -> Tensor:
        """The leading components by a randomised range finder with one power iteration: Halko,
        Martinsson and Tropp 2011, algorithms 4.3 and 5.1, of the rows' transpose. float32 (r, C).
        """
        rows, classes = self.logits.shape
        rank = min(_MOST_COMPONENTS, rows, classes - 1)
        width = min(rank + _OVERSAMPLED, rows, classes)
        generator = torch.Generator().manual_seed(0)
        sketch = self.transposed_times(torch.randn(rows, width, generator=generator))  # (C, l)
        sketch = self.transposed_times(self.times(torch.linalg.qr(sketch).Q))
        sketch = torch.linalg.qr(sketch).Q
        small = self.times(sketch)  # (n, l): the rows in the range that was found
        _, vectors = torch.linalg.eigh(small.T.double() @ small.double())
        basis: Tensor = (sketch @ vectors.flip(1)[:, :rank].float()).T
        basis = basis - basis.mean(1, keepdim=True)
        length = basis.norm(dim=1, keepdim=True)  # 0 of the constant row, which no row has part in
        kept: Tensor = (basis / length)[length[:, 0] > 0.5]
        return kept

    def times(self, columns: Tensor) -> Tensor:
        """rows @ columns: (C, k) -> float32 (n, k)."""
        return torch.cat([part @ columns for _, part in self._runs()])

    def transposed_times(self, columns: Tensor) -> Tensor:
        """rows.T @ columns: (n, k) -> float32 (C, k)."""
        total = torch.zeros(len(self.mean), columns.shape[1])
        for start, part in self._runs():
            total.addmm_(part.T, columns[start : start + len(part)])
        return total

    def _runs(self) -> Iterator[tuple[int, Tensor]]:
        """Some rows at a time, and the number of the first."""
        size = max(1, _AT_ONCE // len(self.mean))
        for start in range(0, len(self.logits), size):
            part = self.logits[start : start + size]
            part = part - part.mean(1, keepdim=True) - self.mean
            if self.of_class is not None:
                part -= self.of_class[self.predictions[start : start + size]]
            yield start, part


def _shrunk_means(components: Tensor, predictions: Tensor, counts: Tensor) -> Tensor:
    """The mean of each class's components, times k / (k + within / between): float32 (C, r).

    The best linear guess from k rows where classes vary by `between` and rows of a class by
    `within` (one-way analysis of variance). counts: float32 (C, 1).
    """
    sums = torch.zeros(len(counts), components.shape[1]).index_add_(0, predictions, components)
    means = sums / counts.clamp(min=1)
    several = len(components) - int((counts > 0).sum())
    within = (components - means[predictions]).square().sum(0) / max(1, several)
    spread = (counts * means.square()).sum(0) / len(components)
    between = spread - within * (len(components) - several) / len(components)
    ratio = within / between.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(between > 0, means * counts / (counts + ratio), 0.0)


def _parts(logits: Tensor) -> Iterator[Tensor]:
    size = max(1, _AT_ONCE // logits.shape[1])
    return (logits[start : start + size] for start in range(0, len(logits), size))
