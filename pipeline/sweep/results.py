"""results.jsonl: what came of every run that has ended."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pipeline.sweep.grid import Run
from stages.training.history import Summary


@dataclass(frozen=True)
class Result:
    """A run that has ended: with a summary, or with an error."""

    run: Run
    teacher_top1: float | None
    summary: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def last(self) -> float:
        """Test top-1 of the last epoch, in [0, 1]; of a run that is done."""
        return self._top1("last")

    @property
    def best(self) -> float:
        """Test top-1 of the best epoch, in [0, 1]; of a run that is done."""
        return self._top1("best")

    @property
    def seconds(self) -> float:
        """What an epoch took, without the first, which warms up; of a run that is done."""
        assert self.summary is not None
        return msgspec.convert(self.summary, Summary).seconds_an_epoch

    def _top1(self, epoch: str) -> float:
        assert self.summary is not None
        return float(self.summary[epoch]["test_top1"])

    def line(self) -> dict[str, Any]:
        """Its line of results.jsonl."""
        config = self.run.config
        return {
            "name": self.run.name,
            "label": self.run.label,
            "keys": dict(self.run.keys),
            "seed": config.seed.init,
            "status": "failed" if self.summary is None else "done",
            "error": self.error,
            "cache": config.cache,
            "dataset": config.data.dataset,
            "teacher_top1": self.teacher_top1,
            "summary": self.summary,
        }


def as_lines(results: Sequence[Result]) -> str:
    """The whole of results.jsonl."""
    return "".join(json.dumps(result.line()) + "\n" for result in results)
