"""TensorBoard's event files beside metrics.jsonl: the numbers of each epoch, by step = epoch.

    pipeline train-student ... --tensorboard --out runs/kd && tensorboard --logdir runs

An event file only grows, so epochs that are run again after a kill are told to TensorBoard as void
(purge_step) instead of being cut off.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.errors import RunError


class EventFiles:
    """Event files in a folder, opened with the first epoch. Raises RunError without tensorboard."""

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
