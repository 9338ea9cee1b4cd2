"""Options and arguments of commands, made from what is declared once: see `stages.schema`."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import click
import msgspec

from pipeline.choices import FILE, TAKEN, Names, known
from stages.schema import Setting, settings_of
from stages.settings import CONFIGS
from stages.user_code import trust

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]
GROUPS = ("data", "model", "training", "loss", "bias", "run")
"""Of options, in the order of --help."""


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas: 0.5,0.5,0.5."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of numbers such as 0.5,0.5,0.5", param, ctx)


class Option(click.Option):
    """An option that --help shows in a group."""

    def __init__(self, *declared: Any, group: str = "run", **more: Any) -> None:
        super().__init__(*declared, **more)
        self.group = group


class Command(click.Command):
    """A command whose --help shows options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                shown[getattr(parameter, "group", "run")].append(record)
        for name, records in shown.items():
            if records:
                with formatter.section(f"{name.capitalize()} options"):
                    formatter.write_dl(records)


def given(*kinds: type[msgspec.Struct], trusts: bool = False) -> Callable[[Function], Function]:
    """A command that is called with one struct of each kind, read from its command line.

    The first may be one that --config and --set fill as well. trusts: with --trust.
    """
    decorators = [decorator for kind in kinds for decorator in _parameters(kind)]
    decorators += [*_CONFIG] * (kinds[0] in CONFIGS.values()) + [_TRUST] * trusts

    def decorate(function: Function) -> Any:
        @functools.wraps(function)
        def run(
            config_file: str | None = None,
            overrides: tuple[str, ...] = (),
            trusted: tuple[str, ...] = (),
            **words: Any,
        ) -> Any:
            from pipeline.config import read_config

            trust(*trusted)
            read = []
            for kind in kinds:
                more = (config_file, overrides) if kind in CONFIGS.values() else (None, ())
                read.append(read_config(kind, more[0], _flags(kind, words), more[1]))
            return function(*read)

        return functools.reduce(lambda made, add: add(made), reversed(decorators), run)

    return decorate


_CONFIG: tuple[Decorator, ...] = (
    click.option(
        "--config",
        "config_file",
        cls=Option,
        type=FILE,
        help="YAML file with any of the keys; `pipeline config` prints one.",
    ),
    click.option(
        "--set",
        "overrides",
        cls=Option,
        multiple=True,
        metavar="KEY=VALUE",
        help="Any key, for example train.momentum=0.8; may be repeated.",
    ),
)
_TRUST: Decorator = click.option(
    "--trust",
    "trusted",
    cls=Option,
    multiple=True,
    metavar="MODULE",
    help="Run this module's code where only the cache or the run names it; may be repeated.",
)


def _flags(kind: type[msgspec.Struct], words: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, by dotted key; None where nothing was."""
    return {
        setting.key: None if (value := words[_name(same[0])]) == () else value
        for same in _together(kind)
        for setting in same
    }


def _together(kind: type[msgspec.Struct]) -> list[list[Setting]]:
    """The settings that are given on the command line, those that share a flag together."""
    found: dict[str, list[Setting]] = {}
    for setting in settings_of(kind).values():
        if setting.flag is not None or setting.argument:
            found.setdefault(setting.flag or setting.key, []).append(setting)
    return [*found.values()]


def _name(setting: Setting) -> str:
    return setting.key.replace(".", "_")


def _parameters(kind: type[msgspec.Struct]) -> Iterator[Decorator]:
    """Decorators that add a struct's arguments and options."""
    configured = kind in CONFIGS.values()
    for same in _together(kind):
        first = same[0]
        more: dict[str, Any] = {"type": _type(first), "metavar": first.metavar}
        if first.argument:
            yield click.argument(
                _name(first), nargs=-1 if first.several else 1, required=True, **more
            )
            continue
        if first.kind is bool:
            more = {"is_flag": True}
        elif first.choices:
            more["metavar"] = f"[{'|'.join(first.choices)}]"
        yield click.option(
            first.flag or "",
            _name(first),
            cls=Option,
            group=first.group,
            multiple=first.several and first.kind is str,
            default=None,
            required=first.required and not configured,
            help=_help(same, configured),
            **more,
        )


def _type(setting: Setting) -> Any:
    if setting.takes is not None:
        return TAKEN[setting.takes]
    if setting.choices:
        return Names(setting.choices)
    return Numbers() if setting.several else setting.kind


def _help(same: Sequence[Setting], configured: bool) -> str:
    """What an option does, what it may be, and what it is if left out."""
    first = same[0]
    text = first.text
    if len(same) > 1:
        text = f"Sets {' and '.join(setting.key for setting in same)}."
    if first.takes is not None and (names := known(first.takes)):
        text += f" {names}"
    if first.required:  # click says it where no file may have it
        return f"{text} [required]" if configured else text
    shown = first.default is not None and first.kind is not bool and first.default != ()
    return f"{text} [default: {first.default}]" if shown else text
