"""What models return, and which of it are the logits of the dataset's classes, in their order."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import ConfigError, ModelError, PipelineError
from stages.inputs.datasets import ImageDataset
from stages.inputs.feed import Normalise, ViewFeed
from stages.inputs.models import Model
from stages.inputs.views import ViewPolicy
from stages.settings import Outputs
from stages.user_code import error_line

_SUM_TOLERANCE = 1e-2
"""Of a row of probabilities in half precision."""


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a model returns: a tensor; a mapping or an object with `logits`, or a
    mapping with one tensor; a tuple or list that starts with them, after a loss or nothing.

    Raises ModelError for anything else.
    """
    found = _logits(output)
    if found is None:
        raise ModelError(
            f"the model returns {_described(output)}: which of it are the logits?",
            "Return a tensor (images, classes), a tuple that starts with it, or {'logits': it}.",
        )
    return found


def are_probabilities(logits: Tensor) -> bool:
    """Whether all rows (B, C) lie in [0, 1] and sum to 1, as after a softmax."""
    if not len(logits) or logits.shape[1] < 2 or not bool(torch.isfinite(logits).all()):
        return False
    rows = logits.double()
    inside = (rows >= 0).all() and (rows <= 1 + _SUM_TOLERANCE).all()
    return bool(inside) and bool(((rows.sum(1) - 1).abs() < _SUM_TOLERANCE).all())


class Adapted(nn.Module):
    """A model whose outputs are turned into logits of the dataset's classes.

    Probabilities p become log p, which differs from their logits by a constant a row; 0 becomes the
    log of the smallest normal float32, -87. order: which output each class of the dataset is.
    pooled: instead, which outputs each class has; the logit of several is their logsumexp, so that
    their probabilities are added up.
    """

    def __init__(
        self,
        module: nn.Module,
        outputs: Outputs,
        order: Sequence[int],
        pooled: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        self.module, self._outputs = module, outputs
        most = max(map(len, pooled), default=0)
        padded = [[*group, *[-1] * (most - len(group))] for group in pooled]
        index = torch.tensor(padded or order, dtype=torch.int64)  # (C, most) or (C,)
        self.register_buffer("index", index, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, C, H, W)."""
        logits, index = logits_of(self.module(images)), self.get_buffer("index")
        if self._outputs == "probabilities":
            logits = logits.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        if not len(index):
            return logits
        kept = logits[:, index]
        if index.dim() == 1:
            return kept
        return kept.masked_fill(index < 0, -torch.inf).logsumexp(2)


def output_order(
    theirs: Sequence[str] | None, ours: Sequence[str], wanted: str | None, source: str
) -> tuple[int, ...]:
    """Which of a model's outputs each of the dataset's classes is; empty if the same numbers are.

    theirs: the names of the model's classes, None where they are not known. wanted: None to refuse
    another order, `teacher` to follow it, `dataset` to ignore the model's names, or a file with the
    names of the model's classes in order, one a line. source: of the model, for messages.

    Raises ModelError where the names differ, or their order does and nothing is wanted.
    """
    if wanted == "dataset":
        return ()
    if wanted not in (None, "teacher"):
        theirs, source = _names_in(Path(str(wanted))), str(wanted)
    if theirs is None:
        if wanted is None:
            return ()
        raise ConfigError(
            f"{source} does not say the order of its classes",
            "Give a file with their names, one a line: --class-order FILE.",
        )
    if tuple(theirs) == tuple(ours):
        return ()
    if sorted(theirs) != sorted(ours):
        raise ModelError(
            f"{source} has other classes than the dataset: {_difference(theirs, ours)}",
            "If its output i is the dataset's class i all the same, give --class-order dataset.",
        )
    first = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    if wanted is None or len({*theirs}) < len(theirs):
        raise ModelError(
            f"the classes of {source} are in another order: its output {first} is "
            f"{theirs[first]!r}, the dataset's class {first} is {ours[first]!r}",
            "Give --class-order teacher, and its outputs are put into the dataset's order.",
        )
    place = {name: i for i, name in enumerate(theirs)}
    return tuple(place[name] for name in ours)


def failure(error: Exception, images: Tensor) -> PipelineError:
    """What to raise for an exception from a model's forward pass."""
    if isinstance(error, PipelineError):
        return error
    full = "out of memory" in str(error).lower()
    return ModelError(
        f"the model failed on images of shape {tuple(images.shape)}: {error_line(error)}",
        "Give a smaller --batch-size." if full else "Check the model on a batch of this shape.",
    )


# ---- details --------------------------------------------------------------------------------


def _logits(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        if "logits" in output:
            return _logits(output["logits"])
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        return tensors[0] if len(tensors) == 1 else None
    if isinstance(output, (tuple, list)):
        rest = [part for part in output if not _is_loss(part)]
        return _logits(rest[0]) if rest else None
    return _logits(output.logits) if hasattr(output, "logits") else None


def _is_loss(part: Any) -> bool:
    return part is None or isinstance(part, float) or (isinstance(part, Tensor) and part.ndim == 0)


def _described(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a mapping with the keys {', '.join(map(str, [*output][:5])) or '(none)'}"
    return "None" if output is None else f"a {type(output).__name__}"


def _names_in(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the class names in {path}: {error}",
            "--class-order takes teacher, dataset, or a file with one name a line.",
        ) from error


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    more, fewer = sorted({*theirs} - {*ours}), sorted({*ours} - {*theirs})
    both = [(more, "not in the dataset"), (fewer, "only in the dataset")]
    differing = [f"{', '.join(map(repr, names[:3]))} {where}" for names, where in both if names]
    return "; ".join(differing) or f"{len(theirs)}, not {len(ours)}"


# ---- what a model gives for the images of a dataset ------------------------------------------


def sample_pixels(dataset: ImageDataset, policy: ViewPolicy, image_size: int | None) -> Tensor:
    """View 0 of the first two samples, of one where there are no more: uint8 (B, C, H, W), on the
    CPU.
    """
    feed = ViewFeed(dataset, policy, torch.device("cpu"), image_size, workers=0)
    return next(feed.batches(torch.arange(min(2, len(dataset))), 0, 2)).pixels


def check_output(model: Model, pixels: Tensor, normalise: Normalise, num_classes: int) -> None:
    """Raise ModelError unless a model gives a logit for each of the dataset's classes. See
    `sample_outputs`.
    """
    rows = sample_outputs(model, pixels, normalise)
    check_width(model, rows, num_classes)
    check_kind(model, rows, "logits")


def sample_outputs(model: Model, pixels: Tensor, normalise: Normalise) -> Tensor:
    """What a model returns for some images, on the CPU, where it is before it is placed:
    (B, outputs). pixels: uint8 (B, C, H, W). Raises ModelError unless it is a row for each.
    """
    model.module.eval()
    try:
        with torch.inference_mode():
            found = model.module(normalise(pixels))
    except Exception as error:
        raise ModelError(
            f"{model.architecture} cannot take images of {tuple(pixels.shape[1:])}: "
            f"{error_line(error)}",
            "Give --image-size, or another model.",
        ) from error
    logits = logits_of(found)
    if logits.ndim != 2 or len(logits) != len(pixels):
        raise ModelError(
            f"{model.architecture} gives logits of shape {tuple(logits.shape)} for "
            f"{len(pixels)} images",
            "Use a model with one row of outputs per image.",
        )
    return logits


def check_width(model: Model, rows: Tensor, num_classes: int) -> None:
    """Raise ModelError unless rows have an output for each of the dataset's classes."""
    if rows.shape[1] != num_classes:
        raise ModelError(
            f"{model.architecture} gives logits of shape {tuple(rows.shape)} for {len(rows)} "
            f"images; the dataset has {num_classes} classes",
            "Use a model with one output per class; for a teacher --classes says which of its "
            "outputs they are.",
        )


def check_kind(model: Model, logits: Tensor, outputs: Outputs) -> None:
    """Raise ModelError unless rows are logits, or probabilities where `outputs` says so."""
    if are_probabilities(logits.float()) != (outputs == "probabilities"):
        if outputs == "probabilities":
            raise ModelError(
                f"the outputs of {model.architecture} are no probabilities: rows do not sum to 1",
                "Leave --outputs out.",
            )
        raise ModelError(
            f"{model.architecture} returns probabilities (rows that sum to 1), not logits",
            "Return what goes into the softmax; --outputs probabilities takes a teacher's log.",
        )


def check_trained_on_one(model: Model, images: Tensor) -> None:
    """Raise ConfigError where a model cannot train on one image, as with batch norm over a single
    value a channel. Weights and generators stay as they are. images: float32 (1, C, H, W).
    """
    module = copy.deepcopy(model.module).train()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module(images)
    except ValueError as error:
        raise ConfigError(
            f"{model.architecture} cannot train on batches of one image: {error}",
            "Give --batch-size 2 or more for every process.",
        ) from error
