"""What a run says of its epochs: a line of text each, and the summary of all of them."""

import statistics
from typing import Any, NamedTuple

import msgspec

from stages.order import Round


class EpochShown(NamedTuple):
    """What an epoch showed. views: those of its round, epoch after epoch. images: how many, each
    view of a sample counted. samples: of how many samples.
    """

    views: tuple[int, ...]
    within: Round
    images: int
    samples: int

    def metrics(self) -> dict[str, Any]:
        """For metrics.jsonl. In a round of one epoch every sample is shown, and `view` says all."""
        count = self.within.count
        found: dict[str, Any] = {"view": self.views[self.within.place * len(self.views) // count]}
        if count > 1:
            found |= {"views": [*self.views], "images": self.images, "samples": self.samples}
        return found


class Picked(msgspec.Struct, frozen=True, omit_defaults=True):
    """One epoch of a summary. epoch: from 0. test_top1, test_top5, val_top1: in [0, 1], None where
    there was nothing to measure them on.
    """

    epoch: int
    loss: float
    test_top1: float | None = None
    test_top5: float | None = None
    val_top1: float | None = None

    @property
    def top1(self) -> float:
        """Of the test split, in [0, 1]; of a run that has one."""
        assert self.test_top1 is not None
        return self.test_top1

    @property
    def top5(self) -> float:
        """As `top1`."""
        assert self.test_top5 is not None
        return self.test_top5


class Summary(msgspec.Struct, frozen=True):
    """summary.json of a run, as `summarise` makes it. wait_share: of train_seconds, how much went
    into waiting for targets. epoch_seconds: the median epoch without the first, which warms up;
    None in runs that are older than it.
    """

    last: Picked
    best: Picked
    selected: Picked
    epochs: int
    parameters: int
    train_seconds: float
    wait_share: float
    epoch_seconds: float | None = None

    @property
    def seconds_an_epoch(self) -> float:
        """What an epoch takes; the mean where the median was not kept."""
        return self.epoch_seconds or self.train_seconds / self.epochs


def said(metrics: dict[str, Any], epochs: int) -> str:
    """A finished epoch in one line."""
    top1 = metrics.get("test_top1")
    tested = "" if top1 is None else f"test top-1 {top1:.2%}  "
    return (
        f"epoch {metrics['epoch'] + 1}/{epochs}  {_views(metrics)}  "
        f"loss {metrics['loss']:.4f}  {tested}{metrics['seconds']:.1f} s"
    )


def _views(metrics: dict[str, Any]) -> str:
    if "views" not in metrics:
        return f"view {metrics['view']}"
    views = " ".join(map(str, metrics["views"]))
    return f"views {views} of {metrics['samples']:,} images"


def selected_epoch(history: list[dict[str, Any]]) -> int:
    """The epoch whose weights are kept: the best on held-out samples, or else the last."""
    if "val_top1" in history[-1]:
        return max(range(len(history)), key=lambda e: history[e]["val_top1"])
    return len(history) - 1


def summarise(history: list[dict[str, Any]], parameters: int) -> dict[str, Any]:
    """Last, best and selected epoch. `best` is by test top-1, as the literature reports it; the
    last where that is not measured.
    """
    picked = msgspec.convert(history, list[Picked])
    tested = picked[-1].test_top1 is not None
    epochs = [line["seconds"] for line in history]
    seconds = sum(epochs)
    waited = sum(line.get("wait_seconds", 0.0) for line in history)
    summary = Summary(
        last=picked[-1],
        best=max(picked, key=lambda line: line.top1) if tested else picked[-1],
        selected=picked[selected_epoch(history)],
        epochs=len(history),
        parameters=parameters,
        train_seconds=seconds,
        wait_share=waited / seconds,
        epoch_seconds=statistics.median(epochs[1:] or epochs),
    )
    plain: dict[str, Any] = msgspec.to_builtins(summary)
    return plain
