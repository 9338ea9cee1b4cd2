"""The part of the page about one cache: what it is, what its teacher gets wrong, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline.console import percent, size
from pipeline.report.figures import cache_figures
from pipeline.report.gallery import KINDS, Images, card, choose_samples, load_images
from pipeline.report.groups import short
from pipeline.report.measured import (
    Draw,
    Mistakes,
    calibration_of,
    chosen_rectification,
    count_mistakes,
    draw_rows,
    entropy,
    statistics_of,
)
from pipeline.report.suspects import SuspectedLabels, suspected_of
from pipeline.report.tables import Cell, Row, Table, Tile
from pipeline.report.unseen import beside_others
from stages.cache import LogitCache
from stages.inputs.views import mixes
from stages.scores import BINS

MOST_CLASSES = 1000
MOST_PAIRS = 20


@dataclass(frozen=True)
class Options:
    """Where the images of caches lie, if not where they were made from."""

    dataset: str | None = None
    root: str | None = None


def cache_part(cache: LogitCache, key: str, options: Options) -> dict[str, Any]:
    """What cache.html shows of one cache. key: unique on the page."""
    identity, complete = cache.identity, len(cache.complete_views)
    views, dataset = identity.views, identity.dataset
    settings = ", ".join(f"{k} {v}" for k, v in views.parameters.items())
    coding = ", ".join(f"{k} {short(v)}" for k, v in cache.encoding.parameters.items())
    sizes = [cache.commits.extent([view]).bytes for view in cache.complete_views]
    each = sum(sizes) / max(1, len(sizes)) / cache.num_samples
    spec = cache.provenance.get("config", {}).get("data", {}).get("dataset") or dataset.name
    whole = complete == cache.num_views
    return {
        "key": key,
        "name": PurePosixPath(str(cache.path)).name,
        "teacher": identity.teacher,
        "dtype": identity.compute_dtype,
        "done": f"all {complete:,}" if whole else f"{complete} of {cache.num_views:,}",
        "num_views": cache.num_views,
        "images": f"{dataset.num_samples:,}",
        "spec": str(spec),
        "classes": f"{cache.num_classes:,}",
        "views": views.policy + (f" ({settings})" if settings else ""),
        "seed": views.seed,
        "coding": cache.encoding.name + (f" ({coding})" if coding else ""),
        "bytes": f"{each:.1f} bytes each, {size(sum(sizes))} in all" if sizes else "",
        "kl": None if cache.fidelity is None else cache.fidelity.mean_kl[0],
        "mixed": mixes(views.policy),
        "digest": identity.digest()[:16],
        "measured": _measured(cache, key, options) if complete and cache.labelled else None,
        "labelled": cache.labelled,
    }


def compare_unseen(parts: Sequence[dict[str, Any]]) -> None:
    """Show the caches of folds of one dataset beside those of one teacher. parts: of all of them,
    as `cache_part` makes them, which are added to.
    """
    measured = [(part["key"], part["measured"]) for part in parts if part["measured"]]
    every = [each["statistics"] for _, each in measured]
    for key, each in measured:
        each["unseen"] = beside_others(key, each["statistics"], every)


def _measured(cache: LogitCache, key: str, options: Options) -> dict[str, Any]:
    rectified = chosen_rectification(cache, cache.complete_views)
    draw, mistakes = draw_rows(cache, rectified), count_mistakes(cache)
    chosen = choose_samples(draw)
    suspected = suspected_of(cache)
    shown = [*chosen, *(suspected.samples if suspected else ())]
    images = load_images(cache, shown, options.dataset, options.root) if shown else Images({})
    found = calibration_of(draw.logits, ~draw.wrong)
    legend = [
        ("right", "the label", "solid"),
        ("wrong", "what the teacher took it for", "solid"),
        ("plain", "others", "solid"),
    ]
    if rectified:
        legend.append(("rectified", f"after {rectified}, where that changes it", "solid"))
    cards = {
        heading: [card(cache, sample, images) for sample in chosen if sample.kind == kind]
        for kind, heading in KINDS.items()
    }
    return {
        "tiles": _tiles(cache, mistakes, draw),
        "figures": cache_figures(key, draw, found, cache.top1_per_view),
        "rows": len(draw.labels),
        "total": draw.total,
        "views": len(draw.views.unique()),
        "mistakes": mistakes,
        "by_class": _classes(cache, mistakes),
        "pairs": _pairs(cache, mistakes),
        "rectifications": _rectifications(cache),
        "temperature": draw.temperature,
        "images_note": images.note,
        "legend": legend,
        "cards": [(heading, shown) for heading, shown in cards.items() if shown],
        "statistics": statistics_of(cache, draw, mistakes),
        "unseen": None,
        "suspected": suspected,
        "suspect_cards": _suspect_cards(cache, suspected, images),
        "folds": cache.identity.teacher.folds is not None,
    }


def _suspect_cards(
    cache: LogitCache, suspected: SuspectedLabels | None, images: Images
) -> list[dict[str, Any]]:
    """The cards of labels that may be wrong."""
    if suspected is None:
        return []
    pairs = zip(suspected.samples, suspected.notes, strict=True)
    return [card(cache, sample, images, note) for sample, note in pairs]


def _tiles(cache: LogitCache, mistakes: Mistakes, draw: Draw) -> list[Tile]:
    found = calibration_of(draw.logits, ~draw.wrong)
    mean = sum(cache.top1_per_view.values()) / len(cache.top1_per_view)
    over, rate = found.overconfidence, mistakes.rate
    confident = f"{'overconfident' if over > 0 else 'underconfident'} on the views"
    tiles = [
        Tile("top-1 on the cached views", "top1", mean, percent(mean)),
        Tile("of the rows are wrong", "wrong_rate", rate, percent(rate), "wrong"),
        Tile(f"ECE on the views, {BINS} bins", "ece", found.ece, percent(found.ece)),
        Tile(confident, "overconfidence", over, f"{100 * abs(over):.2f} points"),
    ]
    if cache.eval_commits.is_complete(0):
        logits, labels = (rows[cache.eval_shown] for rows in cache.eval_logits())
        right = cache.eval_predictions()[cache.eval_shown] == labels
        test, accuracy = calibration_of(logits, right), float(right.double().mean())
        share = percent(accuracy)
        tiles.insert(1, Tile("top-1 on the test split", "test_top1", accuracy, share))
        tiles.append(Tile("ECE on the test split", "test_ece", test.ece, percent(test.ece)))
    for kind, rows in (("right", ~draw.wrong), ("wrong", draw.wrong)):
        if bool(rows.any()):
            value = float(entropy(draw.logits[rows]).double().mean())
            what, text = f"mean entropy, {kind} rows", f"{value:.3f} nats"
            tiles.append(Tile(what, f"entropy_{kind}", value, text, kind))
    return tiles


def _classes(cache: LogitCache, mistakes: Mistakes) -> Table:
    names = cache.identity.dataset.class_names
    rate = mistakes.wrong / mistakes.rows.clamp(min=1)
    order = rate.sort(descending=True, stable=True).indices[:MOST_CLASSES].tolist()
    highest = float(rate.max()) or 1.0
    rows = []
    for at in order:
        share = int(mistakes.wrong[at]) / max(1, int(mistakes.rows[at]))
        bar = Cell(percent(share, 1), share, "class_wrong_rate", share / highest)
        wrong = int(mistakes.wrong[at])
        rows.append(Row([names[at], Cell(f"{wrong:,}", wrong, "class_wrong"), bar]))
    shown = f", the {len(order):,} worst" if len(order) < len(names) else ""
    return Table(f"Wrong rate by class{shown}", ("class", "wrong rows", "wrong rate"), rows)


def _pairs(cache: LogitCache, mistakes: Mistakes) -> Table:
    names, rows = cache.identity.dataset.class_names, []
    top = mistakes.confused[:MOST_PAIRS]
    shares = [count / max(1, int(mistakes.rows[label])) for label, _, count in top]
    for (label, predicted, count), share in zip(top, shares, strict=True):
        bar = Cell(percent(share, 1), share, "pair_share", share / max(shares))
        counted = Cell(f"{count:,}", count, "pair_count")
        rows.append(Row([names[label], names[predicted], counted, bar]))
    columns = ("class", "taken for", "rows", "share of the class")
    return Table("Most confused pairs", columns, rows, words=2)


def _rectifications(cache: LogitCache) -> Table | None:
    rows = []
    for name in cache.rectifications:
        rectification = cache.rectification(name)
        settings, found = rectification.settings, rectification.statistics
        done = sum(rectification.commits.is_complete(v) for v in range(cache.num_views))
        wrong, label = found.get("wrong_rate"), found.get("label_is_argmax")
        rows.append(
            Row(
                [
                    name,
                    settings.method,
                    settings.space,
                    Cell(f"{settings.temperature:g}", settings.temperature),
                    Cell(f"{done} of {cache.num_views}", done),
                    "?" if wrong is None else Cell(percent(wrong), wrong, "rectified_wrong_rate"),
                    "?" if label is None else Cell(percent(label), label, "label_is_argmax"),
                ]
            )
        )
    if not rows:
        return None
    columns = ("name", "method", "space", "T", "views", "wrong rows", "label on top afterwards")
    return Table("Rectifications", columns, rows, words=3)
