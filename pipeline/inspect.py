"""What a cache is, on one page."""

from pipeline.console import Console, size
from stages.cache import LogitCache


def show_cache(path: str, console: Console) -> None:
    """Print identity, provenance, completeness, size and rectifications of a cache."""
    cache = LogitCache.open(path)
    identity, complete = cache.identity, cache.complete_views
    sizes = [cache.commits.bytes_of_view(view) for view in complete]
    per_view = sum(sizes) / len(sizes) if sizes else 0.0
    parameters = ", ".join(f"{k}={v}" for k, v in identity.views.parameters.items())
    versions = ", ".join(f"{k} {v}" for k, v in cache.provenance.get("versions", {}).items())
    dataset = identity.dataset
    console.table(
        str(path),
        ("what", "value"),
        [
            ("teacher", f"{identity.teacher.architecture}, weights {identity.teacher.weights}"),
            ("normalisation", f"mean {identity.teacher.mean}, std {identity.teacher.std}"),
            ("input size", identity.teacher.image_size or "the images' own"),
            ("computed in", identity.compute_dtype),
            (
                "dataset",
                f"{dataset.name}, {dataset.num_samples:,} x {cache.num_classes} classes",
            ),
            ("views", f"{identity.views.policy} ({parameters}), seed {identity.views.seed}"),
            ("identity", cache.identity.digest()),
            ("encoding", cache.encoding.name),
            ("complete", f"{len(complete)} of {cache.num_views} views"),
            (
                "on disk",
                f"{size(sum(sizes))}, {per_view / cache.num_samples:.1f} bytes a sample and view",
            ),
            ("test logits", "yes" if cache.eval_commits.is_complete(0) else "not yet"),
            (
                "made from",
                f"{cache.provenance.get('weights')}, on {cache.provenance.get('device')}",
            ),
            ("made with", versions),
        ],
    )
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
