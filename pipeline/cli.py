"""The `pipeline` command. Heavy imports stand inside the commands: --help answers at once."""

import sys

import click

from pipeline.arguments import (
    CacheAt,
    CachePlace,
    CalibrateSettings,
    CheckDataSettings,
    DemoSettings,
    EvaluateSettings,
    ReportSettings,
    RunPlace,
    SweepSettings,
    VerifySettings,
)
from pipeline.ending import check_folder, run
from pipeline.home import expanded
from pipeline.import_path import current_folder_last
from pipeline.options import Command, given
from pipeline.ranks import check_ranks, run_rank, several_ranks, tell
from stages.errors import PipelineError
from stages.settings import CONFIGS, CacheConfig, RectifyConfig, StudentConfig, TeacherConfig


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

    command_class = Command

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
@given(TeacherConfig, RunPlace)
def train_teacher_command(config: TeacherConfig, place: RunPlace) -> None:
    """Train a model on hard labels: a teacher, a baseline, or a teacher for every fold."""
    from pipeline.console import Console
    from pipeline.tables import show_folds, show_run
    from stages.train_teacher import train_folds, train_teacher

    console = Console()
    if config.folds is not None:
        summaries = train_folds(config, place.out, place.resume, place.overwrite, reporter=console)
        show_folds(console, place.out, config, summaries)
        return
    summary = train_teacher(config, place.out, place.resume, place.overwrite, reporter=console)
    show_run(console, place.out, summary)


@cli.command("cache-teacher")
@given(CacheConfig, CachePlace, trusts=True)
def cache_teacher_command(config: CacheConfig, place: CachePlace) -> None:
    """Stage one: run the teacher once, store its logits for every view of every sample.

    Run it again to complete an interrupted cache, or with more --views to extend one.
    """
    from pipeline.console import Console
    from pipeline.stage_one import run_stage_one

    run_stage_one(Console(), config, place)


@cli.command("check-data")
@given(CheckDataSettings)
def check_data_command(settings: CheckDataSettings) -> None:
    """Decode every image: list what is broken, odd, twice there or not taken.

    DATASET is what --dataset takes. Exit code 1 if any image is broken.
    """
    from pipeline.check_data import run_check_data
    from pipeline.console import Console

    if not run_check_data(Console(), settings):
        sys.exit(1)


@cli.command("rectify")
@given(RectifyConfig, CacheAt)
def rectify_command(config: RectifyConfig, at: CacheAt) -> None:
    """Stage two: mark which rows the teacher has wrong, and store what they should say."""
    from pipeline.console import Console
    from pipeline.stage_two import show_rectification, show_suspects
    from stages.rectify import rectify

    console = Console()
    statistics = rectify(at.cache, config, console)
    show_rectification(console, config.chosen_name, statistics)
    if config.trusted_above is not None:
        show_suspects(console, at.cache, config)


@cli.command("calibrate")
@given(CalibrateSettings)
def calibrate_command(settings: CalibrateSettings) -> None:
    """Fit the temperature that calibrates the teacher, for students with --calibrate."""
    from pipeline.console import Console
    from pipeline.stage_two import show_calibrated
    from stages.calibrate import calibrate

    console = Console()
    show_calibrated(console, calibrate(settings.cache, settings.on, console))


@cli.command("train-student")
@given(StudentConfig, RunPlace, trusts=True)
def train_student_command(config: StudentConfig, place: RunPlace) -> None:
    """Stage three: train a student from the cache. The teacher is never loaded."""
    from pipeline.console import Console
    from pipeline.tables import show_run
    from stages.train_student import train_student
    from stages.training.objective import unused_settings

    console = Console()
    if ignored := unused_settings(config.loss):
        console.say(f"the loss ce uses no teacher: {', '.join(ignored)} changes nothing")
    summary = train_student(config, place.out, place.resume, place.overwrite, reporter=console)
    show_run(console, place.out, summary)


@cli.command("config")
@click.argument("command", type=click.Choice([*CONFIGS]), metavar="COMMAND")
def config_command(command: str) -> None:
    """Print a YAML file with every setting of a command, for its --config.

    Every key has its default, what it means and what it may be.
    """
    from pipeline.template import template

    click.echo(template(command), nl=False)


@cli.command("evaluate")
@given(EvaluateSettings, trusts=True)
def evaluate_command(settings: EvaluateSettings) -> None:
    """Measure a run on the test split, and compare a student with its teacher."""
    from msgspec.structs import asdict

    from pipeline.console import Console
    from pipeline.evaluation import check_json, show_evaluation, write_json
    from stages.evaluate import Evaluated, OtherImages, evaluate_run

    if settings.out:
        check_json(settings.out, Evaluated)
    console = Console()
    asked = asdict(settings)
    del asked["out"]
    other = OtherImages(*(asked.pop(name) for name in ("dataset", "root", "download", "skip")))
    evaluated = evaluate_run(**asked, other=other, reporter=console)
    show_evaluation(console, evaluated)
    if settings.out:
        write_json(settings.out, evaluated)


@cli.command("sweep")
@given(SweepSettings, trusts=True)
def sweep_command(settings: SweepSettings) -> None:
    """Train many students: grids of settings, several seeds, one table.

    Run it again to go on with an interrupted sweep, or after adding runs and seeds.
    """
    from msgspec.structs import asdict

    from pipeline.console import Console
    from pipeline.sweep.run import run_sweep

    run_sweep(console=Console(), **asdict(settings))


@cli.command("inspect")
@given(CacheAt)
def inspect_command(at: CacheAt) -> None:
    """Show what a cache is: where it came from, how complete and how large it is."""
    from pipeline.console import Console
    from pipeline.tables import show_cache

    show_cache(at.cache, Console())


@cli.command("verify")
@given(VerifySettings, trusts=True)
def verify_command(asked: VerifySettings) -> None:
    """Check every byte of a cache against its commit records.

    Exit code 0 if no faults are found, 1 with a list of them.
    """
    from pipeline.console import Console
    from pipeline.tables import show_verified
    from stages.cache import LogitCache
    from stages.errors import ChangedImagesError
    from stages.repair import recorded_job, repair
    from stages.verify import Fault, verify, verify_live, verify_pixels

    console, cache = Console(), asked.cache
    verified = verify(cache, console)
    faults = verified.faults
    if asked.live or asked.pixels or (asked.repair and faults):
        try:
            job = recorded_job(cache, asked.dataset, asked.root, asked.weights, asked.device)
        except ChangedImagesError as error:
            if asked.repair and faults:
                raise
            faults = [*faults, Fault("images", error.cause)]
            show_verified(console, cache, verified, faults)
            sys.exit(1)
        if asked.repair and faults:
            show_verified(console, cache, verified, faults)
            verified = repair(cache, job, faults, console)
            faults = verified.faults
        if not faults and asked.live:
            faults = verify_live(LogitCache.open(cache), job, asked.live, reporter=console)
        if not faults and asked.pixels:
            faults = verify_pixels(LogitCache.open(cache), job.splits)
    show_verified(console, cache, verified, faults)
    if faults:
        sys.exit(1)


@cli.command("report")
@given(ReportSettings, trusts=True)
def report_command(settings: ReportSettings) -> None:
    """One self-contained page about caches, runs, sweeps, or folders of those."""
    from msgspec.structs import asdict

    from pipeline.console import Console
    from pipeline.report import write_report

    console = Console()
    page = write_report(**asdict(settings), reporter=console)
    console.say(f"report: {page}")


@cli.command("demo")
@given(DemoSettings)
def demo_command(settings: DemoSettings) -> None:
    """All three stages on the embedded digits, in minutes on a CPU."""
    from pipeline.console import Console
    from pipeline.demo import run_demo

    run_demo(settings.out, Console(), settings.overwrite, settings.seeds)
