"""How a setting is declared: once, beside its type and its default. Imports no torch.

    epochs: Annotated[int, about("Passes over all images.", "--epochs", above=0)] = 30

Options and their `--help`, keys and comments of YAML, checks, and what may differ between runs that
are compared or resumed: all of it is read from there.
"""

import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import msgspec

from stages.errors import ConfigError

Decides = Literal["result", "weights", "contents", "place", "nothing"]
"""What a setting decides.

result: what is learned. weights: a run's exact weights alone, as seeds do, or rounding: runs that
differ in it are compared and averaged. contents: as `result`, through what lies at a path, wherever
that is. place: where something lies that is compared by its contents. nothing: neither.
"""
Takes = Literal[
    "dataset", "model", "policy", "loss", "encoding", "device", "weights", "folder", "file"
]  # fmt: skip
"""What a text is the name or the path of."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a command.

    key: dotted where it lies in a section. type: without what is said about it. default: REQUIRED
    where there is none. flag: its option, None for none; settings that share one are set together.
    argument: given by its place on the command line. shared: students that are trained together
    have it in common, as it decides their batches. bounds: see `check_bounds`.
    """

    key: str
    type: Any
    default: Any
    text: str
    group: str = "run"
    flag: str | None = None
    argument: bool = False
    metavar: str | None = None
    takes: Takes | None = None
    decides: Decides = "result"
    shared: bool = False
    bounds: Mapping[str, float] = field(default_factory=dict)

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is REQUIRED

    @property
    def kind(self) -> Any:
        """Its type where it is not None; of a list, that of its elements."""
        kind = next(t for t in alternatives(self.type) if t is not type(None))
        return get_args(kind)[0] if get_origin(kind) is tuple else kind

    @property
    def several(self) -> bool:
        """Whether it is a list."""
        return any(get_origin(t) is tuple for t in alternatives(self.type))

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it can have, where they are few."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


REQUIRED = msgspec.NODEFAULT
_BOUNDS = ("above", "least", "below", "most")


def about(text: str, flag: str | None = None, **more: Any) -> msgspec.Meta:
    """What is said of a setting, for `Annotated`. more: fields of `Setting`, and its bounds.

    Of a section: fields of its settings, and `flags`, their options in this command alone.
    """
    return msgspec.Meta(description=text, extra=more | ({"flag": flag} if flag else {}))


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all settings: immutable, an unknown key is an error, numbers are within bounds.

    section: the keys of a section begin with it.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for key, setting in settings_of(type(self)).items():
            if setting.bounds and "." not in key and (value := getattr(self, key)) is not None:
                check_bounds(f"{self.section}.{key}".lstrip("."), value, **setting.bounds)


@functools.cache
def settings_of(kind: type[msgspec.Struct]) -> dict[str, Setting]:
    """Every setting of a struct and of its sections, by dotted key."""
    return {setting.key: setting for setting in _settings(kind, "", {}, {})}


def check_bounds(
    name: str,
    value: float,
    above: float | None = None,
    least: float = -math.inf,
    below: float | None = None,
    most: float = math.inf,
) -> None:
    """Raise ConfigError unless above < value < below, least <= value <= most, and it is finite."""
    low, high = (least if above is None else above), (most if below is None else below)
    inside = value > low if above is not None else value >= low
    inside &= value < high if below is not None else value <= high
    if inside and math.isfinite(value):
        return
    if low == above == 0 and not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive, was {value}")
    if low == above == 0:
        raise ConfigError(f"{name} must be at most {high:,}, was {value:.3g}")
    start = "(" if above is not None else "["
    end = ")" if below is not None or math.isinf(high) else "]"
    raise ConfigError(f"{name} must be in {start}{low:g}, {high:g}{end}, was {value}")


# ---- types ----------------------------------------------------------------------------------


def plain(kind: Any) -> Any:
    """A type without its annotations."""
    return plain(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    kind = plain(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(plain(member) for member in get_args(kind))
    return (kind,)


def section(kind: Any) -> type[msgspec.Struct] | None:
    """The struct type inside a field type, if it is one."""
    found = (t for t in alternatives(kind) if isinstance(t, type) and issubclass(t, msgspec.Struct))
    return next(found, None)


def _settings(
    kind: type[msgspec.Struct],
    prefix: str,
    of_section: Mapping[str, Any],
    flags: Mapping[str, str | None],
) -> Iterator[Setting]:
    """The settings of a struct whose keys begin with `prefix`. flags: instead of their own."""
    for each in msgspec.structs.fields(kind):
        said, key = _said(each.type), prefix + each.name
        if (inner := section(each.type)) is not None:
            del said["text"]
            own = said.pop("flags", {})
            yield from _settings(inner, f"{key}.", {"group": each.name} | said, own)
            continue
        said = {**of_section, **said}
        if each.name in flags:
            said["flag"] = flags[each.name]
        said["bounds"] = {name: said.pop(name) for name in _BOUNDS if name in said}
        default = each.default
        if default is REQUIRED and each.default_factory is not REQUIRED:
            default = each.default_factory()
        yield Setting(key=key, type=plain(each.type), default=default, **said)


def _said(kind: Any) -> dict[str, Any]:
    """What is said about a type; what is said last counts."""
    said: dict[str, Any] = {"text": ""}
    for note in get_args(kind)[1:] if get_origin(kind) is Annotated else ():
        if isinstance(note, msgspec.Meta):
            said |= {"text": note.description or said["text"], **(note.extra or {})}
    return said
