"""A run directory: what a training run leaves behind.

config.yaml         the resolved configuration, and the model's architecture and normalisation
metrics.jsonl       one line an epoch
summary.json        last and best epoch, written at the end
last.pt             everything needed to go on; replaced whole, never half-written
model.safetensors   plain weights, nothing else
log.txt             what was said
tensorboard/        event files, where the configuration asks for them
"""

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import nn

from stages.cache.identity import differences
from stages.cache.location import cache_around
from stages.errors import RunError
from stages.training.events import EventFiles


class RunDirectory:
    """Files of one run. Make it with `prepare`."""

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        self.path = path
        self._events = EventFiles(path / "tensorboard") if tensorboard else None

    @staticmethod
    def prepare(
        path: str | Path, config: Mapping[str, Any], resume: bool = False, overwrite: bool = False
    ) -> "RunDirectory":
        """A directory ready to be written, holding config.yaml.

        Raises RunError if it is not empty and neither `resume` nor `overwrite` is given, or if a
        run with another configuration is to be resumed.
        """
        if re.match(r"[A-Za-z0-9]{2,}:/", str(path)):
            raise RunError(f"runs lie on a disk, not at {path}", "Give a folder: --out runs/NAME.")
        run = RunDirectory(Path(path), bool(config.get("tensorboard")))
        if resume and overwrite:
            raise RunError("a run cannot be resumed and overwritten", "Give one of the two.")
        if (cache := cache_around(run.path)) is not None:
            raise RunError(f"{path} lies inside the cache {cache}", "Choose another --out.")
        occupied = run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir()))
        if occupied and not (resume or overwrite):
            raise RunError(
                f"{path} is not empty", "Go on with --resume, start again with --overwrite."
            )
        if occupied and not run._is_run():
            raise RunError(f"{path} holds something else than a run", "Choose another --out.")
        if occupied and resume:
            run._check_same(config)
        elif occupied:
            shutil.rmtree(run.path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make {path}: {error.strerror}", "Choose another --out."
            ) from error
        run._replace("config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
        return run

    @property
    def _config(self) -> Path:
        return self.path / "config.yaml"

    def _is_run(self) -> bool:
        """Whether the folder holds a run, and not somebody else's config.yaml."""
        try:
            config = yaml.safe_load(self._config.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return False
        return isinstance(config, dict) and config.get("kind") in ("teacher", "student")

    @property
    def config_text(self) -> str:
        """The resolved configuration, as config.yaml has it."""
        return self._config.read_text()

    def _check_same(self, config: Mapping[str, Any]) -> None:
        before = yaml.safe_load(self._config.read_text())
        now = json.loads(json.dumps(config))  # tuples become lists, as YAML has them
        for settings in (before, now):
            settings.pop("tensorboard", None)  # no weight depends on it
            settings.get("train", {}).pop("compile", None)  # nor, but for rounding, on this
        if differing := differences(now, before):
            raise RunError(
                f"{self.path} was started with other settings: {'; '.join(differing[:3])}",
                "Resume with the same command, or start again with --overwrite.",
            )

    def log(self, text: str) -> None:
        with (self.path / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace last.pt."""
        temporary = self.path / "last.pt.partial"
        torch.save(dict(state), temporary)
        os.replace(temporary, self.path / "last.pt")

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The state to go on from, None if there is none yet."""
        path = self.path / "last.pt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # whatever the bytes make an unpickler raise
            raise self._damaged("last.pt") from error
        return state

    def keep_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Drop what was written of epochs that will be run again; return the lines that stay."""
        history = self.metrics(epochs)
        lines = "".join(f"{json.dumps(line)}\n" for line in history)
        self._replace("metrics.jsonl", lines.encode())
        if self._events is not None:
            self._events.go_on(history)
        return history

    def metrics(self, epochs: int) -> list[dict[str, Any]]:
        """The lines of the first so many epochs. Raises RunError unless all of them are there."""
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            found = [json.loads(line) for line in lines[:epochs]]
        except (OSError, ValueError) as error:
            raise self._damaged("metrics.jsonl") from error
        if len(found) < epochs:
            raise self._damaged("metrics.jsonl")
        return found

    def _damaged(self, name: str) -> RunError:
        return RunError(
            f"{self.path / name} is cut off or damaged: the run cannot go on",
            "Delete the run, or start it again with --overwrite.",
        )

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self._events is not None:
            self._events.add(metrics)

    def save_model(self, module: nn.Module) -> None:
        """model.safetensors: the module's state dict; tied weights under each of their names."""
        state = {n: t.detach().cpu().contiguous().clone() for n, t in module.state_dict().items()}
        # save_file would make it readable by its owner only
        self._replace("model.safetensors", save(state))

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        self._replace("summary.json", json.dumps(summary, indent=2).encode() + b"\n")
        if self._events is not None:
            self._events.close()

    def _replace(self, name: str, content: bytes) -> None:
        temporary = self.path / f"{name}.partial"
        temporary.write_bytes(content)
        os.replace(temporary, self.path / name)
