"""The teacher's logits, view by view.

Logits of a row depend on nothing but the rows that are computed with it: blocks are cut into the
same batches in every process, whatever was done before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.cache.encoding import Encoding, fit_encoding, fit_rows, views_to_fit
from stages.cache.layout import MAX_BLOCK_BYTES, BlockGrid, BlockId
from stages.device import forward
from stages.errors import ModelError
from stages.inputs.feed import ViewFeed
from stages.settings import CacheConfig
from stages.teacher.folds import mean_logits
from stages.teacher.job import CacheJob

Blocks = dict[BlockId, Tensor]
"""(view, block) -> float32 logits (n, C)."""


@dataclass(frozen=True)
class TeacherPass:
    """The teacher on the images of one split. Close its feed when it is done.

    split: as an error names it, None for the view that was asked for. progress: called with the
    number of rows of each batch.
    """

    job: CacheJob
    feed: ViewFeed
    split: str | None = None
    progress: Callable[[int], object] = lambda rows: None

    @classmethod
    def of(
        cls, job: CacheJob, progress: Callable[[int], object] = lambda rows: None
    ) -> "TeacherPass":
        """The teacher on views of the training split."""
        return cls(job, job.feed(job.splits.train, job.policy), None, progress)

    @classmethod
    def on_test(cls, job: CacheJob) -> "TeacherPass":
        """The teacher on the test split, view 0."""
        return cls(job, job.feed(job.splits.test, job.clean), "the test split")

    def logits(self, samples: Tensor, view: int) -> Tensor:
        """The teacher's float32 logits (n, C) for one view of some samples, on the CPU; of several
        each for the samples of its fold, or of the test split their mean.
        """
        return self.of_views(samples, (view,))[0]

    @torch.inference_mode()
    def of_views(self, samples: Tensor, views: Sequence[int]) -> list[Tensor]:
        """As `logits`, for each of several views; an image is decoded once for all of them."""
        folds = self.job.folds
        if folds is None:
            return self._rows(self.job.model.module, samples, views)
        if self.split is not None:
            each = [self._rows(module, samples, views) for module in folds.modules]
            return [mean_logits(of_view) for of_view in zip(*each, strict=True)]
        logits = [torch.empty(len(samples), self.job.num_classes) for _ in views]
        for module, places in folds.parts(samples):
            found = self._rows(module, samples[places], views)
            for whole, part in zip(logits, found, strict=True):
                whole[places] = part
        return logits

    def _rows(self, module: nn.Module, samples: Tensor, views: Sequence[int]) -> list[Tensor]:
        """As `of_views`, of one network. From a GPU they are copied batch by batch while it goes on
        computing.
        """
        job, classes = self.job, self.job.num_classes
        # A block must not depend on who computes it: cuDNN chooses by rule, not by timing.
        torch.backends.cudnn.benchmark = False
        on_gpu = job.device.type == "cuda"
        pinned = on_gpu and 4 * len(samples) * classes <= MAX_BLOCK_BYTES  # torch keeps it
        logits = [torch.empty((len(samples), classes), pin_memory=pinned) for _ in views]
        in_order, start = self.feed.dataset.in_order, 0
        if in_order:  # their place in the block is given back at the end
            samples, places = samples.sort()
        for batches in self.feed.views(samples, views, job.config.batch_size):
            size = len(batches[0].samples)
            for batch, whole in zip(batches, logits, strict=True):
                output = forward(module, job.normalise(batch.pixels), job.config.dtype)
                if output.shape != (size, classes):
                    raise ModelError(
                        f"the teacher gives logits of shape {tuple(output.shape)} for "
                        f"{size} images and {classes} classes",
                        "Let the model return a row of logits for each image.",
                    )
                whole[start : start + size].copy_(output, non_blocking=True)
                self.progress(size)
            start += size
        if on_gpu:
            torch.cuda.current_stream(job.device).synchronize()
        if in_order:
            for rows in logits:
                rows[places] = rows.clone()
        return logits

    def finite_logits(self, samples: Tensor, view: int) -> Tensor:
        """As `logits`. Raises ModelError unless all are finite."""
        return self.finite_of_views(samples, (view,))[0]

    def finite_of_views(self, samples: Tensor, views: Sequence[int]) -> list[Tensor]:
        """As `of_views`. Raises ModelError unless all are finite."""
        found = self.of_views(samples, views)
        for view, logits in zip(views, found, strict=True):
            check_finite(logits, samples, self.split or f"view {view}")
        return found

    def first_blocks(self) -> Blocks:
        """The blocks whose rows the encoding is fitted to: the first of view 0, with an anchor also
        of view 1. They are to be kept, so that nothing is computed twice.
        """
        job, grid = self.job, self.job.grid
        views = views_to_fit(job.config.encoding, job.config.views)
        found = {
            block: self.finite_of_views(job.row_order[grid.rows(block)], views)
            for block in range(blocks_to_fit(grid, job.num_classes))
        }
        return {BlockId(v, block): found[block][k] for k, v in enumerate(views) for block in found}


@dataclass(frozen=True)
class FirstRows:
    """The rows that an encoding is fitted to and the teacher is judged by, of samples that it has
    seen.

    rows: float32 (n, C), of view 0. labels: int64 (n,). second: as rows, of view 1, where it is
    needed.
    """

    rows: Tensor
    labels: Tensor
    second: Tensor | None = None

    @classmethod
    def of(cls, job: CacheJob, rows: Tensor, second: Tensor | None = None) -> "FirstRows":
        """rows, second: of the first samples in the order of rows, those that are left out too."""
        samples, train = job.row_order[: len(rows)], job.splits.train
        seen = ~torch.isin(samples, train.skipped)
        labels = train.labels[samples[seen]]
        return cls(rows[seen], labels, None if second is None else second[seen])

    @classmethod
    def of_blocks(cls, job: CacheJob, blocks: Blocks) -> "FirstRows":
        """blocks: as of `TeacherPass.first_blocks`."""
        most = fit_rows(job.num_classes)
        of_view: dict[int, list[Tensor]] = {}
        for at, logits in blocks.items():
            of_view.setdefault(at.view, []).append(logits[:most])
        rows = [torch.cat(parts)[:most] for parts in of_view.values()]
        return cls.of(job, *rows)

    def fitted(self, config: CacheConfig) -> Encoding:
        """The encoding asked for. Raises CacheError if it does not hold the KL asked for."""
        return fit_encoding(config.encoding, self.rows, self.labels, config.budget, self.second)


def blocks_to_fit(grid: BlockGrid, num_classes: int) -> int:
    """How many blocks of view 0 an encoding is fitted to."""
    return -(-min(fit_rows(num_classes), grid.num_rows) // grid.block_rows)


def check_finite(logits: Tensor, samples: Tensor, where: str) -> None:
    """Raise ModelError unless all logits are finite. samples: int64 (n,), whose they are."""
    finite = torch.isfinite(logits).all(1)
    if not bool(finite.all()):
        first = int(finite.logical_not().nonzero()[0])
        raise ModelError(
            f"the teacher's logits are not finite: sample {int(samples[first])}, {where}",
            "Compute in --dtype float32, or check the weights and the normalisation.",
        )
