"""Which folder a run may write to: one writer at a time, and only a run's own files."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.cache.lock import Hold
from stages.cache.storage import cache_around
from stages.errors import RunError
from stages.inputs.run_files import read_config
from stages.training.same_run import check_same

FILES = (
    *("last.pt", "summary.json", "metrics.jsonl", "model.safetensors", "log.txt"),
    "config.yaml",  # last: what is removed half-way is still known as a run
)
_LITTER = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+")
_EVENTS = re.compile(r"events\.out\.tfevents\..+")


def claim(
    path: Path, config: Mapping[str, Any], resume: bool, overwrite: bool
) -> tuple[Hold, bool]:
    """Hold a folder for a run; also whether there is a run that it goes on with.

    Raises RunError if somebody else holds it, if it is not empty and neither `resume` nor
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
    """Make a run's folder and hold it. Raises RunError if somebody else does."""
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
    """Whether the folder holds a run, and not somebody else's config.yaml."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_bytes().decode())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and config.get("kind") in ("teacher", "student")


def unreadable(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot read {path}: {error.strerror or error}", "Make it readable.")
