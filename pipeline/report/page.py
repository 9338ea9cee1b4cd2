"""The whole page, and the file it is written to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from pipeline.console import counted, duration, percent
from pipeline.output import visible
from pipeline.report.cache import Options, cache_part, compare_unseen
from pipeline.report.figures import pattern
from pipeline.report.groups import Group, comparable, grouped, settings_text, unlike
from pipeline.report.sources import KnownCaches, Sources, find_sources
from pipeline.report.students import last_top1, mean_and_std, student_part, teacher_part
from pipeline.report.tables import Cell, Row, Table, Tile
from pipeline.runs import LeftOut, Run
from stages.cache import LogitCache
from stages.cache.storage import cache_around
from stages.errors import RunError, refusals
from stages.files import replace_file
from stages.reporting import Reporter, Silent
from stages.scores import BINS

TITLE = "Teacher logits and their students"
GENERATOR = "teacher-cache report"
"""Marks our pages: only they are replaced without --overwrite."""
MOST_BEST = 4
"""With more sets of comparable groups than this, none is named at the top."""


def write_report(
    paths: Sequence[str],
    out: str,
    overwrite: bool = False,
    dataset: str | None = None,
    root: str | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """One page about caches, runs and sweeps. Returns where it lies.

    dataset, root: where the images are, if not where the caches were made from. Raises RunError if
    there is nothing to report on or `out` cannot be written, and what opening a cache raises.
    """
    file = Path(out)
    _check_out(file, overwrite)
    reporter = reporter or Silent()
    sources = find_sources(tuple(paths))
    content = page(sources, Options(dataset, root), reporter)
    with refusals(RunError, f"cannot write {out}", "Choose another --out."):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, content.encode(errors="replace"))
    return file


def _check_out(file: Path, overwrite: bool) -> None:
    if file.is_dir():
        raise RunError(f"{file} is a folder", f"Name a file: --out {file / 'report.html'}.")
    if (cache := cache_around(file)) is not None:
        raise RunError(f"{file} lies inside the cache {cache}", "Choose another --out.")
    if not file.exists() or overwrite:
        return
    with refusals(RunError, f"cannot read {file}", "Choose another --out."), file.open("rb") as old:
        ours = GENERATOR.encode() in old.read(1024)
    if not ours:
        raise RunError(
            f"{file} holds something else than a report",
            "Choose another --out, or replace it with --overwrite.",
        )


# ---- the page -------------------------------------------------------------------------------


@dataclass
class Section:
    """What belongs to one dataset, in the order of appearance."""

    name: str
    caches: list[LogitCache] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def students(self) -> list[Run]:
        """The runs of train-student."""
        return [run for run in self.runs if run.kind != "teacher"]

    @property
    def teachers(self) -> list[Run]:
        """The runs of train-teacher."""
        return [run for run in self.runs if run.kind == "teacher"]


def page(sources: Sources, options: Options, reporter: Reporter) -> str:
    """The page as text: the same for the same sources."""
    known = KnownCaches(sources.caches)
    sections = _by_dataset(sources, known)
    shown: list[dict[str, Any]] = []
    contents: list[tuple[str, str]] = []
    for at, section in enumerate(sections):
        links: list[tuple[str, str]] = []
        caches = []
        for cache in section.caches:
            reporter.say(f"measuring {cache.path}")
            key = f"cache-{at}-{len(links)}"
            caches.append(cache_part(cache, key, options))
            links.append((key, f"cache {str(cache.path).rstrip('/').rpartition('/')[2]}"))
        compare_unseen(caches)
        students = None
        if section.students:
            students = student_part(grouped(section.students), known, f"students-{at}")
            links.append((f"students-{at}", "students"))
        teachers = teacher_part(section.teachers) if section.teachers else None
        key = f"dataset-{at}"
        part = {"key": key, "name": section.name, "caches": caches}
        shown.append(part | {"students": students, "teachers": teachers})
        contents += links if len(sections) == 1 else [(key, section.name), *links]
    return (
        _templates()
        .get_template("page.html")
        .render(
            title=TITLE,
            generator=GENERATOR,
            found=_found(sources, sections),
            tiles=_best_groups(grouped(sections[0].students)) if len(sections) == 1 else [],
            contents=contents,
            sections=shown,
            left_out=_left_out(sources.left_out),
            bins=BINS,
        )
    )


def _templates() -> jinja2.Environment:
    """Everything is escaped, but for what a template calls safe: the figures."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "counted": counted,
        "duration": duration,
        "pattern": pattern,
        "percent": percent,
    }
    return environment


def _readable(value: Any) -> Any:
    """Characters that a browser would obey, written out; HTML as it is."""
    plain = isinstance(value, str) and not hasattr(value, "__html__")
    return visible(value) if plain else value


def _by_dataset(sources: Sources, known: KnownCaches) -> list[Section]:
    """What belongs to each dataset. Two folders of one content are one dataset, if a cache says so;
    without a cache a dataset is known by its name in the settings.
    """
    for run in sources.runs:
        known.of(run.cache)
    by_spec = {facts.spec: facts.dataset for facts in known.all()}
    sections: dict[object, Section] = {}
    for cache in sources.caches:
        facts = known.of(str(cache.path))
        assert facts is not None
        sections.setdefault(facts.dataset, Section(facts.spec)).caches.append(cache)
    for run in sources.runs:
        facts = known.of(run.cache)
        dataset = by_spec.get(run.dataset) if facts is None else facts.dataset
        section = sections.setdefault(dataset or run.dataset, Section(run.dataset))
        section.runs.append(known.one_name(run))
    return list(sections.values())


def _found(sources: Sources, sections: Sequence[Section]) -> str:
    """How many of each there are, in words."""
    teachers = sum(run.kind == "teacher" for run in sources.runs)
    counts = [
        (len(sources.caches), "cache"),
        (len(sources.runs) - teachers, "student"),
        (teachers, "teacher"),
        (len(sections), "dataset"),
    ]
    return ", ".join(counted(count, what) for count, what in counts if count) + "."


def _best_groups(groups: Sequence[Group]) -> list[Tile]:
    """The best group of all, where they differ in loss and bias alone; else the best of each set
    that can be compared, if these are few.
    """
    if not groups:
        return []
    sets, keys = comparable(groups), unlike(groups)
    several = [members for members in sets if len(members) > 1]
    shown = sets if len(sets) == 1 else several if len(several) <= MOST_BEST else []
    tiles: list[Tile] = []
    for members in shown:
        best = max(members, key=lambda group: group.spread(last_top1).mean)
        found = best.spread(last_top1)
        text = f"{best.label}, the best group at its last epoch (n={found.n})"
        if len(sets) > 1:
            text = f"{best.label}, the best of {len(members)} groups with "
            text += f"{settings_text(best.settings, keys)} at their last epoch (n={found.n})"
        tiles.append(Tile(text, "best_group", found.mean, mean_and_std(found)))
    return tiles


def _left_out(left_out: Sequence[LeftOut]) -> Table | None:
    if not left_out:
        return None
    rows = [Row([Cell(item.name), item.status, item.why], run=item.name) for item in left_out]
    caption = "Failed, unfinished or unreadable: in no mean and no curve"
    return Table(caption, ("name", "what", "why"), rows, words=3)
