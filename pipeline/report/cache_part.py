"""The part of the page about one cache: what it is, and what its teacher knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch

from pipeline.console import size
from pipeline.report import cache_figures as figures
from pipeline.report.figures import legend
from pipeline.report.gallery import KINDS, Images, Sample, choose_samples, load_images
from pipeline.report.groups import short
from pipeline.report.html import Cell, Html, Row, fragment, number, percent, table, tag
from pipeline.report.measured import (
    Draw,
    Mistakes,
    calibration_of,
    chosen_rectification,
    count_mistakes,
    draw_rows,
    entropy,
)
from stages.cache import LogitCache
from stages.inputs.views import mixes
from stages.scores import BINS, Calibration

MOST_CLASSES = 1000
MOST_PAIRS = 20
TOP_CLASSES = 5
"""Of each row in the gallery."""
UNCHANGED = 1e-5
"""Probabilities that differ by less are shown as one bar: rectification left them alone."""


Tile = tuple[str, str, float, str, str]
"""What, field, value, text and role of a number that is shown large."""


@dataclass(frozen=True)
class Options:
    """Where the images of caches lie, if not where they were made from."""

    dataset: str | None = None
    root: str | None = None


def cache_part(cache: LogitCache, key: str, options: Options) -> Html:
    """Everything about one cache. key: unique on the page."""
    title = tag("h3", "Cache ", tag("code", PurePosixPath(str(cache.path)).name), id=key)
    if not cache.complete_views:
        nothing = f"None of its {cache.num_views} views is complete yet: nothing is measured."
        return tag("section", title, _in_words(cache), tag("p", nothing))
    rectified = chosen_rectification(cache, cache.complete_views)
    draw = draw_rows(cache, rectified)
    mistakes = count_mistakes(cache)
    found = calibration_of(draw.logits, ~draw.wrong)
    chosen = choose_samples(draw)
    images = load_images(cache, chosen, options.dataset, options.root) if chosen else Images({})
    top1 = cache.top1_per_view
    shown = [figures.reliability(f"{key}-reliability", found)]
    shown.append(figures.confidences(f"{key}-confidence", draw))
    shown.append(figures.entropies(f"{key}-entropy", draw))
    if draw.after is not None and bool(draw.wrong.any()):
        shown.append(figures.rectified_entropies(f"{key}-rectified", draw))
    shown.append(figures.accuracy_by_view(f"{key}-views", top1))
    return tag(
        "section",
        title,
        _in_words(cache),
        _key_numbers(cache, mistakes, found, draw, [*top1.values()]),
        tag("div", shown, class_="figures"),
        tag("p", _rows_used(draw, mistakes), class_="note"),
        tag("h4", "Where it is wrong"),
        tag("div", _classes(cache, mistakes), _pairs(cache, mistakes), class_="columns"),
        _rectifications(cache),
        _gallery(cache, chosen, images, draw, rectified),
    )


def _in_words(cache: LogitCache) -> Html:
    identity, complete = cache.identity, len(cache.complete_views)
    views, dataset = identity.views, identity.dataset
    settings = ", ".join(f"{k} {v}" for k, v in views.parameters.items())
    spec = cache.provenance.get("config", {}).get("data", {}).get("dataset") or dataset.name
    whole = complete == cache.num_views
    done = f"all {complete:,}" if whole else f"{complete} of {cache.num_views:,}"
    first = fragment(
        "The teacher, a ",
        tag("strong", identity.teacher.architecture),
        f" (weights {identity.teacher.weights[:12]}, computed in {identity.compute_dtype}), ",
        f"was run once over {done} views of each of {dataset.num_samples:,} images of ",
        tag("strong", str(spec)),
        f" in {cache.num_classes:,} classes. Views: {views.policy}"
        + (f" ({settings})" if settings else "")
        + f", seed {views.seed}.",
    )
    sizes = [cache.commits.bytes_of_view(view) for view in cache.complete_views]
    coding = ", ".join(f"{k} {short(v)}" for k, v in cache.encoding.parameters.items())
    second = f" Rows are stored as {cache.encoding.name}" + (f" ({coding})" if coding else "")
    if sizes:
        each = sum(sizes) / len(sizes) / cache.num_samples
        second += f", {each:.1f} bytes each, {size(sum(sizes))} in all"
    if (fidelity := cache.fidelity) is not None:
        kl = fidelity.mean_kl[0]
        exact = "exactly" if kl == 0 else f"with a mean KL of {kl:.1e} to the exact rows at T = 1"
        second += f", {exact}"
    third = " Its views mix two samples; a row counts as right by the larger one's label."
    digest = identity.digest()[:16]
    mixed = third if mixes(views.policy) else ""
    return tag("p", first, second + ".", mixed, f" Identity {digest}.")


def _key_numbers(
    cache: LogitCache, mistakes: Mistakes, found: Calibration, draw: Draw, top1: list[float]
) -> Html:
    mean = sum(top1) / len(top1)
    tiles: list[Tile] = [
        ("top-1 on the cached views", "top1", mean, percent(mean), ""),
        ("of the rows are wrong", "wrong_rate", mistakes.rate, percent(mistakes.rate), "wrong"),
        (f"ECE on the views, {BINS} bins", "ece", found.ece, percent(found.ece), ""),
    ]
    over = found.overconfidence
    sure = f"{'surer' if over > 0 else 'less sure'} than right on the views"
    tiles.append((sure, "overconfidence", over, f"{100 * abs(over):.2f} points", ""))
    if cache.eval_commits.is_complete(0):
        logits, labels = (rows[cache.eval_shown] for rows in cache.eval_logits())
        right = cache.eval_predictions()[cache.eval_shown] == labels
        test, accuracy = calibration_of(logits, right), float(right.double().mean())
        tiles.insert(1, ("top-1 on the test split", "test_top1", accuracy, percent(accuracy), ""))
        tiles.append(("ECE on the test split", "test_ece", test.ece, percent(test.ece), ""))
    for kind, rows in (("right", ~draw.wrong), ("wrong", draw.wrong)):
        if bool(rows.any()):
            value = float(entropy(draw.logits[rows]).double().mean())
            told = f"mean entropy, {kind} rows"
            tiles.append((told, f"entropy_{kind}", value, f"{value:.3f} nats", kind))
    return key_numbers(tiles)


def key_numbers(tiles: Sequence[Tile]) -> Html:
    """Large numbers side by side."""
    items = [
        tag(
            "div",
            tag("dt", what),
            tag("dd", number(value, text, data_field=field), class_=f"ink-{role}" if role else ""),
        )
        for what, field, value, text, role in tiles
    ]
    return tag("dl", items, class_="numbers")


def _rows_used(draw: Draw, mistakes: Mistakes) -> Html:
    used = number(len(draw.labels), f"{len(draw.labels):,}", data_field="rows_used")
    of = f" of {draw.total:,} rows"
    views = len(draw.views.unique())
    why = (
        ", which is all of them."
        if draw.complete
        else f", runs of rows from {views} view{'s' if views > 1 else ''}; rows lie in random "
        "order, so that they are a fair draw."
    )
    counted = f" Wrong rows and confused classes are counted over {mistakes.used:,}"
    counted += " rows, all there are." if mistakes.used == mistakes.total else (
        f" of {mistakes.total:,} rows."
    )  # fmt: skip
    return fragment("Confidence, calibration and entropy are measured on ", used, of, why, counted)


def _classes(cache: LogitCache, mistakes: Mistakes) -> Html:
    names = cache.identity.dataset.class_names
    rate = mistakes.wrong / mistakes.rows.clamp(min=1)
    order = rate.sort(descending=True, stable=True).indices[:MOST_CLASSES].tolist()
    highest = float(rate.max()) or 1.0
    rows = []
    for at in order:
        share = int(mistakes.wrong[at]) / max(1, int(mistakes.rows[at]))
        bar = Cell(percent(share, 1), share, "class_wrong_rate", share / highest)
        wrong = int(mistakes.wrong[at])
        rows.append(Row((Cell(names[at]), Cell(f"{wrong:,}", wrong, "class_wrong"), bar)))
    shown = f", the {len(order):,} worst" if len(order) < len(names) else ""
    return table(f"Wrong rate by class{shown}", ("class", "wrong rows", "wrong rate"), rows)


def _pairs(cache: LogitCache, mistakes: Mistakes) -> Html:
    names, rows = cache.identity.dataset.class_names, []
    top = mistakes.confused[:MOST_PAIRS]
    shares = [count / max(1, int(mistakes.rows[label])) for label, _, count in top]
    for (label, predicted, count), share in zip(top, shares, strict=True):
        bar = Cell(percent(share, 1), share, "pair_share", share / max(shares))
        rows.append(
            Row((names[label], names[predicted], Cell(f"{count:,}", count, "pair_count"), bar))
        )
    columns = ("class", "taken for", "rows", "share of the class")
    return table("Most confused pairs", columns, rows, text_columns=2)


def _rectifications(cache: LogitCache) -> Html | None:
    rows = []
    for name in cache.rectifications:
        rectification = cache.rectification(name)
        settings, found = rectification.settings, rectification.statistics
        done = sum(rectification.commits.is_complete(v) for v in range(cache.num_views))
        wrong, label = found.get("wrong_rate"), found.get("label_is_argmax")
        rows.append(
            Row(
                (
                    name,
                    settings.method,
                    settings.space,
                    Cell(f"{settings.temperature:g}", settings.temperature),
                    Cell(f"{done} of {cache.num_views}", done),
                    "?" if wrong is None else Cell(percent(wrong), wrong, "rectified_wrong_rate"),
                    "?" if label is None else Cell(percent(label), label, "label_is_argmax"),
                )
            )
        )
    if not rows:
        return tag(
            "p",
            "Nothing is rectified in this cache: `pipeline rectify` has not run.",
            class_="note",
        )
    columns = ("name", "method", "space", "T", "views", "wrong rows", "label on top afterwards")
    return table("Rectifications", columns, rows, text_columns=3)


def _gallery(
    cache: LogitCache, chosen: list[Sample], images: Images, draw: Draw, rectified: str | None
) -> Html:
    title = tag("h4", "Mistakes, one by one")
    if not chosen:
        return fragment(title, tag("p", "The teacher has none of the rows that were drawn wrong."))
    at = f"Probabilities at T = {draw.temperature:g}, on each card's own scale. "
    sure = "How sure the teacher is, is told at T = 1. "
    told = tag("p", at, sure, images.note, class_="note")
    key = [("right", "the label"), ("wrong", "what the teacher took it for"), ("plain", "others")]
    key += [("rectified", f"after {rectified}, where that changes it")] if rectified else []
    blocks = []
    for kind, heading in KINDS.items():
        cards = [_card(cache, sample, images) for sample in chosen if sample.kind == kind]
        if cards:
            blocks.append(tag("h5", heading))
            blocks.append(tag("div", cards, class_="gallery"))
    return fragment(title, told, legend(*((*entry, "solid") for entry in key)), blocks)


def _card(cache: LogitCache, sample: Sample, images: Images) -> Html:
    names = cache.identity.dataset.class_names
    after = sample.before if sample.after is None else sample.after
    both = torch.maximum(sample.before, after)
    picked = both.topk(min(TOP_CLASSES, len(both))).indices.tolist()
    picked += [c for c in (sample.label,) if c not in picked]
    picked.sort(key=lambda c: -float(both[c]))
    highest, bars = float(both.max()), []
    for c in picked:
        role = {sample.label: "label", sample.predicted: "predicted"}.get(c)
        colours = "right" if c == sample.label else "wrong" if c == sample.predicted else "plain"
        was, now = float(sample.before[c]), float(after[c])
        lines = [_bar(was, highest, colours)]
        if abs(now - was) > UNCHANGED:
            lines.append(_bar(now, highest, "rectified"))
        bars.append(tag("dt", names[c], class_=role))
        bars.append(tag("dd", lines))
    uri = images.uris.get((sample.sample, sample.view))
    told = f"sample {sample.sample}, view {sample.view}"
    picture = tag("img", src=uri, alt=told) if uri else None
    return tag(
        "article",
        tag(
            "header",
            picture,
            tag(
                "p",
                tag("span", names[sample.label], class_="ink-right"),
                " taken for ",
                tag("span", names[sample.predicted], class_="ink-wrong"),
                tag("small", f"{told}; {percent(sample.confidence, 1)} sure"),
            ),
        ),
        tag("dl", bars, class_="bars"),
        class_="card",
        data_sample=sample.sample,
        data_view=sample.view,
    )


def _bar(value: float, highest: float, role: str) -> Html:
    width = f"width:{100 * value / highest:.1f}%"
    bar = tag("span", tag("i", class_=f"bar fill-{role}", style=width), class_="track")
    return tag("div", bar, number(value, percent(value, 1)))
