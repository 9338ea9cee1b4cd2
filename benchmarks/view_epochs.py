"""Epochs of a student that is shown one view of a decoded image, against several."""

from pathlib import Path

import msgspec

from benchmarks.measure import Ratio, Report, in_turns, seconds
from stages.cache_teacher import cache_teacher
from stages.settings import ModelSettings, StudentConfig, TrainSettings
from stages.teacher.job import CacheJob
from stages.train_student import student_trainer
from stages.training.run_directory import RunDirectory
from stages.training.trainer import Trainer

PER_DECODE = 4


class Epochs:
    """Epochs of a student, `count` of them whenever it is called; answers with their seconds."""

    def __init__(self, trainer: Trainer, count: int) -> None:
        self.trainer, self._count = trainer, count
        self()  # the workers start

    def __call__(self) -> float:
        return seconds(self._train)

    def _train(self) -> None:
        stream, learner = self.trainer.stream, self.trainer.learner
        for _ in range(self._count):
            views, epoch = learner.start_epoch(), learner.position.epoch
            order, within = stream.epoch_order(epoch), stream.rounds.of(epoch)
            for batch in stream.batches(order, views, 0, within):
                learner.step(batch)
            learner.position.next_epoch()


def students(job: CacheJob, cache: Path, turns: int) -> dict[str, Epochs]:
    """Students of the same cache: shown one view of a decoded image, or several."""
    config = StudentConfig(
        cache=str(cache),
        data=job.config.data,
        model=ModelSettings(architecture=str(job.config.teacher.architecture)),
        device="cpu",
    )
    shown: dict[str, tuple[int | None, bool]] = {
        "one": (None, False),
        "several": (PER_DECODE, False),
        "in one batch": (PER_DECODE, True),
    }
    found = {}
    for name, (per_decode, in_one) in shown.items():
        train = TrainSettings(
            epochs=PER_DECODE * (turns + 1),
            batch_size=job.config.batch_size,
            lr=0.01,
            views_per_decode=per_decode,
            views_in_one_batch=in_one,
        )
        one = msgspec.structs.replace(config, train=train)
        run = RunDirectory(cache.parent / name.replace(" ", "-"))
        found[name] = Epochs(student_trainer([one], [run], job.splits), PER_DECODE)
    return found


def measure_epochs(report: Report, job: CacheJob, work: Path, turns: int) -> None:
    """Epochs of a student that is shown one view of each decoded image, against several."""
    cache_teacher(job, work / "cache.zarr")
    shown = students(job, work / "cache.zarr", turns)
    times = in_turns(shown, turns)
    for each in shown.values():
        each.trainer.close()
    for name, target in (("several", 2.5), ("in one batch", None)):
        where = ", in one batch" if name == "in one batch" else ""
        report.add(
            Ratio(
                name=f"student epochs, one view of a decoded image / {PER_DECODE}{where}",
                ours=times["one"],
                yardstick=times[name],
                target=target,
                at_least=True,
            )
        )
