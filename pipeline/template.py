"""A commented YAML file with every setting of a command, which its --config takes back."""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.choices import known
from stages.schema import Setting, settings_of
from stages.settings import CONFIGS

_WIDTH = 98
_LARGE = 2**62
"""Larger bounds are those of 64 bits and are not printed."""
_BOUNDS = {"above": "above", "least": "at least", "below": "below", "most": "at most"}


def template(command: str) -> str:
    """Every key of a command's configuration with its default and what it means, as YAML.

    A key that has to be given has no value; it may be given by its option as well.
    """
    head = (
        f"Settings of `pipeline {command}`: give them with --config FILE. Options and --set on the "
        "command line win over the file. Keys may be left out; what is required has no value here."
    )
    lines, open_section = [*_comment(head, "")], ""
    for key, setting in settings_of(CONFIGS[command]).items():
        section, _, name = key.rpartition(".")
        indent = "  " if section else ""
        if section != open_section and section:
            lines += ["", f"{section}:"]
        elif not section:
            lines.append("")
        open_section = section
        lines += _comment(_meaning(setting), indent)
        lines.append(f"{indent}{name}: {_value(setting)}".rstrip())
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _meaning(setting: Setting) -> str:
    return " ".join(_sentences(setting))


def _sentences(setting: Setting) -> Iterator[str]:
    yield setting.text
    if setting.takes is not None and (names := known(setting.takes)):
        yield names
    if setting.choices:
        yield f"One of {', '.join(setting.choices)}."
    bounds = [
        f"{word} {_number(setting.bounds[name])}"
        for name, word in _BOUNDS.items()
        if abs(setting.bounds.get(name, _LARGE)) < _LARGE
    ]
    if bounds:
        yield f"{' and '.join(bounds).capitalize()}."
    if setting.flag is not None:
        yield f"Option {setting.flag}."
    if setting.required:
        yield "Required."


def _value(setting: Setting) -> str:
    """The default as YAML, in one line."""
    if setting.required:
        return ""
    value: Any = [*setting.default] if setting.several and setting.default else setting.default
    text = yaml.safe_dump([] if value == () else value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
