"""Wrong samples to look at: the very pixels that the teacher saw, and its rows."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.report.measured import Draw
from stages.cache import LogitCache
from stages.cache.identity import differences
from stages.data import cached_policy, dataset_identity, skips_of
from stages.errors import ConfigError, DatasetError, IdentityError, PipelineError
from stages.inputs.datasets import ImageDataset, load_dataset
from stages.inputs.feed import ViewFeed
from stages.inputs.probes import NO_PROBE, pixel_probes
from stages.user_code import check_trusted

TOP_CLASSES = 5
"""Of each row in the gallery."""
UNCHANGED = 1e-5
"""Probabilities that differ by less are shown as one bar: rectification left them alone."""
KINDS = {"sure": "Most confident", "drawn": "Drawn at random"}
EACH = 6
"""How many samples of each kind."""
SIDE = 112
"""Larger images are made this small, in pixels."""


@dataclass(frozen=True)
class Sample:
    """A wrong row. confidence: of the predicted class at T=1. before, after: float32 (C,),
    probabilities at the draw's temperature; after is None without a rectification.
    """

    kind: str
    sample: int
    view: int
    label: int
    predicted: int
    confidence: float
    before: Tensor
    after: Tensor | None


def choose_samples(draw: Draw, each: int = EACH) -> list[Sample]:
    """The wrong rows that the teacher is surest of, then some of the others; no sample twice."""
    at = draw.wrong.nonzero().squeeze(1)
    confidence = torch.softmax(draw.logits[at], dim=1).gather(1, draw.predictions[at, None])[:, 0]
    by_confidence = confidence.sort(descending=True, stable=True).indices.tolist()
    taken: set[int] = set()
    chosen: list[Sample] = []
    stride = max(1, len(at) // max(1, each))  # over all views, not the first one alone
    drawn = sorted(range(len(at)), key=lambda position: position % stride)
    for kind, order in (("sure", by_confidence), ("drawn", drawn)):
        wanted = len(chosen) + each
        for position in order:
            row = int(at[position])
            sample = int(draw.samples[row])
            if sample in taken or len(chosen) == wanted:
                continue
            taken.add(sample)
            soft = [
                None if rows is None else torch.softmax(rows[position] / draw.temperature, dim=0)
                for rows in (draw.before, draw.after)
            ]
            assert soft[0] is not None
            chosen.append(
                Sample(
                    kind,
                    sample,
                    int(draw.views[row]),
                    int(draw.labels[row]),
                    int(draw.predictions[row]),
                    float(confidence[position]),
                    soft[0],
                    soft[1],
                )
            )
    return chosen


@dataclass(frozen=True)
class Images:
    """PNG of each sample that was asked for, as data URIs; or why there are none."""

    uris: dict[tuple[int, int], str]
    note: str = ""


def load_images(
    cache: LogitCache, chosen: list[Sample], dataset: str | None, root: str | None
) -> Images:
    """The views of these samples. Where the dataset is not there or is another one, there are
    none; that is an error only where it was named.
    """
    config = cache.provenance.get("config", {}).get("data", {})
    spec = dataset or config.get("dataset")
    try:
        if spec is None:
            raise DatasetError("the cache does not say which dataset it was made from")
        _check_builtin(cache, str(spec), named=dataset is not None)
        train = load_dataset(
            str(spec),
            "train",
            root=root or config.get("root"),
            feeding="stream",
            skips=skips_of([cache.skips]),
            test=config.get("test"),
            exif=bool(config.get("exif")),
            jpeg_side=config.get("jpeg_side"),
            decoder=config.get("decoder"),
        )
        if differing := differences(dataset_identity(train), cache.identity.dataset):
            raise IdentityError(f"{spec} is another dataset or order: {'; '.join(differing[:3])}")
        return _render(cache, train, chosen)
    except PipelineError as error:
        if dataset is not None or root is not None:
            raise
        names = "Name the dataset with --dataset and --root."
        help_ = error.remedy if isinstance(error, ConfigError) else names
        return Images({}, f"No images: {error.cause}. {help_}")


def _check_builtin(cache: LogitCache, spec: str, named: bool) -> None:
    """Raise ConfigError where a cache names code: a stranger's is not run for looking at it."""
    policy = cache.identity.views.policy
    check_trusted(f"cache {cache.path}", policy=policy, name=None if named else spec)


def _render(cache: LogitCache, train: ImageDataset, chosen: list[Sample]) -> Images:
    policy, size = cached_policy(cache), cache.identity.teacher.image_size
    feed = ViewFeed(train, policy, torch.device("cpu"), size, workers=0)
    uris = {}
    for view in sorted({sample.view for sample in chosen}):
        samples = torch.tensor([sample.sample for sample in chosen if sample.view == view])
        for batch in feed.batches(samples, view, len(samples)):
            for sample, pixels in zip(batch.samples.tolist(), batch.pixels, strict=True):
                uris[sample, view] = png_uri(pixels)
    probes = pixel_probes(train, policy, size)
    pairs = zip(probes, cache.pixel_probes, strict=False)
    differ = sum(a != b for a, b in pairs if a != NO_PROBE)
    note = f"{differ} of {len(probes)} pixel probes differ from what the teacher saw."
    return Images(uris, note if differ else "")


def png_uri(pixels: Tensor) -> str:
    """uint8 (C, H, W) with one or three channels -> a data URI."""
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3])
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    image.save(written, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def card(cache: LogitCache, sample: Sample, images: Images, note: str = "") -> dict[str, Any]:
    """A wrong row: its image, and its largest probabilities before and after rectification."""
    names = cache.identity.dataset.class_names
    after = sample.before if sample.after is None else sample.after
    both = torch.maximum(sample.before, after)
    picked = both.topk(min(TOP_CLASSES, len(both))).indices.tolist()
    picked += [c for c in (sample.label,) if c not in picked]
    picked.sort(key=lambda c: -float(both[c]))
    highest, classes = float(both.max()), []
    roles = {sample.label: ("label", "right"), sample.predicted: ("predicted", "wrong")}
    for c in picked:
        role, colour = roles.get(c, ("", "plain"))
        was, now = float(sample.before[c]), float(after[c])
        bars = [(was, was / highest, colour)]
        if abs(now - was) > UNCHANGED:
            bars.append((now, now / highest, "rectified"))
        classes.append((names[c], role, bars))
    return {
        "sample": sample.sample,
        "view": sample.view,
        "label": names[sample.label],
        "predicted": names[sample.predicted],
        "confidence": sample.confidence,
        "note": note,
        "uri": images.uris.get((sample.sample, sample.view)),
        "classes": classes,
    }
