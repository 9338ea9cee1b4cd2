"""The teacher's logits, view by view.

Logits of a row depend on nothing but the rows that are computed with it: blocks are cut into the
same batches in every process, whatever was done before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.cache.encoding import Encoding, fit_encoding, fit_rows, views_to_fit
from stages.cache.layout import MAX_BLOCK_BYTES, BlockGrid, BlockId, block_grid
from stages.data import clean_view
from stages.device import forward
from stages.errors import ModelError
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import ViewFeed
from stages.inputs.views import ViewPolicy
from stages.teacher.folds import mean_logits
from stages.teacher.job import CacheJob


@dataclass(frozen=True)
class TeacherPass:
    """The teacher on the images of one split. Close its feed when it is done.

    split: as an error names it, None for the view that was asked for. progress: called with the
    number of rows of each batch.
    """

    job: CacheJob
    feed: ViewFeed
    split: str | None = None
    progress: Callable[[int], None] = lambda rows: None

    @classmethod
    def of(
        cls, job: CacheJob, progress: Callable[[int], None] = lambda rows: None
    ) -> "TeacherPass":
        """The teacher on views of the training split."""
        return cls(job, _feed(job, job.splits.train, job.policy), None, progress)

    @classmethod
    def on_test(cls, job: CacheJob) -> "TeacherPass":
        """The teacher on the test split, view 0."""
        view = clean_view(job.model, job.image_size, job.config.data.resize)
        return cls(job, _feed(job, job.splits.test, view), "the test split")

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

    def fitted_encoding(self) -> tuple[dict[BlockId, Tensor], Encoding]:
        """The encoding asked for, fitted to the first rows of view 0, with an anchor also of
        view 1; and the blocks that these are, float32 (n, C), so that nothing is computed twice.
        """
        job, order = self.job, self.job.row_order
        grid = block_grid(len(order), job.num_classes, job.config.block_rows)
        views = views_to_fit(job.config.encoding, job.config.views)
        numbers = range(blocks_to_fit(grid, job.num_classes))
        found = [self.finite_of_views(order[grid.rows(block)], views) for block in numbers]
        each = dict(zip(views, zip(*found, strict=True), strict=True))  # of a view all blocks
        rows, labels = job.seen_rows(first_rows(each[0], job.num_classes))
        second = None
        if 1 in each:
            second, _ = job.seen_rows(first_rows(each[1], job.num_classes))
        blocks = {BlockId(view, block): each[view][block] for view in views for block in numbers}
        config = job.config
        return blocks, fit_encoding(config.encoding, rows, labels, config.budget, second)


def _feed(job: CacheJob, dataset: ImageDataset, policy: ViewPolicy) -> ViewFeed:
    """Views of a dataset as this teacher sees them."""
    return ViewFeed(dataset, policy, job.device, job.image_size, job.config.data.workers)


def blocks_to_fit(grid: BlockGrid, num_classes: int) -> int:
    """How many blocks of view 0 an encoding is fitted to."""
    return -(-min(fit_rows(num_classes), grid.num_rows) // grid.block_rows)


def first_rows(blocks: Sequence[Tensor], num_classes: int) -> Tensor:
    """Those of a view's first blocks that an encoding is fitted to: float32 (n, C)."""
    most = fit_rows(num_classes)
    return torch.cat([block[:most] for block in blocks])[:most]


def check_finite(logits: Tensor, samples: Tensor, where: str) -> None:
    """Raise ModelError unless all logits are finite. samples: int64 (n,), whose they are."""
    finite = torch.isfinite(logits).all(1)
    if not bool(finite.all()):
        first = int(finite.logical_not().nonzero()[0])
        raise ModelError(
            f"the teacher's logits are not finite: sample {int(samples[first])}, {where}",
            "Compute in --dtype float32, or check the weights and the normalisation.",
        )
