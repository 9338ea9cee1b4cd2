"""The whole page, and the file it is written to."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from pipeline.console import counted
from pipeline.report.cache_part import Options, Tile, cache_part, key_numbers
from pipeline.report.groups import Group, comparable, grouped, told, unlike
from pipeline.report.html import Cell, Html, Row, fragment, table, tag
from pipeline.report.runs import LeftOut, Run
from pipeline.report.sources import KnownCaches, Sources, find_sources
from pipeline.report.student_part import (
    last_top1,
    mean_and_std,
    student_part,
    teacher_part,
)
from stages.cache import LogitCache
from stages.cache.storage import cache_around
from stages.errors import RunError
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
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, content.encode(errors="replace"))
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}", "Choose another --out.") from error
    return file


def _check_out(file: Path, overwrite: bool) -> None:
    if file.is_dir():
        raise RunError(f"{file} is a folder", f"Name a file: --out {file / 'report.html'}.")
    if (cache := cache_around(file)) is not None:
        raise RunError(f"{file} lies inside the cache {cache}", "Choose another --out.")
    if not file.exists() or overwrite:
        return
    try:
        with file.open("rb") as opened:
            ours = GENERATOR.encode() in opened.read(1024)
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}", "Choose another --out.") from error
    if not ours:
        raise RunError(
            f"{file} holds something else than a report",
            "Choose another --out, or replace it with --overwrite.",
        )


# ---- the page -------------------------------------------------------------------------------


def page(sources: Sources, options: Options, reporter: Reporter) -> str:
    """The page as text: the same for the same sources."""
    known = KnownCaches(sources.caches)
    sections = _by_dataset(sources, known)
    body: list[Html] = []
    contents: list[tuple[str, str]] = []
    for at, (name, caches, runs) in enumerate(sections):
        parts: list[Html] = []
        links: list[tuple[str, str]] = []
        for cache in caches:
            reporter.say(f"measuring {cache.path}")
            key = f"cache-{at}-{len(links)}"
            parts.append(cache_part(cache, key, options))
            links.append((key, f"cache {str(cache.path).rstrip('/').rpartition('/')[2]}"))
        students = [run for run in runs if run.kind != "teacher"]
        teachers = [run for run in runs if run.kind == "teacher"]
        if students:
            parts.append(student_part(grouped(students), known, f"students-{at}"))
            links.append((f"students-{at}", "students"))
        if teachers:
            parts.append(tag("section", tag("h3", "Teachers"), teacher_part(teachers)))
        heading = tag("h2", "Dataset ", tag("code", name), id=f"dataset-{at}")
        body.append(tag("section", heading, parts, class_="dataset"))
        contents += links if len(sections) == 1 else [(f"dataset-{at}", name), *links]
    several = (
        f"The page has {len(sections)} datasets. Each has a section of its own: students of "
        "different datasets are neither averaged nor compared."
    )
    main = fragment(
        tag("p", several, class_="note") if len(sections) > 1 else None,
        body,
        _left_out(sources.left_out),
        _how(),
    )
    return _document(_header(sources, sections, contents), main)


Section = tuple[str, list[LogitCache], list[Run]]


def _by_dataset(sources: Sources, known: KnownCaches) -> list[Section]:
    """What belongs to each dataset, in the order of appearance. Two folders of one content are one
    dataset, if a cache says so; without a cache a dataset is known by its name in the settings.
    """
    for run in sources.runs:
        known.of(run.cache)
    by_spec = {facts.spec: facts.dataset for facts in known.all()}
    sections: dict[object, Section] = {}
    for cache in sources.caches:
        facts = known.of(str(cache.path))
        assert facts is not None
        sections.setdefault(facts.dataset, (facts.spec, [], []))[1].append(cache)
    for run in sources.runs:
        facts = known.of(run.cache)
        dataset = by_spec.get(run.dataset) if facts is None else facts.dataset
        section = sections.setdefault(dataset or run.dataset, (run.dataset, [], []))
        section[2].append(known.one_name(run))
    return list(sections.values())


def _header(sources: Sources, sections: list[Section], contents: list[tuple[str, str]]) -> Html:
    students = [run for run in sources.runs if run.kind != "teacher"]
    counts = [
        (len(sources.caches), "cache"),
        (len(students), "student"),
        (len(sources.runs) - len(students), "teacher"),
        (len(sections), "dataset"),
    ]
    found = ", ".join(counted(count, what) for count, what in counts if count) + "."
    of_one = [run for run in sections[0][2] if run.kind != "teacher"] if len(sections) == 1 else []
    tiles = _best_groups(grouped(of_one)) if of_one else []
    links = [tag("li", tag("a", text, href=f"#{key}")) for key, text in contents]
    return tag(
        "header",
        tag("p", "teacher-cache", class_="eyebrow"),
        tag("h1", TITLE),
        tag("p", found, class_="lead"),
        key_numbers(tiles) if tiles else None,
        tag("nav", tag("ul", links), aria_label="Contents") if len(links) > 1 else None,
    )


def _best_groups(groups: Sequence[Group]) -> list[Tile]:
    """The best group of all, where they differ in loss and bias alone; else the best of each set
    that can be compared, if these are few.
    """
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
            text += f"{told(best.settings, keys)} at their last epoch (n={found.n})"
        tiles.append((text, "best_group", found.mean, mean_and_std(found), ""))
    return tiles


def _left_out(left_out: Sequence[LeftOut]) -> Html | None:
    if not left_out:
        return None
    rows = [Row([Cell(item.name), item.status, item.why], run=item.name) for item in left_out]
    columns = ("name", "what", "why")
    return tag(
        "section",
        tag("h2", "Not counted", id="left-out"),
        table("Failed, unfinished or unreadable: in no mean and no curve", columns, rows, 3),
    )


def _how() -> Html:
    """What the numbers are, for whoever was sent the page."""
    items = [
        f"ECE: expected calibration error over {BINS} equally wide bins of confidence (Guo et al. "
        "2017); confidence is the largest probability at T = 1.",
        "Right and wrong: whether the teacher's argmax on that view, taken before any encoding, is "
        "the label.",
        "± is the sample standard deviation (n - 1) over runs that differ in their seeds alone; a "
        "single run has none.",
        "Groups are compared with one another only where they differ in loss and bias alone: the "
        "same images, views, teachers, model, epochs and optimisation.",
        "A teacher pass is the teacher once over the training set.",
    ]
    return tag(
        "footer", tag("h2", "How to read the numbers"), tag("ul", [tag("li", i) for i in items])
    )


def _document(header: Html, main: Html) -> str:
    folder = files("pipeline.report")
    style, script = (Html(folder.joinpath(name).read_text()) for name in ("page.css", "page.js"))
    head = fragment(
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", TITLE),
        tag("style", style),
    )
    body = tag("body", header, tag("main", main), tag("script", script))
    return "<!DOCTYPE html>\n" + tag("html", tag("head", head), body, lang="en") + "\n"
