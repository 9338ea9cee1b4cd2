"""Which folder a run may write to: one writer at a time, only a run's own files, the same run.

What decides a run's weights makes it the same, not where things lie: where files lie is in its
configuration, what they are in the section `made_from` (digests), so that a run goes on after its
cache or its images have moved, and not with others of the same name.
"""

import contextlib
import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.cache.identity import differences
from stages.cache.lock import Hold
from stages.cache.storage import cache_around
from stages.errors import RunError
from stages.inputs.run_files import read_config, sha256
from stages.settings import BiasSettings, keys_deciding

FILES = (
    *("last.pt", "summary.json", "metrics.jsonl", "model.safetensors", "log.txt"),
    "config.yaml",  # last: what is removed half-way is still known as a run
)
_LITTER = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+")
_EVENTS = re.compile(r"events\.out\.tfevents\..+")
MADE_FROM = "made_from"
"""The section of config.yaml with the digests of what a run was made from."""
_MADE_OF = {
    "caches": "other caches (the first, or those of --also)",
    "rectified": "another rectification",
    "calibration": "another calibration of the cache",
    "train_split": "other training images",
    "test_split": "other test images",
    "init": "other weights to start from",
}
_PLACES, _FREE = keys_deciding("contents", "place"), keys_deciding("nothing")


def claim(
    path: Path, config: Mapping[str, Any], resume: bool, overwrite: bool
) -> tuple[Hold, bool]:
    """Hold a folder for a run; also whether there is a run that it goes on with.

    Raises RunError if another process holds it, if it is not empty and neither `resume` nor
    `overwrite` is given, if another run is to be resumed, or if anything but the files of a run
    would have to be removed.
    """
    if re.match(r"[A-Za-z0-9]{2,}:/", str(path)):
        raise RunError(f"runs lie on a disk, not at {path}", "Give a folder: --out runs/NAME.")
    if resume and overwrite:
        raise RunError("a run cannot be resumed and overwritten", "Give one of the two.")
    if (cache := cache_around(path)) is not None:
        raise RunError(f"{path} lies inside the cache {cache}", "Choose another --out.")
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} holds something else than a run", "Choose another --out.")
    hold = held(path)
    try:
        occupied = any(not _is_left_over(file) for file in path.iterdir())
        if occupied:
            _check_occupied(path, config, resume, overwrite)
    except BaseException as error:
        hold.release()
        if isinstance(error, OSError):
            raise unreadable(path, error) from error
        raise
    return hold, occupied and resume


def held(path: Path) -> Hold:
    """Make a run's folder and hold it. Raises RunError if another process does."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return Hold(path, if_possible=True)
    except BlockingIOError:
        raise RunError(
            f"another process is writing to {path}",
            "Wait for it or stop it, or choose another --out.",
        ) from None
    except OSError as error:
        raise RunError(f"cannot make {path}: {error.strerror}", "Choose another --out.") from error


def foreign_files(path: Path) -> list[str]:
    """What lies in a folder and is no file of a run: names, sorted."""
    return sorted(file.name for file in path.iterdir() if not _is_ours(file))


def remove_run(path: Path) -> None:
    """Remove the files of a run from its folder, and nothing else."""
    events = path / "tensorboard"
    if events.is_dir() and not events.is_symlink():
        for file in events.iterdir():
            if _EVENTS.fullmatch(file.name):
                file.unlink()
        with contextlib.suppress(OSError):  # something of the system's lies there
            events.rmdir()
    for name in FILES:
        (path / f"{name}.partial").unlink(missing_ok=True)
        (path / name).unlink(missing_ok=True)


def _is_ours(file: Path) -> bool:
    if _LITTER.fullmatch(file.name):
        return True
    if file.name == "tensorboard" and file.is_dir() and not file.is_symlink():
        return all(
            _LITTER.fullmatch(event.name) or (_EVENTS.fullmatch(event.name) and event.is_file())
            for event in file.iterdir()
        )
    return file.name.removesuffix(".partial") in FILES and not file.is_dir()


def _is_left_over(file: Path) -> bool:
    """Whether it does not make a folder occupied: of a kill at the very first step."""
    return bool(_LITTER.fullmatch(file.name)) or file.name == "config.yaml.partial"


def _check_occupied(path: Path, config: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    if not (resume or overwrite):
        raise RunError(f"{path} is not empty", "Go on with --resume, start again with --overwrite.")
    if not _is_run(path):
        raise RunError(f"{path} holds something else than a run", "Choose another --out.")
    if resume:
        check_same(path, config, read_config(path))
        return
    if foreign := foreign_files(path):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise RunError(
            f"{path} holds files that are not the run's: {', '.join(foreign[:3])}{more}",
            "Move them elsewhere, or choose another --out.",
        )
    init = (config.get("model") or {}).get("init")
    if init is not None and Path(init).resolve().is_relative_to(path.resolve()):
        raise RunError(
            f"the run that --overwrite removes holds the weights to start from, {init}",
            "Choose another --out.",
        )


def _is_run(path: Path) -> bool:
    """Whether the folder holds a run, and not just any config.yaml."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_bytes().decode())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and config.get("kind") in ("teacher", "student")


def unreadable(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot read {path}: {error.strerror or error}", "Make it readable.")


# ---- the same run -----------------------------------------------------------------------


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
    until = (settings.get("loss") or {}).get("until")
    if isinstance(until, float) and until < 1:
        return f"loss.until={until:g} is a share of all of them"
    if (settings.get("train") or {}).get("views_per_decode") is not None:
        return "the last round of train.views_per_decode ends with them"
    bias = BiasSettings(**settings.get("bias") or {})
    if bias.mode != "none" and bias.chosen_schedule != "constant":
        return f"the weights of bias.schedule={bias.chosen_schedule} are spread over all of them"
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
