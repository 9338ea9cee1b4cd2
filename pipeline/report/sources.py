"""What lies at the paths that a report is asked for: caches, runs, sweeps, or folders of those."""

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.runs import LeftOut, Run, read_run, read_sweep
from stages.cache import LogitCache
from stages.cache.identity import DatasetIdentity
from stages.cache.storage import is_cache, location
from stages.errors import PipelineError, RunError
from stages.targets.ensemble import teacher_top1

DEPTH = 4
"""How far below a given folder is looked."""


@dataclass
class Sources:
    """Everything that was found, in the order of the paths."""

    caches: list[LogitCache] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def find_sources(paths: tuple[str, ...]) -> Sources:
    """Look into the paths. Raises RunError for a path that holds nothing to report on, and
    CacheError for a cache that was named and cannot be opened.
    """
    sources, seen = Sources(), set[Path]()
    for path in paths:
        where = location(path)
        if isinstance(where, str):
            sources.caches.append(LogitCache.open(where))
            continue
        before = len(sources.caches) + len(sources.runs) + len(sources.left_out)
        if is_cache(where):
            if where.resolve() not in seen:
                seen.add(where.resolve())
                sources.caches.append(LogitCache.open(where))
            continue
        if not where.exists():
            raise RunError(
                f"nothing lies at {path}", "Give a cache, a run, a sweep, or a folder of those."
            )
        known = len(seen)
        _look(where, where.name or str(where.resolve().name), DEPTH, sources, seen)
        found = len(sources.caches) + len(sources.runs) + len(sources.left_out) - before
        if not found and len(seen) == known and where.resolve() not in seen:
            raise RunError(
                f"{path} holds neither a cache nor a run nor a sweep",
                "Give what cache-teacher, train-student or sweep wrote with --out, or a folder of "
                "those.",
            )
    if not (sources.caches or sources.runs):
        why = "no run is finished"
        if sources.left_out:
            why = f"{sources.left_out[0].name}: {sources.left_out[0].why}"
        raise RunError(
            f"there is nothing to report on yet: {why}",
            "Finish a run (--resume), or give a cache.",
        )
    return sources


def _look(path: Path, name: str, depth: int, sources: Sources, seen: set[Path]) -> None:
    """Add what lies at a path, and below it where it is only a folder."""
    if not _is_folder(path) or path.resolve() in seen:
        return
    if path.is_symlink() and path.resolve() in path.absolute().parents:
        return  # a circle
    if is_cache(path):
        seen.add(path.resolve())
        try:
            sources.caches.append(LogitCache.open(path))
        except PipelineError as error:
            sources.left_out.append(LeftOut(name, "unreadable", error.cause))
    elif (path / "results.jsonl").is_file() and not (path / "config.yaml").is_file():
        seen.add(path.resolve())
        found = list(read_sweep(path, name))
        for run in found:
            _add(run, sources)
        names = {run.name for run in found}
        for child in _folders(path):  # runs that the sweep has not come to the end of
            if f"{name}/{child.name}" not in names:
                _look(child, f"{name}/{child.name}", depth - 1, sources, seen)
            else:
                seen.add(child.resolve())
    elif (path / "config.yaml").is_file() and not (path / "zarr.json").exists():
        seen.add(path.resolve())
        _add(read_run(path, name), sources)
    elif depth > 0:
        try:
            children = _folders(path)
        except OSError as error:
            sources.left_out.append(LeftOut(name, "unreadable", str(error.strerror)))
            return
        for child in children:
            _look(child, f"{name}/{child.name}", depth - 1, sources, seen)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # it lies in a folder that may not be looked into
        return False


def _add(found: Run | LeftOut, sources: Sources) -> None:
    if isinstance(found, Run):
        sources.runs.append(found)
    else:
        sources.left_out.append(found)


def _folders(path: Path) -> list[Path]:
    entries = sorted(path.iterdir())
    return [entry for entry in entries if _is_folder(entry) and not entry.name.startswith(".")]


@dataclass(frozen=True)
class CacheFacts:
    """What students need to know of their cache. teacher_top1: on the test split, in [0, 1].
    content: equal for copies of one cache, wherever they lie.
    """

    dataset: DatasetIdentity
    spec: str
    views: int
    teacher_top1: float | None
    content: str


def cache_facts(cache: LogitCache) -> CacheFacts:
    """The facts of an open cache."""
    top1 = teacher_top1([cache]) if cache.eval_commits.is_complete(0) else None
    spec = cache.provenance.get("config", {}).get("data", {}).get("dataset")
    identity, views, coding = cache.identity.dataset, len(cache.complete_views), cache.encoding
    content = f"{cache.identity.digest()} {coding.name} {dict(coding.parameters)} {views}"
    return CacheFacts(identity, str(spec or identity.name), views, top1, content)


class KnownCaches:
    """The caches of a page and those that its runs name, as far as they lie on a disk here."""

    def __init__(self, caches: list[LogitCache]) -> None:
        self._facts: dict[str, CacheFacts | None] = {}
        self._names: dict[str, str] = {}
        for cache in caches:
            self._facts[self._key(str(cache.path))] = cache_facts(cache)

    def of(self, path: str | None) -> CacheFacts | None:
        """The facts of the cache at a path; None if it cannot be opened, or lies behind a URL that
        was not given: an object store may take long to answer.
        """
        if path is None:
            return None
        key = self._key(path)
        if key not in self._facts:
            self._facts[key] = None
            if "://" not in path and is_cache(Path(path)):
                with contextlib.suppress(PipelineError):
                    self._facts[key] = cache_facts(LogitCache.open(path))
        return self._facts[key]

    def one_name(self, run: Run) -> Run:
        """The run with one path for each of its caches, however it is spelled and copied."""
        named = {key: run.config[key] for key in ("cache", "also") if run.config.get(key)}
        config = {
            key: self._first(value) if isinstance(value, str) else [*map(self._first, value)]
            for key, value in named.items()
        }
        return replace(run, config={**run.config, **config})

    def _first(self, path: str) -> str:
        facts = self.of(path)
        if facts is None:
            return path
        return self._names.setdefault(facts.content, path)

    def all(self) -> list[CacheFacts]:
        """The facts of every cache that could be opened."""
        return [facts for facts in self._facts.values() if facts is not None]

    @staticmethod
    def _key(path: str) -> str:
        return path.rstrip("/") if "://" in path else str(Path(path).resolve())
