"""A run directory: what a training run leaves behind.

config.yaml         the resolved configuration, and the model's architecture and normalisation
metrics.jsonl       one line an epoch
summary.json        last and best epoch, written at the end
last.pt             everything needed to go on, and its sha256; replaced whole, never half-written
model.safetensors   plain weights, nothing else
log.txt             what was said
tensorboard/        event files, where the configuration asks for them

One process writes to it at a time: it holds the folder from `prepare` to `release`.
"""

import contextlib
import io
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import nn

from stages.cache.lock import Hold
from stages.cache.storage import cache_around
from stages.errors import RunError
from stages.files import replace_file
from stages.inputs.run_files import (
    config_text,
    damaged,
    read_config,
    sha256,
    summary_text,
)
from stages.training.events import EventFiles
from stages.training.same_run import check_same, digest_of_settings

FILES = (
    *("last.pt", "summary.json", "metrics.jsonl", "model.safetensors", "log.txt"),
    "config.yaml",  # last: what is removed half-way is still known as a run
)
_LITTER = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+")
_EVENTS = re.compile(r"events\.out\.tfevents\..+")
_TRAILER = b"\nsha256 "


class RunDirectory:
    """Files of one run. Make it with `prepare`.

    goes_on: whether there is a run to go on with. kept_epochs: how many finished ones last.pt has.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], goes_on: bool = False, events: bool = False
    ) -> None:
        self.path, self.goes_on, self.kept_epochs = path, goes_on, 0
        self.config_text = config_text(config)
        self._settings = digest_of_settings(config)
        self._events = EventFiles(path / "tensorboard") if events else None
        self._hold: Hold | None = None
        self._lines: list[str] = []
        self._weights: str | None = None

    @staticmethod
    def prepare(
        path: str | Path, config: Mapping[str, Any], resume: bool = False, overwrite: bool = False
    ) -> "RunDirectory":
        """A directory that is held, and may be written: nothing is before `begin`.

        Raises RunError if somebody else holds it, if it is not empty and neither `resume` nor
        `overwrite` is given, if another run is to be resumed, or if anything but the files of a run
        would have to be removed.
        """
        path = Path(path)
        if re.match(r"[A-Za-z0-9]{2,}:/", str(path)):
            raise RunError(f"runs lie on a disk, not at {path}", "Give a folder: --out runs/NAME.")
        if resume and overwrite:
            raise RunError("a run cannot be resumed and overwritten", "Give one of the two.")
        if (cache := cache_around(path)) is not None:
            raise RunError(f"{path} lies inside the cache {cache}", "Choose another --out.")
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} holds something else than a run", "Choose another --out.")
        run = RunDirectory(path, config, events=bool(config.get("tensorboard")))
        run._hold = held(path)
        try:
            occupied = any(not _is_left_over(file) for file in path.iterdir())
            if occupied:
                _check_occupied(path, config, resume, overwrite)
        except BaseException as error:
            run.release()
            if isinstance(error, OSError):
                raise _unusable(path, error) from error
            raise
        run.goes_on = occupied and resume
        return run

    def begin(self, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Remove what is to be replaced, and write config.yaml and the metrics that stay."""
        with self._writing():
            if not self.goes_on:
                remove_run(self.path)
            replace_file(self.path / "config.yaml", self.config_text.encode())
            self._lines = [json.dumps(line) + "\n" for line in history]
            replace_file(self.path / "metrics.jsonl", "".join(self._lines).encode())
            (self.path / "summary.json").unlink(missing_ok=True)
            if self._events is not None:
                self._events.go_on(history)

    def release(self) -> None:
        """Let others write to it."""
        if self._hold is not None:
            self._hold.release()
        if self._events is not None:
            self._events.close()

    def log(self, text: str) -> None:
        with self._writing(), (self.path / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    # ---- the checkpoint -----------------------------------------------------------------

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace last.pt."""
        buffer = io.BytesIO()
        torch.save({**state, "settings": self._settings, "weights": self._weights}, buffer)
        content = buffer.getvalue()
        with self._writing():
            parts = [content, _TRAILER, sha256(content).encode(), b"\n"]
            replace_file(self.path / "last.pt", parts)

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The state to go on from, None if there is none yet. Raises RunError if it is damaged, or
        another run's.
        """
        file = self.path / "last.pt"
        if not self.goes_on or not file.exists():
            return None
        try:
            content = file.read_bytes()
            state, seal = content[: -len(_TRAILER) - 65], content[-len(_TRAILER) - 65 :]
            if seal != _TRAILER + sha256(state).encode() + b"\n":
                raise damaged(file)
            found: dict[str, Any] = torch.load(
                io.BytesIO(state), map_location=device, weights_only=True
            )
            settings, self._weights = found.pop("settings"), found.pop("weights")
        except OSError as error:
            raise _unusable(file, error) from error
        except RunError:
            raise
        except Exception as error:  # whatever such bytes make an unpickler raise
            raise damaged(file) from error
        if settings != self._settings:
            raise self.does_not_fit("it was written by a run with other settings")
        return found

    def does_not_fit(self, why: str) -> RunError:
        """The error of a checkpoint that is whole and not of this run."""
        return RunError(
            f"{self.path / 'last.pt'} does not fit this run: {why}",
            "Put this run's own last.pt back, or start again with --overwrite.",
        )

    # ---- what came of it ----------------------------------------------------------------

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(metrics) + "\n")
        with self._writing(), (self.path / "metrics.jsonl").open("a") as file:
            file.write(self._lines[-1])
        if self._events is not None:
            with self._writing():
                self._events.add(metrics)

    def save_model(self, module: nn.Module) -> None:
        """model.safetensors: the module's state dict; tied weights under each of their names."""
        # save_file would make it readable by its owner only
        content = _plain_weights(module)
        with self._writing():
            replace_file(self.path / "model.safetensors", content)
        self._weights = sha256(content)

    def mend_model(self, module: nn.Module) -> None:
        """Write the weights of the last epoch again unless model.safetensors holds them."""
        file = self.path / "model.safetensors"
        if not file.is_file() or sha256(file.read_bytes()) != self._weights:
            self.save_model(module)

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json, with the sha256 of settings, metrics and weights."""
        digests = {
            "config.yaml": sha256(self.config_text.encode()),
            "metrics.jsonl": sha256("".join(self._lines).encode()),
        }
        if self._weights is not None:
            digests["model.safetensors"] = self._weights
        with self._writing():
            replace_file(self.path / "summary.json", summary_text(summary, digests).encode())

    # ---- writing ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What the disk refuses becomes a RunError that says what is kept."""
        try:
            yield
        except OSError as error:
            kept = (
                f"Epochs up to {self.kept_epochs} are kept"
                if self.kept_epochs
                else "No epoch is finished"
            )
            raise RunError(
                f"{self.path} cannot be written: {error.strerror or error}",
                f"{kept}: make room or make it writable, then give the same command with --resume.",
            ) from error


# ---- one writer, and only its own files -----------------------------------------------------


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


def _unusable(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot read {path}: {error.strerror or error}", "Make it readable.")


def _plain_weights(module: nn.Module) -> bytes:
    state = {n: t.detach().cpu().contiguous().clone() for n, t in module.state_dict().items()}
    return save(state)
