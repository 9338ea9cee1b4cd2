"""Options that several commands share, and where in a configuration their values go."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

from pipeline.choices import AUGMENT, DATASET, DEVICE, DTYPES, FILE, FOLDER, Names, shown

Command = TypeVar("Command", bound=Callable[..., Any])


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


augment_option = click.option(
    "--augment",
    type=AUGMENT,
    metavar="POLICY",
    help="Views: pad-crop-flip, pad-crop:pad=2, resized-crop-flip, none or v2:module:callable; on "
    "top of one, with '+', trivial-augment or rand-augment:n=2,m=9, erasing:p=0.25, and last "
    "mixup:alpha=0.8 or cutmix:alpha=1.0. WEAK|STRONG caches both in turn.",
)
data_options = options(
    click.option(
        "--dataset",
        type=DATASET,
        help="digits, cifar10, cifar100, fashion-mnist, imagenet, folder:DIR, hf:DIR or "
        "module:callable.",
    ),
    click.option("--root", type=FOLDER, help="Where torchvision's datasets lie."),
    click.option(
        "--download", is_flag=True, default=None, help="Let torchvision download what is missing."
    ),
    click.option(
        "--rescan",
        is_flag=True,
        default=None,
        help="List folders of images again: after files were overwritten in place.",
    ),
    click.option(
        "--skip",
        type=FILE,
        metavar="FILE",
        help="Images to leave out, one a line, as `pipeline check-data` writes them.",
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
    click.option(
        "--compile/--no-compile",
        default=None,
        help="Compile the model's forward pass: faster steps of small models, after a minute.",
    ),
)
compute_options = options(
    click.option(
        "--device", type=DEVICE, help="cpu, cuda, cuda:N; a GPU where there is one if left out."
    ),
    click.option(
        "--dtype",
        type=Names(DTYPES),
        metavar=shown(DTYPES),
        help="float32, or autocast to bfloat16 or float16.",
    ),
)
config_options = options(
    click.option("--config", "file", type=FILE, help="YAML file with any of the keys."),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any key, for example train.momentum=0.8; may be repeated.",
    ),
)
run_options = options(
    click.option("--out", type=FOLDER, required=True, help="The run directory."),
    click.option("--resume", is_flag=True, help="Go on with the run that is there."),
    click.option("--overwrite", is_flag=True, help="Replace the run that is there."),
    click.option(
        "--tensorboard",
        is_flag=True,
        default=None,
        help="Write event files for TensorBoard as well, under tensorboard/ in the run.",
    ),
)


def trust_option(command: Command) -> Command:
    """--trust; and what other options of the command name is trusted as well."""

    @functools.wraps(command)
    def run(*args: Any, trust: tuple[str, ...], **given: Any) -> Any:
        from stages import user_code

        several = given.get("students") or ()
        specs = [given.get(name) for name in ("dataset", "teacher", "student", "augment", "loss")]
        user_code.trust(*trust, *user_code.modules_in(*specs, *several))
        return command(*args, **given)

    add = click.option(
        "--trust",
        multiple=True,
        metavar="MODULE",
        help="Run this module's code where only the cache or the run names it; may be repeated.",
    )
    return cast(Command, add(run))


def data_flags(given: dict[str, Any]) -> dict[str, Any]:
    """The data section, from what was given on the command line."""
    places = ("dataset", "root", "download", "rescan", "skip")
    names = (*places, "image_size", "resize", "workers", "val_fraction")
    return {f"data.{name}": given.get(name) for name in names}


def train_flags(given: dict[str, Any]) -> dict[str, Any]:
    """What train-teacher and train-student share, from what was given on the command line."""
    names = ("epochs", "batch_size", "lr", "deterministic", "compile", "dtype")
    seeds = {f"seed.{name}": given["seed"] for name in ("data", "init")}
    model = {f"model.{name}": given[name] for name in ("mean", "std")}
    train = {f"train.{name}": given[name] for name in names}
    return {
        **data_flags(given),
        **train,
        **seeds,
        **model,
        "device": given["device"],
        "tensorboard": given["tensorboard"],
    }
