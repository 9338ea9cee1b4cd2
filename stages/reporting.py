"""Messages and progress of a stage: `pipeline/console.py` shows them, a library call is silent."""

from collections.abc import Sequence
from typing import Protocol


class Reporter(Protocol):
    """Receives the messages of a stage."""

    def say(self, text: str) -> None:
        """One line."""

    def progress(self, task: str, done: float, total: float, unit: str) -> None:
        """How far a task is, in units (a plural: samples); called often, shown now and then."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A small table."""


class Silent:
    """A reporter that says nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def progress(self, task: str, done: float, total: float, unit: str) -> None:
        """Nothing."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Nothing."""
