"""Numbers of a sweep's table, against statistics, scipy and by hand; results.jsonl; estimates."""

import json
import statistics
from typing import Any

import pytest
from helpers import changed, student_of
from reports import epoch, summary_of, sweep_line
from scipy import stats

from pipeline.sweep.directory import Progress, Result, as_lines
from pipeline.sweep.grid import Run
from pipeline.sweep.run import seconds_left, seconds_of
from pipeline.sweep.table import (
    Group,
    baseline_of,
    check_baseline,
    difference,
    table_markdown,
    tables,
)
from stages.errors import ConfigError
from stages.settings import TrainSettings


def run(loss: str = "kd", seed: int = 0, label: str | None = None, **changes: Any) -> Run:
    """changes: as of `changed`."""
    plain = student_of("a.zarr", train=TrainSettings(), model__architecture="resnet8")
    config = changed(plain, loss__name=loss, seed__data=seed, seed__init=seed, **changes)
    return Run(f"{label or loss}-s{seed}", label or loss, {"loss.name": loss}, config)


def summary(last: float, best: float | None = None, seconds: float = 10.0) -> dict[str, Any]:
    found = summary_of([epoch(0, last) | {"seconds": seconds}])
    found["best"] = found["last"] | {"test_top1": last if best is None else best}
    return found | {"train_seconds": 5 * seconds, "epochs": 4}


def group(loss: str, tops: dict[int, float], **kinds: Any) -> Group:
    results = [Result(run(loss, seed, **kinds), 0.9, summary(top)) for seed, top in tops.items()]
    return Group(results[0].run.label, results)


def test_groups_are_compared_over_their_common_seeds() -> None:
    ours, theirs = {0: 0.50, 1: 0.52, 2: 0.55, 7: 0.99}, {2: 0.54, 1: 0.50, 0: 0.47, 9: 0.01}
    found = difference(group("kd", ours), group("ce", theirs))
    assert found is not None
    assert found.pairs == 3
    assert found.points == pytest.approx((3 + 2 + 1) / 3)
    assert found.p == pytest.approx(stats.ttest_rel([0.50, 0.52, 0.55], [0.47, 0.50, 0.54]).pvalue)
    # by hand: the mean of 3, 2, 1 is 2, its standard error 1 / sqrt(3), two degrees of freedom
    assert found.p == pytest.approx(2 * stats.t.sf(2 * 3**0.5, 2))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({0: 0.5}, {0: 0.4}),
        ({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5}),
        ({0: 0.5, 1: 0.6, 2: 0.1}, {0: 0.5, 1: 0.6, 2: 0.1}),
    ],
    ids=["one pair", "the same difference", "no difference"],
)
def test_without_variance_there_is_no_p(ours: dict[int, float], theirs: dict[int, float]) -> None:
    found = difference(group("kd", ours), group("ce", theirs))
    assert found is not None
    assert found.p is None
    assert found.points == pytest.approx(100 * (ours[0] - theirs[0]))
    assert difference(group("kd", {0: 0.5}), group("ce", {1: 0.5})) is None  # no common seed


def test_each_model_and_dataset_has_the_baseline_of_its_own() -> None:
    kinds: list[dict[str, Any]] = [
        {
            "model__architecture": model,
            "data__dataset": dataset,
            "label": f"{model}, {dataset}",
        }
        for model in ("resnet8", "vgg8")
        for dataset in ("digits", "cifar10")
    ]
    baselines = [group("ce", {0: 0.5}, **kind) for kind in kinds]
    others = [group("kd", {0: 0.5}, **kind, cache="b.zarr") for kind in kinds]
    for baseline, other in zip(baselines, others, strict=True):
        assert baseline_of(other, [*others, *baselines], None) is baseline
    assert baseline_of(group("kd", {0: 0.5}, model__architecture="vgg13"), baselines, None) is None


def test_the_nearest_of_several_baselines_counts_and_none_where_two_are_as_near() -> None:
    slow, fast = (group("ce", {0: 0.5}, train__lr=lr) for lr in (0.1, 0.2))
    assert baseline_of(group("kd", {0: 0.5}, train__lr=0.2), [slow, fast], None) is fast
    assert baseline_of(group("kd", {0: 0.5}, train__lr=0.3), [slow, fast], None) is None


def test_a_baseline_may_be_named_by_its_keys() -> None:
    small, large = (
        group("ce", {0: 0.5}, model__architecture=model) for model in ("resnet8", "resnet20")
    )
    kd = group("kd", {0: 0.5}, model__architecture="resnet8")
    wanted = {"model.architecture": "resnet20", "loss.name": "ce"}
    assert baseline_of(kd, [small, large, kd], wanted) is large
    assert baseline_of(small, [small, large, kd], {"loss.name": "kd"}) is kd


def test_a_baseline_that_no_run_is_is_refused() -> None:
    check_baseline([run("ce")], {"loss.name": "ce"})
    check_baseline([run("kd")], None)
    with pytest.raises(ConfigError, match="no run of this sweep is the baseline"):
        check_baseline([run("kd")], {"loss.name": "ce"})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, None),
        ({"train__epochs": 3}, "train.epochs"),
        ({"cache": "b.zarr", "train__batch_size": 64}, "cache, train.batch_size"),
        ({"train__deterministic": True}, None),
    ],
)
def test_a_difference_says_what_else_differs_than_loss_and_bias(
    other: dict[str, Any], message: str | None
) -> None:
    found = [Result(run("ce"), None, summary(0.4)), Result(run("kd", **other), None, summary(0.5))]
    (table,) = tables(found, None)
    end = f"n 1; other {message})" if message else "n 1)"
    assert table.rows[1][5] == f"+10.00 (p -, {end}"


def results() -> list[Result]:
    ce, kd = [0.40, 0.43, 0.41], [0.50, 0.52, 0.55]
    found = [Result(run("ce", s), 0.6, summary(x, x + 0.01, 61)) for s, x in enumerate(ce)]
    found += [Result(run("kd", s), 0.6, summary(x)) for s, x in enumerate(kd)]
    found += [Result(run("dkd", 0), 0.6, summary(0.7))]
    found += [Result(run("dkd", 1), 0.6, error="RuntimeError: a | b")]
    return [*found, Result(run("kd", 0, data__dataset="cifar10"), None, summary(0.25))]


def test_a_table_for_every_dataset() -> None:
    digits, cifar = tables(results(), None)
    assert digits.title == "digits, teacher 60.00%"
    assert digits.columns[-2:] == ("against ce", "against the teacher")
    mean, std = statistics.mean([40, 43, 41]), statistics.stdev([40, 43, 41])
    assert digits.rows[0] == [
        "ce",
        f"{mean:.2f}% ± {std:.2f}",
        f"{mean + 1:.2f}% ± {std:.2f}",
        "3",
        "61 s",
        "baseline",
        f"{mean - 60:+.2f}",
    ]
    p = stats.ttest_rel([50, 52, 55], [40, 43, 41]).pvalue
    assert digits.rows[1][0] == "kd"
    assert digits.rows[1][5] == f"{(10 + 9 + 14) / 3:+.2f} (p {p:.2g}, n 3)"
    assert digits.rows[2] == ["dkd", "70.00%", "70.00%", "1", "10 s", "+30.00 (p -, n 1)", "+10.00"]
    assert digits.failed == [("dkd-s1", "RuntimeError: a | b")]
    assert cifar.title == "cifar10"
    assert cifar.rows == [["kd", "25.00%", "25.00%", "1", "10 s", "-", "-"]]


def test_the_markdown_has_a_cell_for_every_column() -> None:
    text = table_markdown([Result(run(label="a|b"), None, summary(0.5)), *results()], None)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}
    assert "failed: dkd-s1: RuntimeError: a | b" in text
    assert table_markdown([], None) == "\n"


def test_a_line_for_every_run() -> None:
    lines = [json.loads(line) for line in as_lines(results()).splitlines()]
    expected = sweep_line("ce-s0", "ce", 0, summary(0.40, 0.40 + 0.01, 61))
    expected |= {"keys": {"loss.name": "ce"}, "cache": "a.zarr", "teacher_top1": 0.6}
    assert lines[0] == expected
    assert (lines[7]["status"], lines[7]["error"]) == ("failed", "RuntimeError: a | b")
    assert lines[7]["summary"] is None


def test_the_time_of_a_run_is_that_of_its_kind_or_of_all() -> None:
    others = [run("ce", 5, model__architecture="vgg8"), run("ce", 6, train__epochs=4)]
    runs = [run(seed=s) for s in range(3)] + others
    progress = dict.fromkeys((r.name for r in runs), Progress())
    assert seconds_of(runs[0], runs, progress) is None
    assert seconds_left(runs, runs, progress, 2) is None
    progress[runs[0].name] = Progress(summary=summary(0.1, seconds=10 / 5))
    progress[runs[1].name] = Progress(summary=summary(0.1, seconds=20 / 5))
    progress[runs[3].name] = Progress(summary=summary(0.1, seconds=90 / 5))
    assert seconds_of(runs[2], runs, progress) == 15
    assert seconds_of(runs[4], runs, progress) == 40  # its epochs are its own
    assert seconds_left([runs[2], runs[4]], runs, progress, 1) == 55
    progress[runs[4].name] = Progress(epochs=1)
    assert seconds_left([runs[2], runs[4]], runs, progress, 1) == 45
    assert seconds_left([runs[2], runs[4]], runs, progress, 9) == 30  # the longest run
    assert seconds_left([], runs, progress, 9) == 0
