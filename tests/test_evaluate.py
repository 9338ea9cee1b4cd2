"""Evaluation against naive loops in NumPy, against what runs recorded, and against the cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import Words, metrics, naive_ece, naive_softmax, refused, student_of
from torch import Tensor

from pipeline.cli import cli
from pipeline.evaluation import check_json
from stages.cache import LogitCache
from stages.data import Splits
from stages.errors import (
    ConfigError,
    DatasetError,
    IdentityError,
    ModelError,
    PipelineError,
    RunError,
)
from stages.evaluate import Evaluated, OtherImages, evaluate_run
from stages.scores import BINS, calibration, class_scores, compare, score
from stages.train_student import train_student


@pytest.fixture(scope="module")
def my_student(
    finished_cache: Path, digits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A student whose selected epoch need not be its last: samples are held out. Read only."""
    of = {"model__architecture": "resnet8", "data__val_fraction": 0.2}
    config = student_of(finished_cache, **of)
    run = tmp_path_factory.mktemp("evaluated") / "student"
    train_student(config, run, splits=digits)
    return run


@pytest.fixture
def my_copy(my_student: Path, tmp_path: Path) -> Path:
    """The student's run, to be changed."""
    return Path(shutil.copytree(my_student, tmp_path / "run"))


def changed(run: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The run, with another configuration."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def random_rows(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits that know something of the labels; the labels."""
    numbers = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=numbers)
    hint = 2 * torch.nn.functional.one_hot(labels, classes)
    student, teacher = (torch.randn(rows, classes, generator=numbers) * 2 + hint for _ in "st")
    return student, teacher, labels


def probabilities(logits: Tensor) -> list[list[float]]:
    return [naive_softmax(row) for row in logits.double().tolist()]


@pytest.mark.parametrize("classes", [2, 10])
def test_scores_equal_those_of_a_loop(classes: int) -> None:
    logits, _, labels = random_rows(500, classes)
    top1 = top5 = nll = 0.0
    for p, label in zip(probabilities(logits), labels.tolist(), strict=True):
        order = sorted(range(classes), key=lambda c, p=p: -p[c])  # type: ignore[misc]
        top1 += order[0] == label
        top5 += label in order[:5]
        nll -= np.log(p[label])
    ece = naive_ece(logits, (logits.argmax(1) == labels).tolist(), BINS)
    found = score(logits, labels)
    assert found.top1 == top1 / 500
    assert found.top5 == top5 / 500
    assert found.nll == pytest.approx(nll / 500, rel=1e-5)
    assert found.ece == pytest.approx(ece, abs=1e-6)
    assert classes > 5 or found.top5 == 1.0


def test_calibration_by_hand() -> None:
    """Two bins of four: (.25, .5] is right half the time, (.75, 1] always; .5 is in the lower."""
    confidence = torch.tensor([0.5, 0.375, 0.875, 1.0])
    right = torch.tensor([True, False, True, True])
    expected = 0.5 * abs(0.5 - 0.4375) + 0.5 * abs(1.0 - 0.9375)
    assert calibration(confidence, right, bins=4).ece == expected


def test_classes_equal_those_of_a_loop_and_may_be_empty() -> None:
    student, teacher, labels = random_rows(200, 7)
    labels[labels == 3] = 4  # nobody is left in class 3
    found = class_scores([f"c{c}" for c in range(7)], labels, student.argmax(1), teacher.argmax(1))
    for c, one in enumerate(found):
        mine = [i for i in range(200) if labels[i] == c]
        assert (one.name, one.samples) == (f"c{c}", len(mine))
        for share, logits in ((one.top1, student), (one.teacher_top1, teacher)):
            hits = sum(int(logits[i].argmax()) == c for i in mine)
            assert share == (hits / len(mine) if mine else None)
    assert found[3].top1 is None
    assert found[3].gain == 0.0
    assert found[0].gain == found[0].top1 - found[0].teacher_top1  # type: ignore[operator]


def test_comparison_equals_a_loop() -> None:
    student, teacher, labels = random_rows(300, 10)
    kl, agree = 0.0, 0
    counts = {(s, t): 0 for s in (True, False) for t in (True, False)}
    both = zip(probabilities(student), probabilities(teacher), labels.tolist(), strict=True)
    for p, q, label in both:
        kl += sum(b * (np.log(b) - np.log(a)) for a, b in zip(p, q, strict=True))
        ours, theirs = int(np.argmax(p)), int(np.argmax(q))
        agree += ours == theirs
        counts[ours == label, theirs == label] += 1
    found = compare(student, (teacher, teacher.argmax(1)), labels, ["a"])
    assert found.kl == pytest.approx(kl / 300, rel=1e-5)
    assert found.agreement == agree / 300
    assert found.teacher == score(teacher, labels)
    assert found.both_right == counts[True, True]
    assert found.only_teacher == counts[False, True]
    assert found.only_student == counts[True, False]
    assert found.both_wrong == counts[False, False]
    assert min(counts.values()) > 0


def test_top1_is_what_the_run_recorded(my_student: Path, teacher_run: Path) -> None:
    for run in (my_student, teacher_run):
        summary = json.loads((run / "summary.json").read_text())
        line = metrics(run)[summary["selected"]["epoch"]]
        found = evaluate_run(run, device="cpu")
        assert found.scores.top1 == pytest.approx(line["test_top1"], abs=1e-7)
        assert found.scores.top5 == pytest.approx(line["test_top5"], abs=1e-7)
        assert (found.recorded_top1, found.samples) == (line["test_top1"], 797)
        hits = sum(c.samples * (c.top1 or 0) for c in found.classes)
        assert hits / 797 == pytest.approx(found.scores.top1)


def test_a_student_is_compared_with_its_own_cache(my_student: Path, finished_cache: Path) -> None:
    cache = str(finished_cache)
    found, twice = (
        evaluate_run(my_student, device="cpu"),
        evaluate_run(my_student, device="cpu", batch_size=100, caches=[cache] * 2),
    )  # their mean, in other batches
    assert evaluate_run(my_student, device="cpu", caches=[cache]) == found
    comparison, other = found.comparison, twice.comparison
    assert comparison is not None
    assert other is not None
    assert comparison.caches == (cache,)
    assert comparison.teacher == score(*LogitCache.open(finished_cache).eval_logits())
    assert sum(msgspec.structs.astuple(comparison)[4:]) == 797
    student_right = comparison.both_right + comparison.only_student
    assert student_right / 797 == pytest.approx(found.scores.top1)
    assert twice.scores.nll == pytest.approx(found.scores.nll, rel=1e-4)
    assert other.teacher.top1 == comparison.teacher.top1
    assert other.kl == pytest.approx(comparison.kl, rel=1e-4)


def test_a_cache_of_its_own_that_is_gone_is_said(my_copy: Path) -> None:
    changed(my_copy, lambda config: config.update(cache="gone.zarr"))
    words = Words()
    assert evaluate_run(my_copy, device="cpu", reporter=words).comparison is None
    assert any("not compared with the teacher" in line for line in words.lines)
    assert words.done[-1] == 1.0


def test_a_cache_of_another_test_split_is_refused(my_student: Path, small_cache: Path) -> None:
    with refused(IdentityError, "other labels", "--cache"):
        evaluate_run(my_student, device="cpu", caches=[str(small_cache)])


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (RunError, "not a run directory"),
        (RunError, "speed"),
        (ModelError, "safetensors is damaged"),
    ],
)
def test_what_is_no_finished_run(my_copy: Path, kind: type[PipelineError], cause: str) -> None:
    weights = my_copy / "model.safetensors"
    if cause == "speed":
        changed(my_copy, lambda config: config["train"].update(speed=3))
    elif kind is ModelError:
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        shutil.rmtree(my_copy)
    with refused(kind, cause):
        evaluate_run(my_copy, device="cpu")


def other_classes(split: str) -> list[tuple[Any, int]]:
    """A dataset of three classes."""
    return [(np.full((8, 8), 80 * c, np.uint8), c) for c in range(3)]


def test_a_dataset_of_other_classes_is_refused(
    my_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(ModelError, match="10 classes, the dataset has 3") as caught:
        evaluate_run(my_student, OtherImages("test_evaluate:other_classes"), device="cpu")
    assert "was trained on digits, test_evaluate:other_classes does not fit" in caught.value.cause
    assert "--dataset" in caught.value.remedy


def test_the_command_shows_and_writes_it(my_student: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    answer = CliRunner().invoke(
        cli, ["evaluate", str(my_student), "--device", "cpu", "--out", str(out)]
    )
    assert answer.exit_code == 0, answer.output
    for words in ("top-1", "NLL", "ECE", "only the student right", "gain", "recorded"):
        assert words in answer.output
    found = json.loads(out.read_text())
    assert found == json.loads(msgspec.json.encode(evaluate_run(my_student, device="cpu")))
    assert len(found["classes"]) == 10
    check_json(str(out), Evaluated)  # its own file may be replaced


def test_a_file_of_somebody_else_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a place that cannot be written is told."""
    out = tmp_path / "found.json"
    for content in ('{"my": "results"}', "no JSON", "\xff"):
        out.write_text(content, encoding="latin-1")
        with pytest.raises(ConfigError, match="--out"):
            check_json(str(out), Evaluated)
        assert out.read_text(encoding="latin-1") == content
    for name in ("found.txt", "nowhere/found.json"):
        with pytest.raises(PipelineError, match=r"--out|no folder"):
            check_json(str(tmp_path / name), Evaluated)

    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_json(str(tmp_path / "new.json"), Evaluated)


def test_a_dataset_that_moved_is_given_by_name(my_copy: Path) -> None:
    changed(my_copy, lambda config: config["data"].update(dataset="folder:gone"))
    with pytest.raises(DatasetError) as caught:
        evaluate_run(my_copy, device="cpu")
    assert "--dataset" in caught.value.remedy
    found = evaluate_run(my_copy, OtherImages("digits"), device="cpu")
    assert found.recorded_top1 is None
    assert found.scores.top1 > 0
