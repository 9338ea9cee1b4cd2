"""Import what `module:callable` names, if the user trusts the module.

What the user names is imported. What only a cache or a run names may come from someone else: it is
imported if the user names its module as well, in the same command or with `trusting` around a call.
"""

import importlib
import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from stages.errors import ConfigError, PipelineError
from stages.registry import names_in

FOLDERS = tuple(n for n in names_in("stages.inputs.datasets", "dataset") if n.endswith(":"))
"""What stands before the folder of a dataset: `folder:` and others."""
BROUGHT = names_in("stages.inputs.teachers", "teacher")
"""What the names of teachers that bring their weights begin with."""
_CODE = "hub:"
"""Of these, what names a folder with code that is run: `hub:FOLDER:NAME`."""
_OWN_KINDS = ("timm:", *FOLDERS, *(kind for kind in BROUGHT if kind != _CODE))
"""What may stand before a colon and names no module."""
_NOT_THEIRS = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), "<")
_TRUSTED: ContextVar[frozenset[str]] = ContextVar("trusted modules", default=frozenset())


def imported(spec: str, kind: str, error: type[PipelineError]) -> Any:
    """The object that `spec` names. Raises `error`, which says what `kind` of thing it was for."""
    module, _, attribute = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as cause:  # the last for .a:b
        remedy, file = (
            "module:callable must be importable from the current directory.",
            Path(module),
        )
        if file.suffix == ".py":
            remedy = f"Give its module, {file.stem}:{attribute}, in the folder '{file.parent}'."
        raise error(f"cannot import {kind} '{spec}': {cause}", remedy) from cause


def error_line(error: BaseException) -> str:
    """An exception of a user's code in one line: class, message, file and line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({error.filename}:{error.lineno})"
    at = next(filter(_is_own, reversed(traceback.extract_tb(error.__traceback__))), None)
    return f"{text} ({at.filename}:{at.lineno})" if at else text


def _is_own(frame: traceback.FrameSummary) -> bool:
    """Whether a line is neither of a library nor of the stages."""
    libraries = {"site-packages", "dist-packages"} & {*frame.filename.split(os.sep)}
    return not libraries and not frame.filename.startswith(_NOT_THEIRS)


def names_code(spec: str) -> bool:
    """Whether the name of a dataset, a model or a loss is a `module:callable`."""
    return ":" in spec and not spec.startswith(_OWN_KINDS)


# ---- whose word is enough -------------------------------------------------------------------


@contextmanager
def trusting(*modules: str) -> Iterator[None]:
    """Import these modules, and what lies in them, also where only a cache or a run names them.

    What `trust` adds inside is forgotten at the end.
    """
    token = _TRUSTED.set(_TRUSTED.get() | {*modules})
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def trust(*modules: str) -> None:
    """As `trusting`, for the rest of it."""
    _TRUSTED.set(_TRUSTED.get() | {*modules})


def trusted() -> frozenset[str]:
    """The modules that have been named, for processes that do a part of the work."""
    return _TRUSTED.get()


def modules_in(*specs: str | None) -> set[str]:
    """The modules that names of datasets, models, losses and policies name; None names none."""
    found = set()
    for spec in filter(None, specs):
        transforms = [p.removeprefix("v2:") for p in _stages(spec) if p.startswith("v2:")]
        found |= {name.partition(":")[0] for name in transforms}
        if not transforms and names_code(spec):
            found.add(module_of(spec))
    return found


def module_of(spec: str) -> str:
    """The module of `module:callable`; of `hub:FOLDER:NAME`, hub:FOLDER."""
    return spec.rpartition(":")[0] if spec.startswith(_CODE) else spec.partition(":")[0]


def check_trusted(source: str, *, policy: str | None = None, name: str | None = None) -> None:
    """Raise ConfigError if code would be imported that only a document names.

    source: the cache or the run, for the message. policy: the view policy that is in it. name: the
    dataset or the model that is.
    """
    transforms = [part for part in _stages(policy or "") if part.startswith("v2:")]
    for module in sorted(modules_in(*transforms, name if name and names_code(name) else None)):
        if not any(f"{module}.".startswith(f"{known}.") for known in _TRUSTED.get()):
            raise ConfigError(
                f"{source} names code of its own, module '{module}', which is not run unasked",
                f"If you know what it does, add --trust {module}.",
            )


def _stages(policy: str) -> list[str]:
    return policy.replace("|", "+").split("+")
