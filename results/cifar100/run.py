"""Train the students of students.yaml, three seeds each, and write one table.

    python results/cifar100/run.py --cache cifar100.zarr --teacher runs/teacher --data DIR

DIR holds CIFAR-100 as an image folder (train/<class>/*, test/<class>/*). Runs that have finished
are kept, so that the command may be stopped and given again. The student with the live teacher is
the control: the same trainer and the same views, with the teacher evaluated on every batch.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from torch import Tensor

from pipeline.config import read_config
from pipeline.console import Console
from stages.cache.targets import Targets
from stages.cache_teacher import CacheJob, prepare
from stages.data import Splits, load_data
from stages.device import forward
from stages.inputs.feed import Batch
from stages.settings import CacheConfig, DataSettings, StudentConfig, TeacherSettings
from stages.train_student import student_trainer
from stages.training.cached_task import CachedTask
from stages.training.run_directory import RunDirectory

HERE = Path(__file__).parent


class LiveTask:
    """The objective of a cached task, with the teacher evaluated on the batch at hand."""

    def __init__(self, cached: CachedTask, job: CacheJob, labels: Tensor) -> None:
        self._cached, self._job, self._labels = cached, job, labels

    learned = None

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        return self._cached.start_epoch(epoch)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        job = self._job
        with torch.no_grad():
            live = forward(job.model.module, job.normalise(batch.pixels), job.config.dtype)
        self._cached.targets = LiveTargets(live, self._labels[batch.samples])
        return self._cached.loss_parts(logits, batch)

    def epoch_metrics(self) -> dict[str, float]:
        return self._cached.epoch_metrics()


@dataclass(frozen=True)
class LiveTargets(Targets):
    """The teacher's logits (B, C) and the labels (B,) of one batch, asked like cached ones."""

    logits: Tensor
    labels: Tensor

    def of(self, samples: Tensor, rectified: bool = False, calibrated: bool = False) -> "LiveRows":
        if rectified or calibrated:
            raise NotImplementedError("the control is plain KD")
        return LiveRows(self.logits, self.labels)


@dataclass(frozen=True)
class LiveRows:
    """As `LiveTargets`, once it was asked; see `TargetRows`."""

    logits: Tensor
    labels: Tensor
    tempered = False

    def at(self, temperature: float = 1.0) -> Tensor:
        return self.logits

    def kept(self) -> None:
        """All are."""

    def wrong(self) -> Tensor:
        return self.logits.argmax(1) != self.labels


@click.command()
@click.option("--cache", required=True)
@click.option("--teacher", required=True, help="Its run directory, for the live control.")
@click.option("--data", required=True, help="The image folder.")
@click.option("--runs", default="runs/cifar100", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=0, help="CPU threads; all if 0.")
@click.option("--only", default="", help="Only students whose name contains this.")
def main(
    cache: str, teacher: str, data: str, runs: str, seeds: int, threads: int, only: str
) -> None:
    """Train every student of students.yaml that has not finished, then write table.md."""
    if threads:
        torch.set_num_threads(threads)
    changes: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "students.yaml").read_text())
    splits, console = load_data(DataSettings(dataset=f"folder:{data}")), Console()
    for seed in range(seeds):
        for name, change in changes.items():
            out = Path(runs) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if (out / "summary.json").exists() or only not in name:
                continue
            console.say(f"== {name}, seed {seed}")
            flags = {"cache": cache, "data.dataset": f"folder:{data}", **change}
            flags |= {"seed.data": seed, "seed.init": seed}
            live = flags.pop("live", False)
            config = read_config(StudentConfig, str(HERE / "base.yaml"), flags, [])
            train(config, out, splits, console, teacher if live else None)
    write_table(Path(runs), list(changes))


def train(
    config: StudentConfig, out: Path, splits: Splits, console: Console, live: str | None
) -> None:
    """One student; with the live teacher where its run directory is given."""
    trainer = student_trainer([config], [RunDirectory(out, overwrite=True)], splits, console)
    if live is not None:
        assert isinstance(trainer.learner.task, CachedTask)
        given = TeacherSettings(weights=live)
        job = prepare(
            CacheConfig(data=config.data, teacher=given, views=1, dtype="bfloat16"), splits
        )
        trainer.learner.task = LiveTask(trainer.learner.task, job, trainer.stream.labels)
    trainer.fit()


def write_table(runs: Path, names: list[str]) -> None:
    """table.md and results.jsonl: mean and standard deviation over seeds."""
    lines = [
        "| student | test top-1, last epoch | best epoch | n |",
        "|---|---|---|---|",
    ]
    results = []
    for name in names:
        found = sorted(runs.glob(f"{name.replace(', ', '-').replace(' ', '-')}-?"))
        summaries = [json.loads((f / "summary.json").read_text()) for f in found]
        results += [
            {"student": name, "run": f.name, **s} for f, s in zip(found, summaries, strict=True)
        ]
        last, best = ([s[k]["test_top1"] for s in summaries] for k in ("last", "best"))
        lines.append(f"| {name} | {spread(last)} | {spread(best)} | {len(found)} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    (HERE / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    mean = f"{statistics.mean(values):.2%}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) * 100:.2f}"


if __name__ == "__main__":
    main()
