"""Which tar files a `wds:` dataset is made of, and which of them are its training or test split."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from stages.errors import DatasetError
from stages.inputs.datasets.dataset import Source, Split
from stages.inputs.datasets.listing import LAYOUTS, split_of_folder

MOST_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)", re.ASCII)
_SPECIAL = re.compile(r"[{}*?]|::")
_WORD = re.compile(r"[a-z]+")
_NEEDED = (
    "wds:PATTERN is a tar file, several such as wds:DIR/train-{000..146}.tar or "
    "'wds:DIR/train-*.tar', or a folder of them, on a local path."
)


def expanded(pattern: str) -> list[str]:
    """A pattern with each of its ranges `{000..146}` and lists `{a,b}` as what it stands for, in
    order, as bash does it; of patterns joined by `::` one after another.

    Raises DatasetError for braces that are neither, and for braces in braces.
    """
    names = [name for part in pattern.split("::") for name in _expanded(part)]
    if odd := next((name for name in names if set(name) & {*"{}"}), None):
        raise DatasetError(
            f"the braces of wds:{pattern} cannot be expanded: '{odd}' is left",
            "Write {000..146} or {a,b}, without braces in braces.",
        )
    return names


def shards_of(source: Source) -> list[Path]:
    """The shards of a split, in order. Raises DatasetError if there are none, or one is missing."""
    if source.split == "test" and source.test is not None:
        return _matching(source.test.removeprefix("wds:"))
    given = _matching(source.argument)
    found = _named(given, source.split)
    others = any(_split_in(shard) for shard in given)
    if not found and source.split == "train" and (source.test is not None or not others):
        return given
    if not found:
        called = " or ".join(group[0] for group in LAYOUTS[source.split])
        raise DatasetError(
            f"{source.spec} has {len(given):,} shards, none of them called {called}",
            "Say with --test what is tested on: a pattern of shards, a share such as 0.1, or none."
            if source.split == "test"
            else "Give the pattern of the training shards.",
        )
    return found


def common_folder(shards: Sequence[Path]) -> Path:
    """The folder that all shards lie in, at some depth."""
    return Path(os.path.commonpath([shard.parent for shard in shards]))


def fixed_folder(pattern: str) -> str:
    """Of a pattern, the folder before its first special character; else the path that it is."""
    start = _SPECIAL.split(pattern, maxsplit=1)[0]
    return pattern if start == pattern else os.path.dirname(start) or "."


# ---- details --------------------------------------------------------------------------------


def _expanded(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None or not (choices := _choices(match[1])):
        return [pattern]
    before, after = pattern[: match.start()], _expanded(pattern[match.end() :])
    if len(choices) * len(after) > MOST_SHARDS:
        raise DatasetError(f"'{pattern}' stands for more than {MOST_SHARDS:,} shards", _NEEDED)
    return [f"{before}{choice}{rest}" for choice in choices for rest in after]


def _choices(inside: str) -> list[str]:
    """What stands between braces; nothing if it is neither a range nor a list."""
    if not (match := _RANGE.fullmatch(inside)):
        return inside.split(",") if "," in inside else []
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MOST_SHARDS:
        raise DatasetError(f"{{{inside}}} stands for more than {MOST_SHARDS:,} shards", _NEEDED)
    padded = any(len(end) > 1 and end[0] == "0" for end in match.groups())
    width = max(len(match[1]), len(match[2])) if padded else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}}" for number in range(first, last + step, step)]


def _matching(pattern: str) -> list[Path]:
    if not pattern:  # as of a variable of the shell that is not set; Path("") would be this folder
        raise DatasetError("wds: has no pattern", _NEEDED)
    folder = Path(pattern).expanduser()
    if folder.is_dir():
        found = [*folder.glob("*.tar"), *folder.glob("*/*.tar")]
        shards = sorted(found, key=lambda path: path.relative_to(folder).parts)
        if not shards:
            raise DatasetError(f"{folder} has no shards *.tar", _NEEDED)
        return shards
    shards, missing = [], []
    for name in expanded(pattern):
        path = os.path.expanduser(name)
        if {*"*?"} & {*path}:
            matches = sorted(glob.glob(path))
            if not matches:
                raise DatasetError(f"no shard matches {path}", _NEEDED)
            shards += map(Path, matches)
        else:
            shards.append(Path(path))
            missing += [] if os.path.exists(path) else [path]
    if missing:
        more = f" and {len(missing) - 1:,} more of {len(shards):,}" if len(missing) > 1 else ""
        raise DatasetError(f"no shard {missing[0]}{more}", _NEEDED)
    if len({*shards}) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise DatasetError(f"wds:{pattern} has the shard {twice} twice", "Name each of them once.")
    return shards


def _split_in(shard: Path) -> tuple[Split, int] | None:
    """The split that a word in the name of a shard, else the name of its folder, says; and which
    group of names that belongs to.
    """
    for word in (*_WORD.findall(shard.name.lower()), shard.parent.name.lower()):
        if split := split_of_folder(word):
            groups = LAYOUTS[split]
            return split, next(i for i, group in enumerate(groups) if word in group)
    return None


def _named(shards: list[Path], split: Split) -> list[Path]:
    """Those whose names have a split as a word; where some are called test and some val, the
    former.
    """
    known = {shard: _split_in(shard) for shard in shards}
    for group in range(len(LAYOUTS[split])):
        if found := [shard for shard in shards if known[shard] == (split, group)]:
            return found
    return []
