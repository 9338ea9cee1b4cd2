"""The table of teachers that bring their weights: what is asked of each, and what they share."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from stages.errors import ModelError
from stages.inputs.models import Model


@dataclass(frozen=True)
class Asked:
    """A teacher as the user names it. argument: what follows its kind. weights: `--weights`, for
    kinds that take any. class_names: of the dataset, empty where it has none. prompts: a file.
    """

    kind: str
    argument: str
    weights: str | None = None
    class_names: Sequence[str] = ()
    prompts: str | None = None

    @property
    def name(self) -> str:
        """As the identity has it."""
        return f"{self.kind}{self.argument}"


Load = Callable[[Asked], Model]
KINDS: dict[str, Load] = {}
"""What loads a teacher, by what its name begins with."""
TAKES_WEIGHTS: set[str] = set()
"""Kinds for which `--weights` may be given as well."""


def teacher(kind: str, weights: bool = False) -> Callable[[Load], Load]:
    """Register what loads teachers whose names begin so. weights: `--weights` may be given."""

    def register(load: Load) -> Load:
        KINDS[kind] = load
        TAKES_WEIGHTS.update({kind} if weights else ())
        return load

    return register


def needed(package: str, extra: str, name: str) -> Any:
    """A library that a teacher needs. Raises ModelError where it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ModelError(
            f"{name} needs {package}", f"Install it: pip install 'teacher-cache[{extra}]'."
        ) from error


def first_line(error: BaseException) -> str:
    """What a library says, in one line."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
