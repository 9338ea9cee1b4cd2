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
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from stages.cache.lock import Hold
from stages.distributed import ALONE, Ranks, first_rank_does
from stages.errors import RunError
from stages.files import replace_file
from stages.inputs.run_files import config_text, damaged, sha256, summary_text
from stages.training.run_folder import claim, digest_of_settings, remove_run, unreadable

_TRAILER = b"\nsha256 "


class RunDirectory:
    """Files of one run. Nothing is looked at before `prepare`, and nothing written before `begin`.

    goes_on: whether there is a run to go on with. kept_epochs: how many finished ones last.pt has.
    """

    def __init__(self, path: str | Path, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self._resume, self._overwrite = Path(path), resume, overwrite
        self.goes_on, self.kept_epochs = False, 0
        self.config_text = self._settings = ""
        self._events: EventFiles | None = None
        self._hold: Hold | None = None
        self._lines: list[str] = []
        self._weights: str | None = None

    def prepare(self, config: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        """Hold the folder for a run of this configuration; the first of several ranks does.

        Raises RunError where it may not be written, see `claim`, or without tensorboard where
        event files are wanted.
        """
        self.config_text, self._settings = config_text(config), digest_of_settings(config)

        def hold() -> bool:
            if config.get("tensorboard"):
                self._events = EventFiles(self.path / "tensorboard")
            self._hold, goes_on = claim(self.path, config, self._resume, self._overwrite)
            return goes_on

        self.goes_on = first_rank_does(ranks, hold)

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
            raise unreadable(file, error) from error
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

    def save_weights(self, state: Mapping[str, Tensor]) -> None:
        """model.safetensors: a module's state dict; tied weights under each of their names."""
        # save_file would make it readable by its owner only
        content = save({n: t.detach().cpu().contiguous().clone() for n, t in state.items()})
        with self._writing():
            replace_file(self.path / "model.safetensors", content)
        self._weights = sha256(content)

    def mend_weights(self, state: Mapping[str, Tensor]) -> None:
        """Write the weights of the last epoch again unless model.safetensors holds them."""
        file = self.path / "model.safetensors"
        if not file.is_file() or sha256(file.read_bytes()) != self._weights:
            self.save_weights(state)

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


class EventFiles:
    """TensorBoard's event files beside metrics.jsonl: the numbers of each epoch, by step = epoch.

    They are opened with the first epoch, and only grow: epochs that are run again after a kill are
    declared void (purge_step) instead of being cut off. Raises RunError without tensorboard.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunError(
                "--tensorboard needs tensorboard",
                "Install it: pip install 'teacher-cache[tensorboard]'.",
            ) from error
        self._make, self._folder = SummaryWriter, folder
        self._writer: SummaryWriter | None = None
        self._history: Sequence[Mapping[str, Any]] = ()

    def go_on(self, history: Sequence[Mapping[str, Any]]) -> None:
        """The epochs that stay; what the files have of later ones is void."""
        self.close()
        self._history = tuple(history)  # the caller goes on appending

    def add(self, metrics: Mapping[str, Any]) -> None:
        """The numbers of one epoch, readable at once."""
        if self._writer is None:
            late = not self._folder.exists()  # asked for when the run was resumed
            self._writer = self._make(str(self._folder), purge_step=len(self._history))
            for before in self._history if late else ():
                self._write(before)
        self._write(metrics)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _write(self, metrics: Mapping[str, Any]) -> None:
        assert self._writer is not None
        for name, value in metrics.items():
            if name != "epoch" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, int(metrics["epoch"]))
