"""How many teacher passes the cache cost, and how many its students would have cost online."""

from collections.abc import Mapping, Sequence

from pipeline.console import counted, duration
from pipeline.report.groups import Group
from pipeline.report.html import Html, fragment, number, percent, tag
from pipeline.report.runs import Run
from pipeline.report.sources import KnownCaches


def saved_passes(groups: Sequence[Group], known: KnownCaches) -> Html:
    """One pass is the teacher once over the training set: online an epoch needs one for each view
    that it shows, the cache needed one for each view that it holds, whatever is learned from it.
    """
    runs = [run for group in groups for run in group.runs]
    by_cache: dict[str, list[Run]] = {}
    for run in runs:
        for cache in run.caches if run.uses_teacher else ():
            by_cache.setdefault(cache, []).append(run)
    sentences = [_one_cache(cache, of_cache, known) for cache, of_cache in by_cache.items()]
    if len(by_cache) > 1 and all(known.of(cache) for cache in by_cache):
        sentences.append(_together(by_cache, known))
    seconds = sum(run.summary.train_seconds for run in runs)
    waited = sum(run.summary.train_seconds * run.summary.wait_share for run in runs)
    took = (
        f"Training took {duration(seconds)} in all ({counted(len(runs), 'run')}); "
        f"{percent(waited / max(seconds, 1e-9))} of that went into waiting for targets."
    )
    without = [run for run in runs if run.kind == "student" and not run.uses_teacher]
    if without:
        took += f" {len(without)} of them learned from hard labels alone and need no teacher."
    return fragment(tag("h4", "What it cost"), [tag("p", s) for s in sentences], tag("p", took))


def _together(by_cache: Mapping[str, Sequence[Run]], known: KnownCaches) -> Html:
    """All students and all their caches."""
    online = sum(run.teacher_passes for runs in by_cache.values() for run in runs)
    took = sum(facts.views for cache in by_cache if (facts := known.of(cache)) is not None)
    return fragment(
        "Together: ",
        number(online, f"{online:,}", data_field="all_passes_online"),
        " passes online, ",
        number(took, f"{took:,}", data_field="all_passes_cached"),
        f" for {len(by_cache)} caches.",
    )


def _one_cache(cache: str, runs: Sequence[Run], known: KnownCaches) -> Html:
    online = sum(run.teacher_passes for run in runs)
    facts = known.of(cache)
    students = counted(len(runs), "student")
    epochs = number(online, f"{online:,} teacher passes", data_field="passes_online")
    first = fragment(
        tag("code", cache.rstrip("/").rpartition("/")[2]),
        f": learning online, the {students} on this page would have needed ",
        epochs,
        " over the training set, one for every view that an epoch shows; ",
    )
    if facts is None:
        return fragment(first, "how many the cache took is not known: it does not lie here now.")
    took = number(facts.views, f"{facts.views:,}, once", data_field="passes_cached")
    saved, a_run = online - facts.views, online / len(runs)
    if saved > 0:
        then = f"That is {saved:,} passes saved, {online / facts.views:.1f} times fewer;"
    elif saved == 0:
        then = "The two are even;"
    else:
        more = -(-facts.views * len(runs) // online) - len(runs)
        further = counted(more, "further student")
        then = f"That is {-saved:,} more than online; {further} like these will make up for it;"
    return fragment(
        first,
        "the cache took ",
        took,
        f". {then} every further student costs no pass instead of {a_run:g}.",
    )
