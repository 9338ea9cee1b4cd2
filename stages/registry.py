"""Losses, encodings, layers of views and datasets register themselves: each is one file.

A decorator with the name in it, `@loss("kd", ...)`, puts what it decorates into a table.
"""

import importlib
import pkgutil
import re
import sys
from pathlib import Path


def names_in(package: str, decorator: str) -> tuple[str, ...]:
    """The names that the files of a package give to a decorator, sorted. Nothing is imported.

    package: of `stages`, for example `stages.objectives.losses`.
    """
    folder = Path(__file__).parent.joinpath(*package.split(".")[1:])
    given = re.compile(rf'^@{decorator}\(\s*"([^"]+)"', re.MULTILINE)
    return tuple(
        sorted(name for file in folder.glob("*.py") for name in given.findall(file.read_text()))
    )


def import_all(package: str) -> None:
    """Import every module of a package, so that what they define is registered."""
    for found in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{found.name}")
