"""Which outputs of a teacher make each class of a dataset: by their names, or by a file.

Outputs that belong to no class are left out: with softmax over the logits that are kept, this is
the teacher's distribution on condition that it is one of the classes. Several outputs of one class
are pooled by logsumexp, which adds their probabilities up.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from stages.errors import ConfigError, ModelError

Groups = tuple[tuple[int, ...], ...]
"""Of every class, the outputs that make it."""
Aliases = tuple[tuple[str, ...], ...]
"""Of every output, the names that it goes by."""

_WORDNET = re.compile(r"n\d{8}")
_IMAGENET = 1000
_ALIKE = 0.9
"""Share of names that must be ImageNet's for a teacher's outputs to have its order."""
_LISTED = 40
_FORM = "A map is YAML, a class a line: `cat: 281`, or `cat: [281, tabby, n02123159]`."


def class_groups(
    wanted: str, classes: Sequence[str], aliases: Aliases | None, outputs: int, source: str
) -> Groups:
    """The outputs of each class of a dataset.

    wanted: `auto` to find them by name, else a YAML file, class -> an output or several, each by
    name, WordNet id or number. classes: of the dataset. aliases: of the teacher's outputs, None
    where they are not known. outputs: how many it has. source: of the teacher, for messages.

    Raises ConfigError for a file that is no such map, ModelError where a class has no output, or
    shares one with another.
    """
    named = _Outputs(_with_imagenet(aliases, classes, outputs), outputs, source)
    if wanted == "auto":
        found = _by_name(classes, named)
    else:
        found = _by_file(Path(wanted).expanduser(), classes, named)
    owner: dict[int, str] = {}
    for name, group in zip(classes, found, strict=True):
        for output in group:
            if owner.setdefault(output, name) != name:
                raise ModelError(
                    f"--classes gives output {output} of {source} to {owner[output]!r} and to "
                    f"{name!r}",
                    "Every output belongs to one class, or to none.",
                )
    return found


def mapped_names(file: str) -> tuple[str, ...]:
    """The classes that a map names, in its order. Raises ConfigError."""
    return tuple(_read_map(Path(file).expanduser()))


def in_identity(groups: Groups, outputs: int) -> tuple[tuple[int, ...], Groups]:
    """Groups as an identity has them: an output a class, or, where some class has several, all of
    them; both are empty where output i is class i and there are no others.
    """
    if any(len(group) > 1 for group in groups):
        return (), groups
    order = tuple(output for (output,) in groups)
    return ((), ()) if order == tuple(range(outputs)) else (order, ())


# ---- names ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """The outputs of a teacher, found by name: as it is, else spelt alike, else by a synonym."""

    aliases: Aliases
    count: int
    source: str

    @cached_property
    def _indices(self) -> tuple[dict[str, list[int]], ...]:
        exact: dict[str, list[int]] = {}
        alike: dict[str, list[int]] = {}
        synonyms: dict[str, list[int]] = {}
        for output, names in enumerate(self.aliases):
            for index, spelt in (
                (exact, names),
                (alike, map(_plain, names)),
                (synonyms, (_plain(part) for name in names for part in name.split(","))),
            ):
                for name in {*spelt}:
                    index.setdefault(name, []).append(output)
        return exact, alike, synonyms

    def called(self, name: str) -> list[int]:
        """The outputs of this name; several where it does not say which."""
        exact, alike, synonyms = self._indices
        return exact.get(name) or alike.get(_plain(name)) or synonyms.get(_plain(name)) or []

    def nearest(self, name: str) -> str:
        """A name that may have been meant, as a question."""
        near = difflib.get_close_matches(_plain(name), self._indices[2], n=1)
        return f"; did you mean {near[0]!r}?" if near else ""

    def numbered(self, text: str) -> list[int]:
        """The output of this number, if it is one."""
        number = int(text) if text.isdecimal() and text.isascii() else self.count
        return [number] if number < self.count else []


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-]", " ", name.casefold()).split())


def _by_name(classes: Sequence[str], named: _Outputs) -> Groups:
    found = [named.called(name) for name in classes]
    if not any(found):  # as the folders of ImageNet-V2 are called
        found = [named.numbered(name) for name in classes]
    ambiguous = {n: f for n, f in zip(classes, found, strict=True) if len(f) > 1}
    missing = [name for name, outputs in zip(classes, found, strict=True) if not outputs]
    if missing and not named.aliases:
        raise ModelError(
            f"the names of the {named.count:,} outputs of {named.source} are not known",
            "Give a file with --classes FILE. " + _FORM,
        )
    if missing:
        raise ModelError(
            f"{named.source} has no output for {len(missing)} of {len(classes)} classes: "
            f"{_listed(missing)}{named.nearest(missing[0])}",
            "Name their outputs in a file: --classes FILE. " + _FORM,
        )
    if ambiguous:
        listed = [f"{name!r} may be {' or '.join(map(str, f))}" for name, f in ambiguous.items()]
        raise ModelError(
            f"several outputs of {named.source} have the name of a class: {'; '.join(listed[:5])}",
            "Say which in a file: --classes FILE. " + _FORM,
        )
    return tuple(map(tuple, found))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


# ---- a file ---------------------------------------------------------------------------------


def _by_file(path: Path, classes: Sequence[str], named: _Outputs) -> Groups:
    given = _read_map(path)
    if missing := [name for name in classes if name not in given]:
        raise ModelError(
            f"{path} names no output for {len(missing)} of {len(classes)} classes: "
            f"{_listed(missing)}",
            "Add them. " + _FORM,
        )
    return tuple(_group(name, given[name], named, path) for name in classes)


def _read_map(path: Path) -> Mapping[str, Any]:
    try:
        # All scalars as they are written: `no`, `1e3` and `0017` are names of classes.
        given = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"cannot read the class map {path}: {what}", f"--classes takes auto or a file. {_FORM}"
        ) from error
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{path} holds no map of classes", _FORM)
    return given


def _group(name: str, given: Any, named: _Outputs, path: Path) -> tuple[int, ...]:
    wanted = given if isinstance(given, list) else [given]
    if not wanted or not all(isinstance(text, str) and text for text in wanted):
        raise ConfigError(f"{path}: {name!r} has no output or list of outputs", _FORM)
    group = []
    for text in wanted:
        found = named.called(text) or named.numbered(text)
        if len(found) != 1:
            several = f" is {' and '.join(map(str, found))}: give a number" if found else ""
            near = "" if found else named.nearest(text)
            raise ModelError(
                f"{path}: {name!r} is to be output {text!r}"
                + (f", which{several}" if found else f", which {named.source} has not{near}"),
                f"Outputs have numbers from 0 to {named.count - 1}"
                + (", or their names." if named.aliases else "; its names are not known."),
            )
        group += found
    return tuple(dict.fromkeys(group))


# ---- ImageNet -------------------------------------------------------------------------------


def _with_imagenet(aliases: Aliases | None, classes: Sequence[str], outputs: int) -> Aliases:
    """The names of a teacher's outputs, and, where they are those of ImageNet-1k in its order, or
    nothing is known of 1,000 of them, the WordNet ids and words that timm has for these.
    """
    known = aliases or ()
    if outputs != _IMAGENET or any(_WORDNET.fullmatch(name) for names in known for name in names):
        return known
    table = imagenet_names()
    if table is None:
        if any(map(_WORDNET.fullmatch, classes)):
            raise ModelError(
                "classes are named by WordNet ids, and the table of ImageNet's needs timm",
                "Install it: pip install 'teacher-cache[timm]'.",
            )
        return known
    if not known:
        return table
    same = [bool(_words(ours) & _words(theirs)) for ours, theirs in zip(known, table, strict=True)]
    if sum(same) < _ALIKE * outputs:
        return known
    return tuple((*ours, wordnet) for ours, (wordnet, _) in zip(known, table, strict=True))


def imagenet_names() -> Aliases | None:
    """WordNet id and words of each of ImageNet-1k's classes; None where timm is not installed."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return None
    info = ImageNetInfo("imagenet-1k")
    return tuple(
        (info.index_to_label_name(i), info.index_to_description(i)) for i in range(_IMAGENET)
    )


def _words(names: Iterable[str]) -> set[str]:
    return {_plain(part) for name in names for part in name.split(",")}
