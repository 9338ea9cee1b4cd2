"""The `pipeline` command. Heavy imports stand inside the commands: --help answers at once."""

import sys
from typing import Any

import click

from pipeline.choices import (
    BIAS,
    DATASET,
    DEVICE,
    ENCODINGS,
    FILE,
    FOLDER,
    LOSSES,
    METHODS,
    MODEL,
    SPACES,
    WEIGHTS,
    Names,
    shown,
)
from pipeline.ending import check_folder, run
from pipeline.home import expanded
from pipeline.import_path import current_folder_last
from pipeline.options import (
    augment_option,
    compute_options,
    config_options,
    data_flags,
    data_options,
    normalise_options,
    options,
    run_options,
    train_flags,
    train_options,
    trust_option,
)
from pipeline.ranks import check_ranks, run_rank, several_ranks, tell
from stages.errors import PipelineError


def main() -> None:
    """Run a command, and exit with the code that `pipeline.ending` describes."""
    try:
        check_folder()
    except PipelineError as error:
        tell(error)
        sys.exit(error.exit_code)
    current_folder_last()
    if several_ranks():
        run_rank(cli)
    sys.exit(run(cli))


class _Commands(click.Group):
    """Commands whose arguments may begin with `~`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [expanded(text) for text in args])


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="teacher-cache")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run a teacher once, correct what it has wrong, train many students from its cached logits.

    Start with `pipeline demo`.
    """
    from stages.user_code import trusting

    check_ranks(context.invoked_subcommand)
    context.with_resource(trusting())  # what this command names, and no longer than it runs


# ---- commands -------------------------------------------------------------------------------


@cli.command("train-teacher")
@options(
    click.option(
        "--model",
        type=MODEL,
        help="A CIFAR-family name, a torchvision name, timm:NAME or module:callable.",
    ),
    click.option(
        "--init", type=WEIGHTS, help="Weights to start from: a run, FILE, FILE#KEY or 'pretrained'."
    ),
    augment_option,
)
@data_options
@train_options
@normalise_options
@compute_options
@config_options
@run_options
def train_teacher_command(**given: Any) -> None:
    """Train a model on hard labels: a teacher or a baseline."""
    from pipeline.config import read_config
    from pipeline.console import Console
    from pipeline.tables import show_run
    from stages.settings import TeacherConfig
    from stages.train_teacher import train_teacher

    flags = train_flags(given) | {
        "model.architecture": given["model"],
        "model.init": given["init"],
        "augment": given["augment"],
    }
    config = read_config(TeacherConfig, given["file"], flags, given["overrides"])
    console = Console()
    summary = train_teacher(
        config, given["out"], given["resume"], given["overwrite"], reporter=console
    )
    show_run(console, given["out"], summary)


@cli.command("cache-teacher")
@trust_option
@options(
    click.option(
        "--teacher",
        type=MODEL,
        help="The model's name; may be left out where --weights is a run directory.",
    ),
    click.option(
        "--weights",
        type=WEIGHTS,
        help="A run directory, .safetensors, a checkpoint (FILE#KEY for one of several sets of "
        "weights), or 'pretrained'.",
    ),
    click.option(
        "--outputs",
        type=click.Choice(["logits", "probabilities"]),
        help="What the teacher returns; of probabilities the log is taken.",
    ),
    click.option(
        "--class-order",
        metavar="ORDER",
        help="Where the teacher's classes are in another order: 'teacher' follows the names that "
        "its run keeps, FILE has the names of its outputs, one a line, and 'dataset' ignores them.",
    ),
    click.option("--views", type=int, help="How many augmented views of every sample to cache."),
    augment_option,
    click.option("--seed", type=int, help="Of the views."),
    click.option(
        "--encoding",
        type=Names(ENCODINGS),
        help="float32, float16, uint8, klt, topk:k=10, or auto (the default).",
    ),
    click.option("--max-kl", type=float, help="Mean KL that the encoding must hold, at T=1."),
    click.option("--batch-size", type=int),
    click.option("--out", type=FOLDER, required=True, help="The cache, for example cache.zarr."),
    click.option("--dry-run", is_flag=True, help="Only say how large and how long it would be."),
    click.option(
        "--check",
        default="512",
        show_default=True,
        help="Images of each split to decode before the pass: a number, all or none.",
    ),
)
@data_options
@normalise_options
@compute_options
@config_options
def cache_teacher_command(**given: Any) -> None:
    """Stage one: run the teacher once, store its logits for every view of every sample.

    Run it again to complete an interrupted cache, or with more --views to extend one.
    """
    from dataclasses import replace

    from msgspec import structs

    from pipeline.check_data import amount_of
    from pipeline.config import read_config
    from pipeline.console import Console
    from pipeline.tables import show_cached, show_plan
    from stages.cache.storage import check_place
    from stages.cache_job import begun_at
    from stages.cache_plan import plan_cache
    from stages.cache_teacher import cache_teacher, prepare
    from stages.check_data import check_sample
    from stages.distributed import (
        first_rank_before_others,
        first_rank_does,
        launched_ranks,
        process_group,
    )
    from stages.settings import CacheConfig

    names = (
        *("views", "augment", "seed", "encoding", "max_kl"),
        *("batch_size", "dtype", "device"),
    )
    flags = data_flags(given) | {name: given[name] for name in names}
    teacher = ("weights", "mean", "std", "outputs", "class_order")
    flags |= {f"teacher.{key}": given[key] for key in teacher}
    flags["teacher.architecture"] = given["teacher"]
    console, ranks = Console(), launched_ranks()

    def planned() -> str:
        plan = plan_cache(job, given["out"])
        show_plan(console, given["out"], plan)
        plan.check_fits(given["out"])
        return plan.encoding

    with process_group(ranks):
        config = read_config(CacheConfig, given["file"], flags, given["overrides"])
        check_place(given["out"])  # also of a dry run
        job = first_rank_before_others(
            ranks, lambda: prepare(config, None, ranks, begun_at(given["out"]))
        )
        job.splits.tell(console)
        for note in job.notes:
            console.say(note)
        if given["check"] != "none":
            amount = amount_of(given["check"])
            first_rank_does(ranks, lambda: check_sample(job.splits, amount, config.data.workers))
        encoding = first_rank_does(ranks, planned)
        if given["dry_run"]:
            return
        # What was shown is what is made: `auto` has been decided.
        job = replace(job, told=True)
        if job.config.encoding == "auto":
            job = replace(job, config=structs.replace(job.config, encoding=encoding))
        summary = cache_teacher(job, given["out"], console)
    show_cached(console, given["out"], summary)


@cli.command("check-data")
@click.argument("dataset", type=DATASET)
@options(
    click.option("--root", type=FOLDER, help="Where torchvision's datasets lie."),
    click.option(
        "--workers", type=click.IntRange(0, 1024), help="Threads; one a core if left out."
    ),
    click.option(
        "--check", default="all", show_default=True, help="How many images of each split, or all."
    ),
    click.option(
        "--skip-out", type=FILE, metavar="FILE", help="Write what is broken there, for --skip."
    ),
)
def check_data_command(dataset: str, **given: Any) -> None:
    """Decode every image: list what is broken, odd, twice there or not taken.

    DATASET is what --dataset takes. Exit code 1 if any image is broken.
    """
    from pipeline.check_data import run_check_data
    from pipeline.console import Console

    if not run_check_data(Console(), dataset, given):
        sys.exit(1)


@cli.command("rectify")
@click.argument("cache", type=FOLDER)
@options(
    click.option(
        "--method", type=Names(METHODS), metavar=shown(METHODS), help="pairwise if left out."
    ),
    click.option("--temperature", type=float, help="Of the loss that will use it; 4 if left out."),
    click.option(
        "--space", type=Names(SPACES), metavar=shown(SPACES), help="probability-T if left out."
    ),
    click.option("--name", help="<method>-T<temperature> if left out."),
    click.option("--views", type=int, help="Only the first so many views."),
    click.option("--scheduler", help="Address of a Dask cluster; threads here if left out."),
    click.option(
        "--materialise", is_flag=True, default=None, help="Also store whole rectified rows."
    ),
)
@config_options
def rectify_command(cache: str, **given: Any) -> None:
    """Stage two: mark which rows the teacher has wrong, and store what they should say."""
    from pipeline.config import read_config
    from pipeline.console import Console
    from pipeline.tables import show_rectification
    from stages.rectify import rectify
    from stages.settings import RectifyConfig

    names = ("method", "temperature", "space", "name", "views", "scheduler", "materialise")
    flags = {name: given[name] for name in names}
    config = read_config(RectifyConfig, given["file"], flags, given["overrides"])
    console = Console()
    statistics = rectify(cache, config, console)
    show_rectification(console, config.chosen_name, statistics)


@cli.command("train-student")
@trust_option
@click.argument("cache", type=FOLDER)
@options(
    click.option(
        "--student",
        type=MODEL,
        help="A CIFAR-family name, a torchvision name, timm:NAME or module:callable.",
    ),
    click.option(
        "--init", type=WEIGHTS, help="Weights to start from: a run, FILE, FILE#KEY or 'pretrained'."
    ),
    click.option(
        "--loss",
        type=Names(LOSSES),
        metavar="NAME",
        help=f"{', '.join(LOSSES)}. kd if left out; ce: the cache's views without its targets; "
        "module:callable: a loss of your own.",
    ),
    click.option("--temperature", type=float, help="Of the loss; its own default if left out."),
    click.option("--bias", type=Names(BIAS), metavar=shown(BIAS), help="none if left out."),
    click.option("--rectified", help="Which rectification; may be left out where there is one."),
    click.option("--views", type=int, help="Only the first so many views."),
    click.option(
        "--also",
        type=FOLDER,
        multiple=True,
        metavar="CACHE",
        help="Another teacher's cache of the same views, to be averaged; may be repeated.",
    ),
    click.option(
        "--slab-memory",
        metavar="SIZE",
        help="Memory for targets, 2GB for example; where views are larger they are read in groups.",
    ),
    click.option(
        "--accept-pixel-drift", is_flag=True, default=None, help="Go on where pixel probes differ."
    ),
)
@data_options
@train_options
@normalise_options
@compute_options
@config_options
@run_options
def train_student_command(cache: str, **given: Any) -> None:
    """Stage three: train a student from the cache. The teacher is never loaded."""
    from pipeline.config import read_config
    from pipeline.console import Console
    from pipeline.tables import show_run
    from stages.settings import StudentConfig
    from stages.train_student import train_student
    from stages.training.objective import unused_settings

    flags = train_flags(given) | {
        "cache": cache,
        "also": given["also"] or None,
        "slab_memory": given["slab_memory"],
        "model.architecture": given["student"],
        "model.init": given["init"],
        "loss.name": given["loss"],
        "loss.temperature": given["temperature"],
        "bias.mode": given["bias"],
        "bias.rectified": given["rectified"],
        "views": given["views"],
        "accept_pixel_drift": given["accept_pixel_drift"],
    }
    config = read_config(StudentConfig, given["file"], flags, given["overrides"])
    console = Console()
    if ignored := unused_settings(config.loss):
        console.say(f"the loss ce uses no teacher: {', '.join(ignored)} changes nothing")
    summary = train_student(
        config, given["out"], given["resume"], given["overwrite"], reporter=console
    )
    show_run(console, given["out"], summary)


@cli.command("evaluate")
@trust_option
@click.argument("run", type=FOLDER)
@options(
    click.option("--dataset", type=DATASET, help="The run's own if left out."),
    click.option(
        "--root", type=FOLDER, help="Where torchvision's datasets lie, if they have moved."
    ),
    click.option("--download", is_flag=True, help="Let torchvision download what is missing."),
    click.option(
        "--skip",
        type=FILE,
        metavar="FILE",
        help="Test images to leave out; else the run's own list.",
    ),
    click.option("--batch-size", type=click.IntRange(1, 2**20)),
    click.option(
        "--cache",
        "caches",
        type=FOLDER,
        multiple=True,
        metavar="CACHE",
        help="Compare with its teacher; a student's own cache if left out. May be repeated: the "
        "teachers are averaged.",
    ),
    click.option(
        "--device", type=DEVICE, help="cpu, cuda, cuda:N; a GPU where there is one if left out."
    ),
    click.option("--out", type=FILE, metavar="FILE.json", help="Write everything there as well."),
)
def evaluate_command(run: str, **given: Any) -> None:
    """Measure a run on the test split, and compare a student with its teacher."""
    from pipeline.console import Console
    from pipeline.evaluation import check_json, show_evaluation, write_json
    from stages.evaluate import evaluate_run

    if given["out"]:
        check_json(given["out"])
    console = Console()
    names = ("dataset", "root", "download", "skip", "batch_size", "caches")
    settings = {name: given[name] for name in names} | {"device": given["device"] or "auto"}
    evaluated = evaluate_run(run, **settings, reporter=console)
    show_evaluation(console, evaluated)
    if given["out"]:
        write_json(given["out"], evaluated)


@cli.command("sweep")
@trust_option
@click.argument("file", type=FILE, metavar="SWEEP.yaml")
@options(
    click.option(
        "--out",
        type=FOLDER,
        help="The sweep's folder; else the file's `out`, else runs/<its name>.",
    ),
    click.option("--dry-run", is_flag=True, help="Only check, and show what would be done."),
    click.option(
        "--workers",
        type=click.IntRange(1, 1024),
        help="Processes; on each GPU where there are several.",
    ),
    click.option("--scheduler", help="Address of a Dask cluster; processes here if left out."),
)
def sweep_command(file: str, **given: Any) -> None:
    """Train many students: grids of settings, several seeds, one table.

    Run it again to go on with an interrupted sweep, or after adding runs and seeds.
    """
    from pipeline.console import Console
    from pipeline.sweep.run import run_sweep

    run_sweep(file, Console(), **given)


@cli.command("inspect")
@click.argument("cache", type=FOLDER)
def inspect_command(cache: str) -> None:
    """Show what a cache is: where it came from, how complete and how large it is."""
    from pipeline.console import Console
    from pipeline.tables import show_cache

    show_cache(cache, Console())


@cli.command("verify")
@trust_option
@click.argument("cache", type=FOLDER)
@options(
    click.option(
        "--live",
        type=click.IntRange(1, 10**9),
        help="Run the teacher on so many random rows as well.",
    ),
    click.option("--pixels", is_flag=True, help="Compare with the dataset's pixels as well."),
    click.option("--repair", is_flag=True, help="Compute again what is damaged."),
    click.option("--dataset", type=DATASET, help="As it was cached from, if it has moved."),
    click.option("--root", type=FOLDER, help="Where the dataset lies, if it has moved."),
    click.option("--weights", type=WEIGHTS, help="The teacher's, if they have moved."),
    click.option("--device", type=DEVICE, help="auto, cpu, cuda, cuda:1, ..."),
)
def verify_command(cache: str, **given: Any) -> None:
    """Check every byte of a cache against what its stages promised.

    Exit code 0 only if all holds, 1 with a list of what does not.
    """
    from pipeline.console import Console
    from pipeline.tables import show_verified
    from stages.cache import LogitCache
    from stages.errors import ChangedImagesError
    from stages.repair import recorded_job, repair
    from stages.verify import Fault, verify, verify_live, verify_pixels

    console = Console()
    verified = verify(cache, console)
    faults = verified.faults
    if given["live"] or given["pixels"] or (given["repair"] and faults):
        moved = {name: given[name] for name in ("dataset", "root", "weights", "device")}
        try:
            job = recorded_job(cache, **moved)
        except ChangedImagesError as error:
            if given["repair"] and faults:
                raise
            faults = [*faults, Fault("images", error.cause)]
            show_verified(console, cache, verified, faults)
            sys.exit(1)
        if given["repair"] and faults:
            show_verified(console, cache, verified, faults)
            verified = repair(cache, job, faults, console)
            faults = verified.faults
        if not faults and given["live"]:
            faults = verify_live(LogitCache.open(cache), job, given["live"])
        if not faults and given["pixels"]:
            faults = verify_pixels(LogitCache.open(cache), job.splits)
    show_verified(console, cache, verified, faults)
    if faults:
        sys.exit(1)


@cli.command("report")
@trust_option
@click.argument("paths", type=FOLDER, nargs=-1, required=True, metavar="PATH...")
@options(
    click.option("--out", type=FILE, default="report.html", show_default=True, help="The page."),
    click.option("--overwrite", is_flag=True, help="Replace a file that is no report."),
    click.option(
        "--dataset", type=DATASET, help="Where the images of a cache are, if they have moved."
    ),
    click.option("--root", type=FOLDER, help="Where the dataset lies, if it has moved."),
)
def report_command(paths: tuple[str, ...], **given: Any) -> None:
    """One self-contained page about caches, runs, sweeps, or folders of those."""
    from pipeline.console import Console
    from pipeline.report import write_report

    console = Console()
    page = write_report(paths, reporter=console, **given)
    console.say(f"report: {page}")


@cli.command("demo")
@click.option(
    "--out", type=FOLDER, default="demo-out", show_default=True, help="Where everything goes."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 1000))
def demo_command(out: str, overwrite: bool, seeds: int) -> None:
    """All three stages on the embedded digits, in minutes on a CPU."""
    from pipeline.console import Console
    from pipeline.demo import run_demo

    run_demo(out, Console(), overwrite, seeds)
