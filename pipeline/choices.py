"""What Tab completes: names of options' values, and paths. Imports no torch.

A name that is not listed is not an error here: its reader reports known and similar names.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from stages.registry import names_in
from stages.schema import Takes
from stages.user_code import BROUGHT, FOLDERS

LOSSES = names_in("stages.objectives.losses", "loss")
DEVICES = ("auto", "cpu", "cuda")
ENCODINGS = ("auto", *names_in("stages.cache.encoding", "encoding"))
DATASETS = tuple(n for n in names_in("stages.inputs.datasets", "dataset") if n not in FOLDERS)
POLICIES = names_in("stages.inputs.views", "base")
ON_TOP = names_in("stages.inputs.views", "on_top")
MODELS = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *("resnet8x4", "resnet32x4", "ResNet50", "resnet9", "wrn_16_1", "wrn_16_2", "wrn_40_1"),
    *("wrn_40_2", "vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "mobile_half", "ShuffleV1"),
    *("ShuffleV2", "resnet18", "resnet50", "vit_b_16", "timm:"),
    *BROUGHT,
)
"""The usual ones; every name of torchvision's is known as well."""


if TYPE_CHECKING:
    Text = click.ParamType[str]
else:  # older click has no parameters there
    Text = click.ParamType


class Names(Text):
    """A text for which some names are known. folders: prefixes before the path of a folder."""

    name = "text"

    def __init__(self, names: Sequence[str], folders: Sequence[str] = ()) -> None:
        self.names, self.folders = names, folders

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        prefix, colon, path = incomplete.partition(":")
        if colon and f"{prefix}:" in self.folders:
            return [CompletionItem(f"{prefix}:{found}") for found in _folders(path)]
        known = [*self.names, *self.folders]
        return [CompletionItem(name) for name in known if name.startswith(incomplete)]


class Composed(Names):
    """A policy of views: a base, and after each '+' a layer; after '|' another base."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        at = max(incomplete.rfind("+"), incomplete.rfind("|")) + 1
        names = ON_TOP if incomplete[at - 1 : at] == "+" else POLICIES
        last = incomplete[at:]
        return [CompletionItem(incomplete[:at] + n) for n in names if n.startswith(last)]


class Lies(Text):
    """A path, completed by the shell: of a folder, or of any file. names: what may stand there."""

    name = "path"

    def __init__(self, kind: str = "file", names: Sequence[str] = ()) -> None:
        self.kind, self.names = kind, names

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        named = [CompletionItem(n) for n in self.names if incomplete and n.startswith(incomplete)]
        return [*named, CompletionItem(incomplete, type=self.kind)]


FOLDER, FILE = Lies("dir"), Lies("file")
TAKEN: dict[Takes, Text] = {
    "dataset": Names(DATASETS, FOLDERS),
    "model": Names(MODELS),
    "policy": Composed(POLICIES),
    "loss": Names(LOSSES),
    "encoding": Names(ENCODINGS),
    "device": Names(DEVICES),
    "weights": Lies("file", ("pretrained",)),
    "folder": FOLDER,
    "file": FILE,
}
"""How options of each kind are completed."""


def known(takes: Takes) -> str:
    """The names of a kind, for --help; none for paths, and for models, which are too many."""
    if takes == "policy":
        return f"Bases: {', '.join(POLICIES)}. Layers: {', '.join(ON_TOP)}."
    names = {"dataset": DATASETS, "loss": LOSSES, "encoding": ENCODINGS}.get(takes)
    return f"Names: {', '.join(names)}." if names else ""


def _folders(start: str) -> list[str]:
    """The folders whose path begins so, each with a slash at its end."""
    parent, begun = os.path.split(start)
    try:
        entries = sorted(os.scandir(os.path.expanduser(parent) or "."), key=lambda e: e.name)
        return [
            os.path.join(parent, entry.name, "")
            for entry in entries
            if entry.name.startswith(begun) and entry.is_dir()
            if begun or not entry.name.startswith(".")
        ]
    except OSError:
        return []


class Bash(BashComplete):
    """As click has it, for words with a colon: bash takes them apart, and replaces what follows."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        words = [*args, incomplete]
        at = 1
        while at < len(words):
            if ":" in (words[at], words[at - 1][-1:]) and not words[at - 1].startswith("-"):
                words[at - 1 : at + 1] = [words[at - 1] + words[at]]
            else:
                at += 1
        self._replaced = len(words[-1]) - len(incomplete) if incomplete != ":" else len(words[-1])
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{item.value[self._replaced :] if item.type == 'plain' else item.value}"


add_completion_class(Bash)
