"""Whether two configurations are of the same run: what decides its weights, not where things lie.

Where files lie is in the configuration, what they are in its section `made_from` (digests), so that
a run goes on after its cache or its images have moved, and not with others of the same name.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.cache.identity import differences
from stages.errors import RunError
from stages.inputs.run_files import sha256
from stages.settings import keys_deciding

MADE_FROM = "made_from"
"""The section of config.yaml with the digests of what a run was made from."""
_MADE_OF = {
    "caches": "other caches (the first, or those of --also)",
    "rectified": "another rectification",
    "train_split": "other training images",
    "test_split": "other test images",
    "init": "other weights to start from",
}
_PLACES, _FREE = keys_deciding("contents", "place"), keys_deciding("nothing")


def check_same(run: Path, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise RunError unless a run that was started with the settings `before` can go on with `now`:
    the same, or with another number of epochs where that changes nothing about those before.
    """
    ours, theirs = deciding(now), deciding(before)
    epochs = [_pop(settings, "train.epochs") for settings in (ours, theirs)]
    differing = [_in_words(difference) for difference in differences(ours, theirs)]
    if differing:
        raise RunError(
            f"{run} was started with other settings: {'; '.join(differing[:3])}",
            "Resume with the same command, or start again with --overwrite.",
        )
    if epochs[0] != epochs[1] and (why := _bound_to_epochs(theirs)):
        raise RunError(
            f"{run} was started for {epochs[1]} epochs and cannot have {epochs[0]}: {why}",
            f"Give --epochs {epochs[1]}, or start a new run, from its weights: --init {run}.",
        )


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the weights, as plain JSON values."""
    settings: dict[str, Any] = json.loads(json.dumps(copy.deepcopy(dict(config)), default=str))
    for key in (*_FREE, *(_PLACES if MADE_FROM in settings else ())):
        _pop(settings, key)
    return settings


def digest_of_settings(config: Mapping[str, Any]) -> str:
    """sha256 in hex of the settings that decide the weights, but for the number of epochs."""
    settings = deciding(config)
    _pop(settings, "train.epochs")
    return sha256(json.dumps(_without_none(settings), sort_keys=True).encode())


def _in_words(difference: str) -> str:
    """A difference as `differences` has it; of digests, what they are of."""
    key = difference.partition(":")[0].partition("[")[0].removeprefix(f"{MADE_FROM}.")
    return _MADE_OF.get(key, difference)


def _bound_to_epochs(settings: Mapping[str, Any]) -> str | None:
    """What is spread over all epochs, in words; None where nothing is."""
    schedule = settings["train"].get("schedule") if "train" in settings else None
    if schedule in ("cosine", "onecycle"):
        return f"the learning rate of train.schedule={schedule} is spread over all of them"
    bias = settings.get("bias") or {}
    mode = bias.get("mode", "none")
    chosen = bias.get("schedule") or ("cosine" if mode == "rectify" else "constant")
    if mode != "none" and chosen != "constant":
        return f"the weights of bias.schedule={chosen} are spread over all of them"
    return None


def _pop(settings: dict[str, Any], key: str) -> Any:
    *sections, name = key.split(".")
    for section in sections:
        inner = settings.get(section)
        if not isinstance(inner, dict):
            return None
        settings = inner
    return settings.pop(name, None)


def _without_none(settings: Any) -> Any:
    """A setting that is None is one that an earlier program did not have."""
    if not isinstance(settings, dict):
        return settings
    return {k: _without_none(v) for k, v in settings.items() if v is not None}
