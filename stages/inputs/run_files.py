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

from stages.errors import RunError, refusals

try:  # a tenth of the time, where PyYAML was built with libyaml
    from yaml import CSafeDumper, CSafeLoader
except ImportError:
    from yaml import SafeDumper as CSafeDumper  # type: ignore[assignment]
    from yaml import SafeLoader as CSafeLoader  # type: ignore[assignment]

MOST_DEEP = 50
"""Of collections in one another in a YAML file: no configuration has as many."""
_SEAL = "# sha256 of what follows: "
_DIGESTS = "digests"


def sha256(content: bytes) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()


class FastLoader(CSafeLoader):
    """As PyYAML's SafeLoader."""


def check_depth(text: str) -> None:
    """Raise RecursionError for YAML that is nested deeper than MOST_DEEP: to load it would take
    seconds, or the whole stack.
    """
    depth = 0
    for event in yaml.parse(text, FastLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEEP:
            raise RecursionError


def yaml_text(values: Mapping[str, Any]) -> str:
    """These values as YAML, in their order."""
    text: str = yaml.dump(dict(values), Dumper=CSafeDumper, sort_keys=False)
    return text


def config_text(config: Mapping[str, Any]) -> str:
    """config.yaml of these settings, sealed."""
    text = yaml_text(config)
    return f"{_SEAL}{sha256(text.encode())}\n{text}"


def read_config(run: Path) -> dict[str, Any]:
    """The settings of a run. Raises RunError if there are none, or they are damaged."""
    file = run / "config.yaml"
    try:
        text = file.read_bytes().decode()
        first, _, rest = text.partition("\n")
        if first.startswith(_SEAL) and first != _SEAL + sha256(rest.encode()):
            raise damaged(file)
        check_depth(text)
        config = yaml.load(text, FastLoader)
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
    with refusals(RunError, f"cannot read {run / name}"), (run / name).open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == digests[name]
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
