"""What the bench measures is what it says: nothing here is timed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from damage import tree
from helpers import student_of
from torch import Tensor

from benchmarks import cases, epochs, teacher, training
from benchmarks.baselines import (
    FilePerSample,
    PicklePerImage,
    RecordsBySeek,
    augmented_one_by_one,
    rectified_row_by_row,
)
from benchmarks.epochs import TimedStudent, TimedTask
from benchmarks.excerpt import excerpt
from benchmarks.measure import Figure, Laps, Ratio, Report, in_turns
from benchmarks.own_cache import bench_cache
from benchmarks.rectifying import plain_pass, plainly_decoded
from benchmarks.suite import Suite, main, run_suite
from benchmarks.table import README, tables, write_table
from benchmarks.training import OnlineTask
from benchmarks.worlds import Plan
from pipeline.console import Console
from stages.cache import LogitCache
from stages.cache.encoding import ENCODINGS
from stages.cache.layout import BlockId
from stages.cache_teacher import CacheJob
from stages.errors import CacheError, ConfigError, IdentityError, ModelError, PipelineError
from stages.inputs.feed import Batch, ViewFeed
from stages.rectify import rectify_rows
from stages.settings import LossSettings, TrainSettings
from stages.training.objective import student_loss


@pytest.fixture(scope="module")
def hundred_classes() -> np.ndarray[Any, np.dtype[np.float32]]:
    generator = np.random.default_rng(0)
    return generator.normal(0, 3, (200, 100)).astype(np.float32)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on how long things are measured."""
    monkeypatch.setattr(teacher, "_LEAST_SECONDS", 0.01)
    monkeypatch.setattr(epochs, "_TRIED_BATCHES", 1)
    monkeypatch.setattr(training, "_LOSS_TURNS", 1)
    monkeypatch.setattr(cases, "_AUGMENTED", 50)
    monkeypatch.setattr(cases, "_LOOPED_ROWS", 50)


@pytest.mark.slow
def test_a_cache_is_measured_and_left_as_it_is(
    finished_cache: Path, teacher_run: Path, tmp_path: Path
) -> None:
    before, out = tree(finished_cache), tmp_path / "report.json"
    arguments = ["--cache", str(finished_cache), "--dataset", "digits", "--student", "resnet8"]
    arguments += ["--weights", str(teacher_run), "--device", "cpu", "--turns", "2"]
    result = CliRunner().invoke(
        main, [*arguments, "--seconds", "0.02", "--out", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    report = msgspec.json.decode(out.read_bytes(), type=Report)
    assert {ratio.name for ratio in report.ratios} == {
        "slab, float32 / np.load of the raw array",
        "slab, float32 / memcpy",
        "a view read and hashed, float32 / read by Zarr alone",
        "rectify / plain NumPy pass",
        "resnet8: cached epoch / hard-label epoch",
        "resnet8: online epoch / cached epoch",
        "resnet8: online / cached, of the ideal (student + teacher forward) / student",
    }
    assert all(len(ratio.ours) == 2 and min(ratio.ours) > 0 for ratio in report.ratios)
    assert report.missing == []
    assert report.machine["device"]
    assert report.settings["cache"] == str(finished_cache)
    assert "resnet8: cached epoch / hard-label epoch" in result.output
    assert tree(finished_cache) == before


def test_what_is_missing_is_named(tiny_cache: Path) -> None:
    report = bench_cache(Console(), cache=str(tiny_cache), turns=1, device="cpu")
    assert len(report.ratios) == 4
    message = " ".join(report.missing)
    assert all(flag in message for flag in ("--dataset", "--student", "--weights"))


def other_digits(split: str) -> list[tuple[Tensor, int]]:
    """As many images as the digits, and other ones."""
    size = 1_000 if split == "train" else 100
    return [(torch.full((1, 8, 8), n % 256, dtype=torch.uint8), n % 10) for n in range(size)]


@pytest.mark.parametrize(
    ("given", "kind", "named"),
    [
        ({"students": ("resnet8",)}, ConfigError, "--dataset"),
        ({"dataset": "digits", "weights": "run"}, ConfigError, "--student"),
        ({"turns": 0}, ConfigError, "--turns"),
        ({"dataset": "digits", "students": ("resnet8", "resnett")}, ModelError, "resnett"),
        ({"out": "/dev/full/x.json"}, ConfigError, "no folder"),
        ({"out": "report.txt"}, ConfigError, "--out"),
        ({"out": "CACHE/a.json"}, ConfigError, "inside the cache"),
        ({"dataset": "test_benchmarks:other_digits", "students": ("vgg8",)}, IdentityError, "data"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(
    given: dict[str, Any], kind: type[PipelineError], named: str, finished_cache: Path
) -> None:
    if "out" in given:
        given = {"out": given["out"].replace("CACHE", str(finished_cache))}
    with pytest.raises(kind, match=named):
        bench_cache(Console(), **{"cache": str(finished_cache), "device": "cpu", **given})


def test_a_damaged_cache_is_told_before_a_student_is_trained(cache_copy: Path) -> None:
    (cache_copy / "prediction/c/2/0").unlink()
    with pytest.raises(CacheError, match="prediction/c/2/0 is missing"):
        bench_cache(
            Console(), cache=str(cache_copy), dataset="digits", students=("resnet8",), device="cpu"
        )


def test_an_empty_cache_is_refused(tiny_copy: Path) -> None:
    cache = LogitCache.open(tiny_copy, writable=True)
    for view in (0, 1):
        cache.commits.forget(BlockId(view, 0))
    with pytest.raises(CacheError, match="no complete view"):
        bench_cache(Console(), cache=str(tiny_copy))


def test_another_one_goes_first_in_every_turn() -> None:
    called: list[str] = []

    def work(name: str) -> Callable[[], float]:
        return lambda: called.append(name) or float(len(called))  # type: ignore[func-returns-value]

    times = in_turns({name: work(name) for name in "abc"}, 4)
    assert "".join(called) == "abcbcacababc"
    assert times == {"a": (1, 6, 8, 10), "b": (2, 4, 9, 11), "c": (3, 5, 7, 12)}


class StubTrainer:
    """A millisecond a sample, and half a second of waiting in every epoch."""

    def __init__(self) -> None:
        self.settings = TrainSettings(batch_size=10)
        self.stream = SimpleNamespace(samples=torch.arange(1_000), evaluations={})
        self.learners = [SimpleNamespace(position=SimpleNamespace(epoch=0), history=[])]

    def fit_all(self) -> None:
        (learner,) = self.learners
        for _ in range(learner.position.epoch, self.settings.epochs):
            seconds = len(self.stream.samples) / 1_000 + 0.5
            learner.history.append({"seconds": seconds, "wait_seconds": 0.5})
        learner.position.epoch = self.settings.epochs


@pytest.mark.parametrize("most_seconds", [0.2, 0.75, 100.0])
def test_a_cut_epoch_is_scaled_without_its_waiting(most_seconds: float) -> None:
    trainer: Any = StubTrainer()
    student = TimedStudent(trainer, most_seconds)
    assert student() == pytest.approx(1.5)
    assert student.waiting == pytest.approx(1 / 3)
    assert (len(trainer.stream.samples) < 1_000) == (most_seconds < 1.5)
    assert ("scaled" in student.shown) == student.cut == (most_seconds < 1.5)
    student.added = 0.25
    assert student() == pytest.approx(1.75)
    other = TimedStudent(StubTrainer(), 100.0, like=student)  # type: ignore[arg-type]
    assert other.shown == student.shown


class StubTask:
    """The mean of the logits, times three; and how often it was asked."""

    learned, asked = None, 0

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        return (epoch,)

    def loss_parts(self, logits: Tensor, batch: Any) -> dict[str, Tensor]:
        self.asked += 1
        return {"loss": 3 * logits.mean()}

    def epoch_metrics(self) -> dict[str, float]:
        return {"asked": self.asked}


def test_a_timed_loss_gives_the_gradients_of_the_loss() -> None:
    """To what lies before the logits as well."""
    weight, batch = torch.ones(5, requires_grad=True), Batch(torch.arange(5), torch.empty(5))
    task = TimedTask(StubTask(), torch.device("cpu"))
    assert task.start_epoch(4) == (4,)
    task.loss_parts(2 * weight, batch)["loss"].backward()
    torch.testing.assert_close(weight.grad, torch.full((5,), 6 / 5))
    assert task.epoch_metrics() == {"asked": 1}
    assert len(task.laps.take()) == 1
    assert task.laps.take() == []


def test_the_online_student_learns_what_the_cached_one_does(
    tiny_job: CacheJob, tiny_cache: Path
) -> None:
    """Against the KD formula by hand, on rows of a float32 cache."""
    cache, settings = LogitCache.open(tiny_cache), student_loss(LossSettings(name="kd")).settings
    train, laps = tiny_job.splits.train, Laps(tiny_job.device)
    config = student_of(tiny_cache, loss=settings)
    task = OnlineTask(tiny_job, config, train.labels, cache.num_views, laps)
    (view,) = task.start_epoch(0)
    feed = ViewFeed(train, tiny_job.policy, tiny_job.device)
    batch = next(feed.batches(torch.arange(60), view, 60))
    logits = torch.randn((60, 10), generator=torch.Generator().manual_seed(0), requires_grad=True)
    parts = task.loss_parts(logits, batch)
    assert len(laps.take()) == 1
    parts["loss"].backward()  # the teacher's rows are made without gradients

    assert (settings.temperature, settings.weight, settings.ce_weight) == (4.0, 0.9, 0.1)
    rows = cache.read_view(view).rows(batch.samples)
    log_q, p = torch.log_softmax(logits / 4, 1), torch.softmax(rows / 4, 1)
    kl = (p * (p.log() - log_q)).sum(1).mean() * 16
    ce = -torch.log_softmax(logits, 1)[torch.arange(60), train.labels].mean()
    torch.testing.assert_close(parts["loss"], 0.9 * kl + 0.1 * ce, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_an_excerpt_has_the_rows_and_the_plain_pass_decodes_them(
    encoding: str, tiny_cache: Path, tmp_path: Path
) -> None:
    cache = LogitCache.open(tiny_cache)
    made = excerpt(cache, tmp_path / "excerpt.zarr", 4, encoding)
    group = zarr.open_group(tmp_path / "excerpt.zarr", mode="r")
    right = 0
    for view, source in enumerate((0, 1, 0, 1)):
        targets = cache.read_view(source)
        plain = torch.from_numpy(plainly_decoded(group, view))
        block = made.read_block(view, 0)
        torch.testing.assert_close(plain, block.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(block.labels, targets.labels)
        assert torch.equal(block.predictions, targets.predictions)
        if encoding == "float32":
            assert torch.equal(block.logits, targets.rows(cache.dataset_index))
        right += int((targets.labels == targets.predictions).sum())
    assert plain_pass(tmp_path / "excerpt.zarr") == 4 * cache.num_samples - right


def test_every_baseline_gives_the_rows_it_was_given(
    hundred_classes: np.ndarray[Any, np.dtype[np.float32]], tmp_path: Path
) -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    exact = torch.from_numpy(hundred_classes)[order]
    by_file, by_pickle, records = (
        kind.write(hundred_classes, tmp_path)
        for kind in (FilePerSample, PicklePerImage, RecordsBySeek)
    )
    assert torch.equal(torch.cat([*by_file.batches(order)]), exact)
    truth = torch.softmax(exact.double(), 1)
    best = truth.argsort(1, descending=True)
    kept, rest = best[:, :10], best[:, 10:]
    assert records.path.stat().st_size == 200 * 44
    for baseline in (by_pickle, records):
        rows = torch.cat([*baseline.batches(order)])
        torch.testing.assert_close(
            rows.gather(1, kept).double(), truth.gather(1, kept), rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(rows.sum(1), torch.ones(200), rtol=1e-5, atol=0)
        assert torch.equal(rows.gather(1, rest), rows.gather(1, rest[:, :1]).expand(-1, 90))


def test_the_loop_over_rows_rectifies_as_stage_two_does(
    hundred_classes: np.ndarray[Any, np.dtype[np.float32]],
) -> None:
    logits = torch.from_numpy(hundred_classes)
    labels = logits.topk(2).indices[torch.arange(200), torch.arange(200) % 2]  # half are wrong
    ours = rectify_rows(torch.softmax(logits / 4, 1), labels, "pairwise")
    torch.testing.assert_close(rectified_row_by_row(logits, labels, 4.0), ours)


def test_the_slow_way_to_augment_shows_shifted_images() -> None:
    images = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8)
    with torch.random.fork_rng():
        shown = torch.cat(list(augmented_one_by_one(images, [0] * 300, 2)))
    assert shown.shape == (300, 1, 8, 8)
    padded = torch.nn.functional.pad(images[0, 0], (2, 2, 2, 2))
    crops = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    expected = {crop.numpy().tobytes() for one in crops for crop in (one, one.flip(1))}
    assert {one[0].numpy().tobytes() for one in shown} <= expected


@pytest.mark.slow
def test_the_suite_measures_a_world(
    teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: ENCODINGS[name] for name in ("klt", "float32")}  # of all: see the excerpts above
    monkeypatch.setattr(cases, "ENCODINGS", few)
    what = {"dataset": "digits", "teacher": "resnet8", "augment": "pad-crop:pad=2"}
    plan = Plan(name="digits", students=("resnet8",), weights=str(teacher_run), **what)
    out = tmp_path / "suite.json"
    suite = Suite([plan], "cpu", turns=1, seconds=0.02, quick=True)
    parts = ("teacher", "reading", "rectify", "views")  # students: as --cache measures them
    report = run_suite(suite, parts, str(out))
    names, cached = {ratio.name for ratio in report.ratios}, "200 x 100, 2 views, synthetic"
    assert {
        "digits: teacher pass / bare forward",
        f"{cached}: slab, klt / np.load of the raw array",
        f"{cached}: slab, klt / one file per sample (torchdistill's way)",
        f"{cached}: rectify / plain NumPy pass",
        f"{cached}: rectify / Python loop over rows (the released code's way)",
        "digits: rectify / plain NumPy pass",
        "digits: cropping whole batches / torchvision, image by image",
    } <= names
    assert all(min(*r.ours, *r.yardstick) > 0 for r in report.ratios)
    assert any("GPU" in line for line in report.missing)
    assert msgspec.json.decode(out.read_bytes(), type=Report).ratios == report.ratios


def test_the_table_is_what_the_results_say(tmp_path: Path) -> None:
    report = Report(settings={}, machine={"cpu": "Abacus 9"}, versions={"torch": "2"})
    report.add(
        Ratio(name="a / b", ours=(2.0, 3.0, 9.0), yardstick=(2.0, 2.0, 3.0), target=1.02),
        Ratio(name="c / d", ours=(2.0,), yardstick=(1.0,), target=0.95, at_least=True),
        Figure(name="waiting", value=0.004, unit="", target=0.01),
        Figure(name="help", value=0.5, unit="s", target=0.3),
        Figure(name="speed", value=40_500.2, unit="rows/s"),
    )
    report.missing.append("the abacus has no GPU")
    report.write(tmp_path / "cpu.json")
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- results: begin -->\nold 7.77\n<!-- results: end -->\nbelow\n")
    for _ in range(2):  # the second time changes nothing
        write_table(readme, tmp_path)
        text = readme.read_text()
        assert text.startswith("above\n")
        assert text.endswith("\nbelow\n")
        for shown in (
            "| a / b | 1.500 | 1.000 to 3.000 | 3.000 / 2.000 | 3 | <= 1.02 (missed) |",
            "| c / d | 2.000 | 2.000 to 2.000 | 2.000 / 1.000 | 1 | >= 0.95 |",
            "| waiting | 0.40% | <= 1 % |",
            "| help | 0.500 s | <= 0.3 s (missed) |",
            "| speed | 40,500 rows/s |  |",
            "cpu Abacus 9",
            "- the abacus has no GPU",
        ):
            assert shown in text
        assert "7.77" not in text
        assert text.count("Not measured yet.") == 1  # on a GPU


def test_the_pages_table_is_that_of_the_results_beside_it() -> None:
    assert f"\n\n{tables()}\n<!-- results: end -->" in README.read_text()
