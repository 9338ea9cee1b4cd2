"""Stages of policies by name: how each reads itself from text, and the table of those that begin.

A new base is a class under `@base("name")`, a new stage on top of one a class under
`@on_top("name")` (`layers.py`), in a file of this package.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

from stages.errors import ViewError

Parameters = dict[str, int | float | str]
Stage = tuple[str, Parameters]
"""One stage of a policy as text has it: its name and its parameters."""


class Named:
    """A stage that specifications and identities name."""

    name: ClassVar[str] = ""

    @classmethod
    def parse(cls, text: str) -> Stage:
        """`name:key=value,...` -> the name and the given parameters, of the types they have.

        Raises ViewError for what is no parameter of this stage.
        """
        name, _, arguments = text.partition(":")
        known, parameters = parameters_of(cls(), whole=True), Parameters()
        for argument in filter(None, arguments.split(",")):
            key, _, value = argument.partition("=")
            try:
                parameters[key] = type(known[key])(value)
            except (KeyError, ValueError):
                raise ViewError(
                    f"'{argument}' is not a parameter of view policy '{name}'",
                    f"It takes {', '.join(f'{k}={v}' for k, v in known.items()) or 'none'}.",
                ) from None
        return name, parameters

    @classmethod
    def make(cls, name: str, **parameters: Any) -> Self:
        """The stage of this name, as `parse` gives it, with its parameters, and the seed of a base.

        Raises TypeError for a parameter that it does not have.
        """
        return cls(**parameters)


Class = TypeVar("Class", bound=type[Named])
BASES: dict[str, type[Any]] = {}
"""What may come first in a policy, by name. A name that ends with a colon is followed by more."""


def register(table: dict[str, type[Any]], name: str) -> Callable[[Class], Class]:
    """A decorator that puts a class into a table, and its name into the class."""

    def put(named: Class) -> Class:
        if not name.endswith(":"):  # otherwise it is called by what follows as well
            named.name = name
        table[name] = named
        return named

    return put


def base(name: str) -> Callable[[Class], Class]:
    """Register a policy on which others may be put."""
    return register(BASES, name)


ADDED = {"added": True}
"""Metadata of a field that came after caches had been made: an identity has it where it is not the
default, so that theirs stay what they are.
"""


def parameters_of(part: Any, whole: bool = False) -> Parameters:
    """The fields of a dataclass, but for its seed; whole: also those added that are the default."""
    own = [f for f in dataclasses.fields(part) if f.name != "seed"]
    own.sort(key=lambda f: "added" in f.metadata)
    return {
        f.name: value
        for f in own
        if (value := getattr(part, f.name)) != f.default or whole or "added" not in f.metadata
    }
