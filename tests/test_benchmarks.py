"""What the bench measures is what it says: nothing here is timed."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from helpers import DIGITS, first
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
from pipeline.evaluation import check_json
from stages.cache import LogitCache
from stages.cache.encoding import ENCODINGS
from stages.cache.layout import BlockId
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.errors import CacheError, ConfigError, IdentityError, ModelError, PipelineError
from stages.inputs.feed import ViewFeed
from stages.rectify import rectify_rows
from stages.settings import CacheConfig, LossSettings, ModelSettings, StudentConfig, TrainSettings
from stages.training.objective import student_loss


def digests(path: Path) -> dict[str, str]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


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


# ---- suite --cache --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cache_is_measured_and_left_as_it_is(
    finished_cache: Path, teacher_run: Path, tmp_path: Path
) -> None:
    before, out = digests(finished_cache), tmp_path / "report.json"
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
    assert digests(finished_cache) == before


def test_what_is_missing_is_named(finished_cache: Path) -> None:
    report = bench_cache(Console(), cache=str(finished_cache), turns=1, device="cpu")
    assert len(report.ratios) == 4
    message = " ".join(report.missing)
    assert all(flag in message for flag in ("--dataset", "--student", "--weights"))


class OtherDigits:
    """As many images as the digits, and other ones."""

    def __init__(self, split: str) -> None:
        size = 1_000 if split == "train" else 100
        self.targets = [i % 10 for i in range(size)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 8, 8), index % 256, dtype=torch.uint8), self.targets[index]


@pytest.mark.parametrize(
    ("given", "kind", "named"),
    [
        ({"cache": "nowhere.zarr"}, CacheError, "nowhere.zarr"),
        ({"students": ("resnet8",)}, ConfigError, "--dataset"),
        ({"dataset": "digits", "weights": "run"}, ConfigError, "--student"),
        ({"turns": 0}, ConfigError, "--turns"),
        ({"seconds": -1.0}, ConfigError, "--seconds"),
        ({"dtype": "int8"}, ConfigError, "float32, bfloat16, float16"),
        ({"device": "abacus"}, ConfigError, "abacus"),
        ({"dataset": "digits", "students": ("resnet8", "resnett")}, ModelError, "resnett"),
        ({"out": "/dev/full/x.json"}, ConfigError, "no folder"),
        ({"out": "report.txt"}, ConfigError, "--out"),
        ({"out": "CACHE/a.json"}, ConfigError, "inside the cache"),
        ({"dataset": "test_benchmarks:OtherDigits", "students": ("vgg8",)}, IdentityError, "data"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(
    given: dict[str, Any], kind: type[PipelineError], named: str, finished_cache: Path
) -> None:
    if "out" in given:
        given = {"out": given["out"].replace("CACHE", str(finished_cache))}
    with pytest.raises(kind, match=named):
        bench_cache(Console(), **{"cache": str(finished_cache), "device": "cpu", **given})


def test_a_place_that_takes_no_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuses(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_json(str(tmp_path / "a.json"), Report)


def test_a_damaged_cache_is_told_before_a_student_is_trained(cache_copy: Path) -> None:
    (cache_copy / "prediction/c/2/0").unlink()
    with pytest.raises(CacheError, match="prediction/c/2/0 is missing"):
        bench_cache(
            Console(), cache=str(cache_copy), dataset="digits", students=("resnet8",), device="cpu"
        )


def test_an_empty_cache_is_refused(
    cache_config: CacheConfig, digits: Splits, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.zarr"
    small = Splits(first(digits.train, 100), first(digits.test, 100))
    cache_teacher(prepare(msgspec.structs.replace(cache_config, views=1), small), whole)
    cache = LogitCache.open(whole, writable=True)
    cache.commits.forget(BlockId(0, 0))
    with pytest.raises(CacheError, match="no complete view"):
        bench_cache(Console(), cache=str(whole))


# ---- how it is measured ---------------------------------------------------------------------


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
        learner = self.learners[0]
        for _ in range(learner.position.epoch, self.settings.epochs):
            line = {"seconds": len(self.stream.samples) / 1_000 + 0.5, "wait_seconds": 0.5}
            learner.history.append(line)
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

    learned = None

    def __init__(self) -> None:
        self.asked = 0

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        return (epoch,)

    def loss_parts(self, logits: Tensor, batch: Any) -> dict[str, Tensor]:
        self.asked += 1
        return {"loss": 3 * logits.mean()}

    def epoch_metrics(self) -> dict[str, float]:
        return {"asked": self.asked}


def test_a_timed_loss_gives_the_gradients_of_the_loss() -> None:
    """To what lies before the logits as well."""
    weight = torch.ones(5, requires_grad=True)
    task = TimedTask(StubTask(), torch.device("cpu"))
    assert task.start_epoch(4) == (4,)
    task.loss_parts(2 * weight, None)["loss"].backward()  # type: ignore[arg-type]
    torch.testing.assert_close(weight.grad, torch.full((5,), 6 / 5))
    assert task.epoch_metrics() == {"asked": 1}
    assert len(task.laps.take()) == 1
    assert task.laps.take() == []


def test_the_online_student_learns_what_the_cached_one_does(
    finished_cache: Path, cache_config: CacheConfig, digits: Splits
) -> None:
    """Against the KD formula by hand, on rows of a float32 cache."""
    job, cache = prepare(cache_config, digits), LogitCache.open(finished_cache)
    config = StudentConfig(
        cache=str(finished_cache),
        data=DIGITS,
        model=ModelSettings(architecture="resnet8"),
        loss=student_loss(LossSettings(name="kd")).settings,
    )
    laps = Laps(job.device)
    task = OnlineTask(job, config, digits.train.labels, cache.num_views, laps)
    (view,) = task.start_epoch(0)
    batch = next(ViewFeed(digits.train, job.policy, job.device).batches(torch.arange(64), view, 64))
    logits = torch.randn((64, 10), generator=torch.Generator().manual_seed(0), requires_grad=True)
    parts = task.loss_parts(logits, batch)
    assert len(laps.take()) == 1
    parts["loss"].backward()  # the teacher's rows are made without gradients

    t, alpha, beta = config.loss.temperature, config.loss.weight, config.loss.ce_weight
    assert t is not None
    assert alpha is not None
    assert beta is not None
    rows = cache.read_view(view).rows(batch.samples)
    log_q, p = torch.log_softmax(logits / t, 1), torch.softmax(rows / t, 1)
    kl = (p * (p.log() - log_q)).sum(1).mean() * t**2
    ce = -torch.log_softmax(logits, 1)[torch.arange(64), digits.train.labels[:64]].mean()
    torch.testing.assert_close(parts["loss"], alpha * kl + beta * ce, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_an_excerpt_has_the_rows_and_the_plain_pass_decodes_them(
    encoding: str, finished_cache: Path, tmp_path: Path
) -> None:
    cache = LogitCache.open(finished_cache)
    made = excerpt(cache, tmp_path / "excerpt.zarr", 4, encoding)
    group = zarr.open_group(tmp_path / "excerpt.zarr", mode="r")
    right = 0
    for view, source in enumerate((0, 1, 2, 0)):
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


# ---- baselines ------------------------------------------------------------------------------


def test_every_baseline_gives_the_rows_it_was_given(
    hundred_classes: np.ndarray[Any, np.dtype[np.float32]], tmp_path: Path
) -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))

    def read(batches: Iterator[Tensor]) -> Tensor:
        return torch.cat(list(batches))

    exact = torch.from_numpy(hundred_classes)[order]
    assert torch.equal(read(FilePerSample.write(hundred_classes, tmp_path).batches(order)), exact)
    truth = torch.softmax(exact.double(), 1)
    best = truth.argsort(1, descending=True)
    records = RecordsBySeek.write(hundred_classes, tmp_path)
    assert records.path.stat().st_size == 200 * 44
    for rows in (
        read(PicklePerImage.write(hundred_classes, tmp_path).batches(order)),
        read(records.batches(order)),
    ):
        kept, rest = best[:, :10], best[:, 10:]
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
    crops = {
        (crop.flip(1) if flip else crop).numpy().tobytes()
        for y in range(5)
        for x in range(5)
        for flip in (False, True)
        for crop in [padded[y : y + 8, x : x + 8].contiguous()]
    }
    assert {one[0].numpy().tobytes() for one in shown} <= crops


# ---- make bench -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_suite_measures_a_world(
    teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: ENCODINGS[name] for name in ("klt", "float32")}  # of all: see the excerpts above
    monkeypatch.setattr(cases, "ENCODINGS", few)
    plan = Plan(
        name="digits",
        dataset="digits",
        teacher="resnet8",
        students=("resnet8",),
        augment="pad-crop:pad=2",
        weights=str(teacher_run),
    )
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
        assert "| a / b | 1.500 | 1.000 to 3.000 | 3.000 / 2.000 | 3 | <= 1.02 (missed) |" in text
        assert "| c / d | 2.000 | 2.000 to 2.000 | 2.000 / 1.000 | 1 | >= 0.95 |" in text
        assert "| waiting | 0.40% | <= 1 % |" in text
        assert "| help | 0.500 s | <= 0.3 s (missed) |" in text
        assert "| speed | 40,500 rows/s |  |" in text
        assert "cpu Abacus 9" in text
        assert "- the abacus has no GPU" in text
        assert "7.77" not in text
        assert text.count("Not measured yet.") == 1  # on a GPU


def test_the_pages_table_is_that_of_the_results_beside_it() -> None:
    assert f"\n\n{tables()}\n<!-- results: end -->" in README.read_text()
