"""Tables about caches and runs: what is planned, what is there, what came of it."""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.console import Console, counted, duration, size
from stages.cache import LogitCache
from stages.cache.encoding import Encoding, Fidelity
from stages.cache.identity import FoldsIdentity
from stages.cache_teacher import CacheSummary
from stages.settings import TeacherConfig
from stages.sizes import KL_TEMPERATURES
from stages.teacher.job import normalisation_text
from stages.teacher.plan import CachePlan
from stages.verify import Fault, Verified

MOST_FAULTS = 50


def show_cache(path: str, console: Console) -> None:
    """Print identity, provenance, completeness, size and rectifications of a cache."""
    cache = LogitCache.open(path)
    identity, complete = cache.identity, cache.complete_views
    there = cache.commits.extent()
    parameters = ", ".join(f"{k}={v}" for k, v in identity.views.parameters.items())
    versions = ", ".join(f"{k} {v}" for k, v in cache.provenance.get("versions", {}).items())
    made_from = cache.provenance.get("config", {}).get("teacher", {})
    dataset, source = identity.dataset, str(cache.provenance.get("normalisation", ""))
    normalised = identity.teacher.mean, identity.teacher.std, source
    console.table(
        str(path),
        ("what", "value"),
        [
            ("teacher", f"{identity.teacher.architecture}, weights {identity.teacher.weights}"),
            *([("folds", _folds(identity.teacher.folds))] if identity.teacher.folds else []),
            ("normalisation", normalisation_text(*normalised)),
            ("input size", identity.teacher.image_size or "the images' own"),
            ("computed in", identity.compute_dtype),
            (
                "dataset",
                f"{dataset.name}, {dataset.num_samples:,} x {cache.num_classes} classes",
            ),
            *([("left out", _left_out(cache))] if cache.skips else []),
            ("views", f"{identity.views.policy} ({parameters}), seed {identity.views.seed}"),
            ("identity", cache.identity.digest()),
            ("encoding", encoding_text(cache.encoding)),
            (
                "complete",
                f"{len(complete)} of {cache.num_views} views, {there.blocks:,} of "
                f"{cache.num_views * cache.grid.num_blocks:,} blocks",
            ),
            (
                "on disk",
                f"{size(there.bytes)}, {there.bytes / max(1, there.rows):.1f} bytes a sample and "
                "view",
            ),
            *(
                [("calibrated", f"temperature {found.temperature:.4g}, {found.on} rows")]
                if (found := cache.calibrated)
                else []
            ),
            ("labels", "yes" if cache.labelled else "none"),
            ("test logits", _test_logits(cache)),
            (
                "made from",
                f"{made_from.get('weights', '?')}, on {cache.provenance.get('device')}",
            ),
            ("made with", versions),
        ],
    )
    if cache.fidelity is not None:
        show_fidelity(console, cache.fidelity)
    _show_rectifications(console, cache)


def _show_rectifications(console: Console, cache: LogitCache) -> None:
    """Print a line for each, if there are any."""
    rows = []
    for name in cache.rectifications:
        rectification = cache.rectification(name)
        settings, statistics = rectification.settings, rectification.statistics
        done = sum(rectification.commits.is_complete(v) for v in range(cache.num_views))
        wrong = f"{statistics['wrong_rate']:.2%}" if statistics else "?"
        rows.append(
            (
                name,
                settings.method,
                settings.space,
                f"{settings.temperature:g}",
                f"{done} of {cache.num_views}",
                wrong,
            )
        )
    if rows:
        columns = ("rectification", "method", "space", "T", "views", "wrong rows")
        console.table("rectifications", columns, rows)


def show_run(console: Console, out: str, summary: dict[str, Any]) -> None:
    """Last, best and selected epoch of a training run."""
    rows = [
        (
            name,
            summary[name]["epoch"] + 1,
            *(
                f"{summary[name][k]:.2%}" if k in summary[name] else "no test split"
                for k in ("test_top1", "test_top5")
            ),
        )
        for name in ("last", "best", "selected")
    ]
    seconds, share = duration(summary["train_seconds"]), summary["wait_share"]
    title = (
        f"{out}: {summary['parameters']:,} parameters, {seconds}, {share:.1%} waiting for targets"
    )
    console.table(title, ("", "epoch", "test top-1", "test top-5"), rows)


def show_folds(
    console: Console, out: str, config: TeacherConfig, summaries: Sequence[dict[str, Any]]
) -> None:
    """The last epoch of the teacher of every fold that was trained."""
    folds = range(len(summaries)) if config.fold is None else [config.fold]
    rows = [
        (fold, *(f"{summary['last'][k]:.2%}" for k in ("test_top1", "test_top5")))
        for fold, summary in zip(folds, summaries, strict=True)
    ]
    title = f"{out}: teachers trained without one of {config.folds} folds"
    console.table(title, ("fold", "test top-1", "test top-5"), rows)
    if config.fold is None:
        console.say(f"Cache what each says of its own fold: cache-teacher --weights {out}")


def show_plan(console: Console, out: str, plan: CachePlan) -> None:
    """What stage one would do, before it does it."""
    console.table(
        f"plan for {out}",
        ("what", "how much"),
        [
            ("samples x views", f"{plan.samples:,} x {plan.views:,}"),
            ("blocks (missing)", f"{plan.blocks:,} ({plan.missing_blocks:,})"),
            ("normalisation", plan.normalisation),
            ("encoding", plan.encoding),
            (
                "on disk",
                f"{size(plan.total_bytes)}, {plan.bytes_per_view:.1f} bytes a sample and view",
            ),
            ("files", f"{plan.files:,}"),
            (
                "measured speed",
                f"{plan.samples_per_second:,.0f} samples/s on {plan.device}, written",
            ),
            (
                "estimated time",
                f"{duration(plan.hours * 3600)} ({plan.hours:.2f} hours)"
                + (f", if {plan.ranks} ranks are as fast each" if plan.ranks > 1 else ""),
            ),
            *_decoding(plan),
            ("free disk", "?" if plan.free_bytes is None else size(plan.free_bytes)),
        ],
    )
    show_encodings(console, plan)
    for warning in plan.warnings:
        console.say(f"\nWARNING: {warning}")


def _decoding(plan: CachePlan) -> list[tuple[str, str]]:
    """How many images are decoded, and what making several views of each saves."""
    if not plan.decodes:
        return []
    rows = [("decodes", f"{plan.decodes:,}, {plan.views_at_once} views at once")]
    if plan.views_at_once > 1:
        seconds = duration(plan.singly_hours * 3600)
        rows.append(("one view at once", f"{plan.singly_decodes:,} decodes, {seconds}"))
    return rows


def show_encodings(console: Console, plan: CachePlan) -> None:
    """What each encoding would cost in bytes and in truth, on rows of this teacher."""
    rows = []
    for measured in plan.encodings:
        fidelity = measured.fidelity
        kls = {t: fidelity.known_kl(t) for t in KL_TEMPERATURES}
        rows.append(
            (
                ("* " if measured.coding.name == plan.encoding else "  ")
                + encoding_text(measured.coding),
                f"{measured.row_bytes:.1f}",
                *("-" if kl is None else f"{kl:.1e}" for kl in kls.values()),
                *(f"{share:.1%}" for share in _agreements(fidelity)),
                f"{measured.decoded_per_second / 1e6:.2f} M",
            )
        )
    columns = [f"KL T={t:g}" for t in KL_TEMPERATURES]
    console.table(
        f"encodings, on {plan.encodings[0].fidelity.rows:,} rows (* is used)",
        ("encoding", "bytes a row", *columns, "same top-1", "same top-5", "rows decoded/s"),
        rows,
    )


def show_fidelity(console: Console, fidelity: Fidelity) -> None:
    """How far the decoded rows of a cache are from the teacher's."""
    rows = [
        (f"{t:g}", f"{mean:.1e}", f"{high:.1e}")
        for t, mean, high in zip(
            fidelity.temperatures, fidelity.mean_kl, fidelity.high_kl, strict=True
        )
    ]
    title = f"fidelity, {fidelity.rows:,} rows: top-1 agrees on {fidelity.top1_agreement:.2%}"
    if fidelity.top5_agreement is not None:
        title += f", all of the top 5 on {fidelity.top5_agreement:.2%}"
    if fidelity.saturated:
        title += f", {fidelity.saturated:,} saturated"
    console.table(title, ("T", "mean KL", "99.9 %"), rows)


def _agreements(fidelity: Fidelity) -> list[float]:
    top5 = fidelity.top5_agreement
    return [fidelity.top1_agreement, math.nan if top5 is None else top5]


def encoding_text(coding: Encoding) -> str:
    """An encoding by name and parameters."""
    parameters = ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in coding.shown.items()
    )
    return f"{coding.name} ({parameters})" if parameters else coding.name


def _test_logits(cache: LogitCache) -> str:
    if not cache.tested:
        return "no test split"
    return "yes" if cache.eval_commits.is_complete(0) else "not yet"


def _left_out(cache: LogitCache) -> str:
    counts = (f"{len(cache.skipped(split)):,} {split}" for split in ("train", "test"))
    return f"{' and '.join(counts)} samples"


def show_cached(console: Console, out: str, summary: CacheSummary) -> None:
    """What stage one has done, and how good the teacher is."""
    top1, rows = summary.train_top1, []
    if top1:
        shares = (sum(top1) / len(top1), min(top1), max(top1))
        rows.append(("training views", *(f"{x:.2%}" for x in shares)))
    else:
        rows.append(("training views", "no labels", "", ""))
    tested = summary.test_top1
    rows.append(("test split", "none" if tested is None else f"{tested:.2%}", "", ""))
    console.table(
        f"{out}: {counted(summary.views, 'view')}, "
        f"{counted(summary.computed_blocks, 'block')} computed now",
        ("teacher top-1 on", "mean", "lowest", "highest"),
        rows,
    )
    console.say(f"images were normalised with {summary.normalisation}")


def show_verified(console: Console, path: str, verified: Verified, faults: Sequence[Fault]) -> None:
    """What was looked at, and what is wrong."""
    if not faults:
        console.say(
            f"{path}: {counted(verified.blocks, 'block')}, {size(verified.bytes)}: no faults found"
        )
        return
    shown = [(fault.where, fault.what) for fault in faults[:MOST_FAULTS]]
    if len(faults) > MOST_FAULTS:
        shown.append(("...", f"and {len(faults) - MOST_FAULTS:,} more"))
    console.table(f"{path}: {counted(len(faults), 'fault')}", ("where", "what"), shown)


def _folds(folds: FoldsIdentity) -> str:
    """Whose rows a cache of several teachers has."""
    return (
        f"{folds.count}, stratified by label, seed {folds.seed}: every sample's rows are of the "
        "teacher that was trained without it, the test split's their mean"
    )
