"""`pipeline cache-teacher`: what would be made, shown and checked; then made."""

from dataclasses import replace

from msgspec import structs

from pipeline.arguments import CachePlace
from pipeline.check_data import amount_of
from pipeline.console import Console
from pipeline.tables import show_cached, show_plan
from stages.cache.storage import check_place
from stages.cache_teacher import cache_teacher, prepare
from stages.check_data import check_sample
from stages.distributed import first_rank_does, first_rank_first, launched_ranks, process_group
from stages.settings import CacheConfig
from stages.teacher.job import CacheJob, begun_at
from stages.teacher.plan import plan_cache


def run_stage_one(console: Console, config: CacheConfig, place: CachePlace) -> None:
    """Make a cache, complete or extend it; of a dry run show the plan. Raises PipelineError."""
    ranks = launched_ranks()
    with process_group(ranks):
        check_place(place.out)  # also of a dry run
        with first_rank_first(ranks):
            job = prepare(config, None, ranks, begun_at(place.out))
        job.splits.tell(console)
        for note in job.notes:
            console.say(note)
        if place.check != "none":
            amount = amount_of(place.check)
            first_rank_does(ranks, lambda: check_sample(job.splits, amount, config.data.workers))
        encoding = first_rank_does(ranks, lambda: _planned(console, job, place.out))
        if place.dry_run:
            return
        # What was shown is what is made: `auto` has been decided.
        job = replace(job, notes_shown=True)
        if job.config.encoding == "auto":
            job = replace(job, config=structs.replace(job.config, encoding=encoding))
        summary = cache_teacher(job, place.out, console)
    show_cached(console, place.out, summary)


def _planned(console: Console, job: CacheJob, out: str) -> str:
    """Show the plan of a cache; its encoding. Raises CacheError if the disk is too small."""
    plan = plan_cache(job, out)
    show_plan(console, out, plan)
    plan.check_fits(out)
    return plan.encoding
