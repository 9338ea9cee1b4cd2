"""From YAML, flags and key=value to frozen structs; a wrong key or value is one clear line.

What comes later wins: defaults, then --config, then flags, then --set.
"""

import difflib
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from pipeline.home import expanded_values
from pipeline.output import visible
from stages.errors import ConfigError, PipelineError
from stages.inputs.run_files import FastLoader, check_depth
from stages.schema import alternatives, settings_of
from stages.user_code import modules_in, trust

Config = TypeVar("Config", bound=msgspec.Struct)
MOST_BYTES, MOST_VALUES = 2**20, 100_000
"""Of a YAML file: more would take seconds to read, and no configuration has as many."""
MOST_SHOWN = 200
"""Letters of a message: a key or value may be as long as the file."""


def read_config(
    kind: type[Config],
    file: str | None,
    flags: Mapping[str, Any],
    overrides: Sequence[str],
) -> Config:
    """A struct of this kind. flags: dotted key -> value, None where not given. overrides:
    `a.b=c`, c as YAML writes it. Raises ConfigError.
    """
    values: dict[str, Any] = read_yaml(Path(file)) if file else {}
    for key in _dotted(values):
        check_key(kind, key)
    for key, value in flags.items():
        if value is not None:
            put(values, key, value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {_cut(override)} has no '='", "Write --set key=value.")
        check_key(kind, key)
        setting = settings_of(kind).get(key)
        wants_text = setting and str in alternatives(setting.type) and text != "null"
        put(values, key, text if wants_text else _yaml(text, f"--set {override}"))
    config = convert(kind, values)
    trust_named(config)
    return config


def trust_named(config: msgspec.Struct) -> None:
    """The modules that a user's configuration names are trusted: see `stages.user_code`."""
    settings = settings_of(type(config)).values()
    keys = [s.key for s in settings if s.takes in ("dataset", "model", "policy", "loss")]
    trust(*modules_in(*(operator.attrgetter(key)(config) for key in keys)))


def keys_of(kind: type[msgspec.Struct]) -> dict[str, None]:
    """Every dotted key that a struct has, sections and settings."""
    parts = (key.split(".") for key in settings_of(kind))
    return dict.fromkeys(".".join(p[:n]) for p in parts for n in range(1, len(p) + 1))


def convert(kind: type[Config], values: dict[str, Any]) -> Config:
    """A struct of this kind from nested values, which may be changed. Raises ConfigError."""
    for key in keys_of(kind):
        if key not in settings_of(kind) and values.get(key) is None:
            values[key] = {}
    for key, setting in settings_of(kind).items():
        section, _, name = key.rpartition(".")
        inner = values[section] if section else values
        if setting.required and isinstance(inner, dict) and inner.get(name, 0) is None:
            del inner[name]  # as `pipeline config` prints it: it has to be given
    try:
        converted = msgspec.convert(values, kind, strict=False)
        _check_finite(msgspec.to_builtins(converted))
        return converted
    except RecursionError as error:
        raise ConfigError("the configuration is nested too deeply") from error
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, PipelineError):
            raise error.__cause__ from None
        message, _, where = str(error).partition(" - at `$.")
        key = where.rstrip("`")
        if message.startswith("Object missing required field"):
            name = message.split("`")[1]
            full = f"{key}.{name}" if where else name
            option = settings_of(kind)[full].flag or "its option"
            raise ConfigError(
                f"'{full}' is missing", f"Give {option}, or --set {full}=..."
            ) from None
        allowed = settings_of(kind)[key].choices if key in settings_of(kind) else ()
        near = f" (one of {', '.join(allowed)})" if allowed else ""
        raise ConfigError(f"{key or 'configuration'}: {_plain(message)}{near}") from None


def _check_finite(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a number that is none, or that no 64 bits hold."""
    for key, value in flat(values).items():
        numbers = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            shown = tuple(value) if isinstance(value, (list, tuple)) else value
            raise ConfigError(f"{key} must be finite, was {shown}")
        if any(isinstance(n, int) and not -(2**63) <= n < 2**63 for n in numbers):
            raise ConfigError(f"{key} must be a number of at most 64 bits")


def read_yaml(path: Path) -> dict[str, Any]:
    """What a file of keys and values holds. Raises ConfigError."""
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold keys and values")
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r} is not a text")
    for made in ("kind", "classes", "made_from"):  # what a run's own config.yaml says of itself
        values.pop(made, None)
    found: dict[str, Any] = expanded_values(values)
    return found


def load_yaml(path: Path) -> Any:
    """What a YAML file holds, as plain values. Raises ConfigError, also for what would take long
    or much memory.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{path} has more than {MOST_BYTES:,} bytes: no configuration has")
        return _yaml(content.decode(), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8") from error


class _Loader(FastLoader):
    """Keys that are given once; 1e-2 is a number, as in YAML 1.2 and everywhere else."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(
                        f"'{key.value}' in line {line} is given twice", "Leave one of them out."
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII),
    list("-+.0123456789"),
)


def _yaml(text: str, where: str) -> Any:
    where = _cut(where)
    try:
        check_depth(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > MOST_VALUES:
            raise ConfigError(f"{where}: its aliases stand for more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.cause}", error.remedy) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply") from error
    except Exception as error:  # PyYAML lets out what int(), a date or a tag of another kind raises
        raise ConfigError(f"{where} has a value that cannot be read: {error}") from error


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, with every alias written out."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # an alias of something that it lies in
        children = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
            if isinstance(node, yaml.SequenceNode)
            else []
        )
        known[id(node)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(node)]


def check_key(kind: type[msgspec.Struct], key: str) -> None:
    """Raise ConfigError, with the nearest key that is known, unless the struct has this one."""
    known = keys_of(kind)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        key = visible(_cut(key))
        raise ConfigError(f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key among nested values. Raises ConfigError where a section is a value."""
    *sections, name = key.split(".")
    for part in sections:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"'{part}' holds keys, not the value {inner!r}")
        values = inner
    values[name] = value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys; an empty list counts as None, as a setting left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = None if value == [] else value
    return found


def _plain(message: str) -> str:
    return _cut(message[:1].lower() + message[1:].replace("`", "'"))


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
