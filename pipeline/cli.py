"""The `pipeline` command. Heavy imports stand inside the commands: --help answers at once."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from stages.errors import PipelineError

Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> None:
    """Run a command. Exit code 2 for an error of the user's or the surroundings'."""
    sys.path.insert(0, os.getcwd())  # module:callable is looked up from here
    try:
        cli(prog_name="pipeline")
    except PipelineError as error:
        click.echo(f"error: {error.cause}", err=True)
        if error.remedy:
            click.echo(error.remedy, err=True)
        sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="teacher-cache")
def cli() -> None:
    """Run a teacher once, correct what it has wrong, train many students from its cached logits.

    Start with `pipeline demo`.
    """


# ---- options that commands share ------------------------------------------------------------


def options(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, shown in this order."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas: 0.5,0.5,0.5."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of numbers such as 0.5,0.5,0.5", param, ctx)


data_options = options(
    click.option(
        "--dataset",
        help="digits, cifar10, cifar100, fashion-mnist, imagenet, folder:DIR or module:callable.",
    ),
    click.option("--root", help="Where torchvision's datasets lie."),
    click.option(
        "--download", is_flag=True, default=None, help="Let torchvision download what is missing."
    ),
    click.option(
        "--image-size",
        type=int,
        help="Side of the model's input in pixels; the images' own if left out.",
    ),
    click.option(
        "--resize",
        type=int,
        help="For the clean view: resize the shorter side to this, then crop the centre.",
    ),
    click.option("--workers", type=int, help="Processes that decode images too large for memory."),
)
normalise_options = options(
    click.option("--mean", type=Numbers(), help="Normalisation, one number a channel."),
    click.option("--std", type=Numbers(), help="Normalisation, one number a channel."),
)
train_options = options(
    click.option("--epochs", type=int),
    click.option("--batch-size", type=int),
    click.option("--lr", type=float, help="Peak learning rate."),
    click.option("--seed", type=int, help="Sets seed.data and seed.init."),
    click.option(
        "--val-fraction", type=float, help="Share of training samples held out to choose the model."
    ),
    click.option(
        "--deterministic",
        is_flag=True,
        default=None,
        help="Only algorithms that give the same bits again.",
    ),
)
compute_options = options(
    click.option("--device", help="cpu, cuda, cuda:N; a GPU where there is one if left out."),
    click.option("--dtype", help="float32, or autocast to bfloat16 or float16."),
)
config_options = options(
    click.option("--config", "file", help="YAML file with any of the keys."),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any key, for example train.momentum=0.8; may be repeated.",
    ),
)
run_options = options(
    click.option("--out", required=True, help="The run directory."),
    click.option("--resume", is_flag=True, help="Go on with the run that is there."),
    click.option("--overwrite", is_flag=True, help="Replace the run that is there."),
)


def _data_flags(given: dict[str, Any]) -> dict[str, Any]:
    names = ("dataset", "root", "download", "image_size", "resize", "workers", "val_fraction")
    return {f"data.{name}": given.get(name) for name in names}


def _train_flags(given: dict[str, Any]) -> dict[str, Any]:
    names = ("epochs", "batch_size", "lr", "deterministic", "dtype")
    seeds = {f"seed.{name}": given["seed"] for name in ("data", "init")}
    model = {f"model.{name}": given[name] for name in ("mean", "std")}
    train = {f"train.{name}": given[name] for name in names}
    return {**_data_flags(given), **train, **seeds, **model, "device": given["device"]}


# ---- commands -------------------------------------------------------------------------------


@cli.command("train-teacher")
@options(
    click.option(
        "--model", help="A CIFAR-family name, a torchvision name, timm:NAME or module:callable."
    ),
    click.option("--init", help="Weights to start from."),
    click.option(
        "--augment", help="View policy: pad-crop-flip, pad-crop:pad=2, resized-crop-flip, none."
    ),
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
    from stages.train_teacher import TeacherConfig, train_teacher

    flags = _train_flags(given) | {
        "model.architecture": given["model"],
        "model.init": given["init"],
        "augment": given["augment"],
    }
    config = read_config(TeacherConfig, given["file"], flags, given["overrides"])
    console = Console()
    summary = train_teacher(
        config, given["out"], given["resume"], given["overwrite"], reporter=console
    )
    _show_run(console, given["out"], summary)


@cli.command("cache-teacher")
@options(
    click.option(
        "--teacher", help="The model's name; may be left out where --weights is a run directory."
    ),
    click.option(
        "--weights", help="A run directory, .safetensors, a plain state dict, or 'pretrained'."
    ),
    click.option("--views", type=int, help="How many augmented views of every sample to cache."),
    click.option(
        "--augment", help="View policy: pad-crop-flip, pad-crop:pad=2, resized-crop-flip, none."
    ),
    click.option("--seed", type=int, help="Of the views."),
    click.option("--encoding", help="float32, float16 or auto."),
    click.option("--batch-size", type=int),
    click.option("--out", required=True, help="The cache, for example cache.zarr."),
    click.option("--dry-run", is_flag=True, help="Only say how large and how long it would be."),
)
@data_options
@normalise_options
@compute_options
@config_options
def cache_teacher_command(**given: Any) -> None:
    """Stage one: run the teacher once, store its logits for every view of every sample.

    Run it again to complete an interrupted cache, or with more --views to extend one.
    """
    from pipeline.config import read_config
    from pipeline.console import Console, duration, size
    from stages.cache_plan import plan_cache
    from stages.cache_teacher import CacheConfig, cache_teacher, prepare

    names = ("views", "augment", "seed", "encoding", "batch_size", "dtype", "device")
    flags = _data_flags(given) | {name: given[name] for name in names}
    teacher = {"architecture": "teacher", "weights": "weights", "mean": "mean", "std": "std"}
    flags |= {f"teacher.{key}": given[flag] for key, flag in teacher.items()}
    config = read_config(CacheConfig, given["file"], flags, given["overrides"])
    console = Console()
    job = prepare(config)
    plan = plan_cache(job, given["out"])
    console.table(
        f"plan for {given['out']}",
        ("what", "how much"),
        [
            ("samples x views", f"{plan.samples:,} x {plan.views:,}"),
            ("blocks (missing)", f"{plan.blocks:,} ({plan.missing_blocks:,})"),
            ("encoding", plan.encoding),
            ("on disk", f"{size(plan.total_bytes)}, {plan.bytes_per_view:.1f} bytes a view"),
            ("files", f"{plan.files:,}"),
            ("measured speed", f"{plan.samples_per_second:,.0f} samples/s on {job.device}"),
            ("estimated time", f"{duration(plan.hours * 3600)} ({plan.hours:.2f} hours)"),
            ("free disk", size(plan.free_bytes)),
        ],
    )
    plan.check_fits(given["out"])
    if given["dry_run"]:
        return
    summary = cache_teacher(job, given["out"], console)
    top1 = summary.train_top1
    console.table(
        f"{given['out']}: {summary.views} views, {summary.computed_blocks} blocks computed now",
        ("teacher top-1 on", "mean", "lowest", "highest"),
        [
            (
                "training views",
                *(f"{x:.2%}" for x in (sum(top1) / len(top1), min(top1), max(top1))),
            ),
            ("test split", f"{summary.test_top1:.2%}", "", ""),
        ],
    )


@cli.command("rectify")
@click.argument("cache")
@options(
    click.option("--method", help="pairwise (default), swap or blend."),
    click.option("--temperature", type=float, help="Of the loss that will use it; 4 if left out."),
    click.option("--space", help="probability-T (default), probability-1 or logit."),
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
    from stages.rectify import RectifyConfig, rectify

    names = ("method", "temperature", "space", "name", "views", "scheduler", "materialise")
    flags = {name: given[name] for name in names}
    config = read_config(RectifyConfig, given["file"], flags, given["overrides"])
    console = Console()
    statistics = rectify(cache, config, console)
    _show_rectification(console, config.chosen_name, statistics)


@cli.command("train-student")
@click.argument("cache")
@options(
    click.option(
        "--student", help="A CIFAR-family name, a torchvision name, timm:NAME or module:callable."
    ),
    click.option("--init", help="Weights to start from."),
    click.option("--loss", help="kd (default), or ce: the cache's views without its targets."),
    click.option("--temperature", type=float, help="Of the loss; 4 if left out."),
    click.option("--bias", help="none (default), eliminate or rectify."),
    click.option("--rectified", help="Which rectification; may be left out where there is one."),
    click.option("--views", type=int, help="Only the first so many views."),
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
    from stages.train_student import StudentConfig, train_student

    flags = _train_flags(given) | {
        "cache": cache,
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
    summary = train_student(
        config, given["out"], given["resume"], given["overwrite"], reporter=console
    )
    _show_run(console, given["out"], summary)


@cli.command("inspect")
@click.argument("cache")
def inspect_command(cache: str) -> None:
    """Show what a cache is: where it came from, how complete and how large it is."""
    from pipeline.console import Console
    from pipeline.inspect import show_cache

    show_cache(cache, Console())


@cli.command("demo")
@click.option("--out", default="demo-out", show_default=True, help="Where everything goes.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1))
def demo_command(out: str, overwrite: bool, seeds: int) -> None:
    """All three stages on the embedded digits, in minutes on a CPU."""
    from pipeline.console import Console
    from pipeline.demo import run_demo

    run_demo(out, Console(), overwrite, seeds)


# ---- what is shown at the end ---------------------------------------------------------------


def _show_run(console: Any, out: str, summary: dict[str, Any]) -> None:
    from pipeline.console import duration

    rows = [
        (
            name,
            summary[name]["epoch"] + 1,
            *(f"{summary[name][k]:.2%}" for k in ("test_top1", "test_top5")),
        )
        for name in ("last", "best", "selected")
    ]
    seconds, share = duration(summary["train_seconds"]), summary["wait_share"]
    title = (
        f"{out}: {summary['parameters']:,} parameters, {seconds}, {share:.1%} waiting for targets"
    )
    console.table(title, ("", "epoch", "test top-1", "test top-5"), rows)


def _show_rectification(console: Any, name: str, statistics: dict[str, Any]) -> None:
    top1 = statistics["top1_per_view"]
    console.table(
        f"rectification '{name}'",
        ("what", "value"),
        [
            (
                "teacher top-1 per view",
                f"{sum(top1) / len(top1):.2%} ({min(top1):.2%} to {max(top1):.2%})",
            ),
            ("wrong rows", f"{statistics['wrong_rows']:,} ({statistics['wrong_rate']:.2%})"),
            ("label is now the argmax", f"{statistics['label_is_argmax']:.2%} of them"),
            *(
                (f"confused: {pair['label']} taken for {pair['predicted']}", f"{pair['count']:,}")
                for pair in statistics["most_confused"][:5]
            ),
        ],
    )
