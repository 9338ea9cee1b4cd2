"""A student's whole step as one CUDA graph: forward, targets, loss, backward and optimiser.

It pays where a model is small and a step spends its time starting kernels. What changes from step
to step lies on the device: the batch, which another graph makes (`stages.inputs.planned`), the
targets of the epoch, the weights of the loss, and the learning rate, read from a table.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from stages.errors import ConfigError
from stages.inputs.feed import Batch
from stages.training.graphs import TRIES, Graph, WaitError
from stages.training.optimise import read_rate_from
from stages.training.stream import BatchStream
from stages.training.task import Task, TaskInPlace


def check_capture(device: torch.device) -> None:
    """Raise ConfigError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise ConfigError(
            f"--capture records CUDA graphs, the device is {device.type}", "Leave --capture out."
        )


class CapturedStep:
    """Steps on the batch that lies in one place, recorded at the first of them; `learn` does others
    one operation at a time.

    Without a GPU nothing is recorded, and the same functions are called. watched: see `Graph`.
    """

    def __init__(
        self,
        learn: Callable[[Batch], None],
        optimizer: Optimizer,
        changed: Callable[[], Mapping[Hashable, Tensor]],
        stream: BatchStream,
        watched: bool,
    ) -> None:
        """learn: a step at the optimiser's rate. changed: every tensor that it changes."""
        self._learn, self._optimizer, self._step_changes = learn, optimizer, changed
        self._device, self._watched = stream.device, watched
        device, steps = stream.device, stream.steps
        self._rates = torch.zeros(steps + TRIES, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._rate = torch.zeros(1, device=device)
        self._batch: Batch | None = None
        self._graph: Graph | None = None

    def start_epoch(self, rates: Sequence[float]) -> None:
        """rates: of the steps to come, at most those of an epoch."""
        self._rates[: len(rates)] = torch.tensor(rates)
        self._at.zero_()
        read_rate_from(self._optimizer, self._rate.view(()))

    def learn(self, batch: Batch) -> None:
        """A step, one operation at a time, at the next rate of the table."""
        torch.index_select(self._rates, 0, self._at, out=self._rate)
        self._at.add_(1)
        self._learn(batch)

    def __call__(self, batch: Batch, beside: bool = False) -> None:
        """A step on the batch in its place. beside: as one of several students, each on a stream of
        its own; then `join`.

        Raises WaitError where the step cannot be recorded; nothing has changed then.
        """
        graph = self._graph
        if graph is None or batch is not self._batch:
            graph = Graph(lambda: self.learn(batch), self._changes, self._device, self._watched)
            graph.record(alone=not beside)
            self._graph, self._batch = graph, batch
        if beside:
            graph.beside()
        else:
            graph()

    def join(self) -> None:
        """What is queued from now on comes after the step."""
        if self._graph is not None:
            self._graph.join()

    def _changes(self) -> Mapping[Hashable, Tensor]:
        return {**self._step_changes(), "at": self._at, "rate": self._rate}


class Capture:
    """Whether a learner's steps are recorded; where they cannot be, it is said why, and steps are
    done one operation at a time.
    """

    def __init__(
        self, step: CapturedStep, task: Task, stream: BatchStream, scaled: bool = False
    ) -> None:
        """scaled: whether gradients are, as in float16."""
        self._step, self._task, self._stream, self._scaled = step, task, stream, scaled
        self._state: Literal["new", "on", "off"] = "new"

    def start_epoch(self, rates: Sequence[float], views: int) -> str | None:
        """Before the steps of an epoch, whose targets are read. Returns why none is recorded from
        now on, once. rates: of the steps to come.
        """
        if self._state == "new":
            reason = self._obstacle() or self._stream.keep_in_place(views) or self._task_in_place()
            self._state = "off" if reason else "on"
            if reason:
                return reason
        if self._state == "on":
            self._step.start_epoch(rates)
        return None

    def _obstacle(self) -> str | None:
        """Why steps cannot be recorded, whatever the batches are."""
        if self._stream.ranks.world > 1:
            return "several processes add up their gradients"
        if self._scaled:
            return "float16 scales its gradients on the host; use bfloat16"
        if self._stream.rounds.per_decode > 1:
            return "several views of an image are shown from one decode"
        return None

    def _task_in_place(self) -> str | None:
        if not isinstance(self._task, TaskInPlace):
            return "the task does not say that they can be"
        return self._task.keep_in_place()

    def step(self, batch: Batch, beside: bool) -> bool:
        """Whether it did the step. Raises WaitError where the step cannot be recorded: nothing has
        changed then, and it does no more.
        """
        if self._state != "on":
            return False
        if batch is not self._stream.batch_in_place:
            self._step.learn(batch)
            return True
        try:
            self._step(batch, beside)
        except WaitError:
            self._state = "off"
            raise
        return True

    def join(self) -> None:
        """What is queued from now on comes after the step."""
        if self._state == "on":
            self._step.join()
