"""`~` in arguments and configurations: a shell expands it only at the start of a word."""

import os
import re
from typing import Any

from stages.user_code import FOLDERS

_HOME = re.compile(
    rf"((?:--[\w-]+=)?(?:[\w.]+=)?(?:{'|'.join(FOLDERS)})?)(~[^/]*)(/.*|)", re.DOTALL
)


def expanded(text: str) -> str:
    """The text with a home directory in the place of `~` or `~user`, where a path begins with it:
    `folder:~/data`, `--out=~/run`, `data.root=~/data`.
    """
    match = _HOME.fullmatch(text)
    return match[1] + os.path.expanduser(match[2]) + match[3] if match else text


def expanded_values(values: Any) -> Any:
    """As `expanded`, of all texts in nested lists and dicts."""
    if isinstance(values, dict):
        return {key: expanded_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [expanded_values(value) for value in values]
    return expanded(values) if isinstance(values, str) else values
