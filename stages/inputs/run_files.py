"""Reading a run directory: config.yaml, summary.json, and the files whose digests these have.

Both contain a sha256 of themselves, and summary.json those of config.yaml, metrics.jsonl and
model.safetensors, so that damage is an error. Files written by hand have none and are accepted.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.errors import RunError

MOST_DEEP = 50
"""Of collections in one another in a YAML file: no configuration has as many."""
_SEAL = "# sha256 of what follows: "
_DIGESTS = "digests"


def sha256(content: bytes) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()


class ShallowLoader(yaml.SafeLoader):
    """Raises RecursionError at once for what is nested deeper than MOST_DEEP.

    PyYAML itself would take seconds: at each bracket it looks at all that are open.
    """

    _depth = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803
        """As PyYAML has it, for a bracket that may still be opened."""
        if self.flow_level >= MOST_DEEP:
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As PyYAML has it, for a node that may still lie in its parent."""
        if self._depth >= MOST_DEEP:
            raise RecursionError
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


def config_text(config: Mapping[str, Any]) -> str:
    """config.yaml of these settings, sealed."""
    text = yaml.safe_dump(dict(config), sort_keys=False)
    return f"{_SEAL}{sha256(text.encode())}\n{text}"


def read_config(run: Path) -> dict[str, Any]:
    """The settings of a run. Raises RunError if there are none, or they are damaged."""
    file = run / "config.yaml"
    try:
        text = file.read_bytes().decode()
        first, _, rest = text.partition("\n")
        if first.startswith(_SEAL) and first != _SEAL + sha256(rest.encode()):
            raise damaged(file)
        config = yaml.load(text, ShallowLoader)
    except FileNotFoundError:
        raise RunError(
            f"{run} is not a run directory: it has no config.yaml",
            "Give the --out of train-teacher or train-student.",
        ) from None
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise damaged(file) from error
    if not isinstance(config, dict):
        raise damaged(file)
    return config


def summary_text(summary: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """summary.json, sealed. digests: sha256 of other files, by name."""
    own = {"summary.json": _digest_of(summary)}
    return json.dumps({**summary, _DIGESTS: {**digests, **own}}, indent=2) + "\n"


def read_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run, None of another. Raises RunError if it is damaged."""
    found = _read_summary(run)
    return None if found is None else found[0]


def check_file(run: Path, name: str) -> None:
    """Raise RunError if a file of a finished run is missing, or not what its summary says."""
    _, digests = _read_summary(run) or ({}, {})
    if name not in digests:
        return
    try:
        with (run / name).open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == digests[name]
    except OSError as error:
        raise RunError(f"cannot read {run / name}: {error.strerror}") from error
    if not same:
        raise damaged(run / name)


def _read_summary(run: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The summary, and the digests that lie with it."""
    file = run / "summary.json"
    try:
        summary = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise damaged(file) from error
    if not isinstance(summary, dict):
        raise damaged(file)
    digests = summary.pop(_DIGESTS, None)
    if digests is None:
        return summary, {}
    if not isinstance(digests, dict) or digests.get(file.name) != _digest_of(summary):
        raise damaged(file)
    return summary, digests


def damaged(file: Path) -> RunError:
    """The error of a file whose bytes are not those that were written."""
    return RunError(
        f"{file} is damaged, or was changed since the run wrote it",
        "Put the file back from a copy, or train the run again with --overwrite.",
    )


def _digest_of(summary: Mapping[str, Any]) -> str:
    return sha256(json.dumps(summary).encode())
