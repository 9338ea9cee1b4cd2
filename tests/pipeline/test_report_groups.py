"""Which runs are one group, and what groups are called."""

import itertools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from reports import epoch, page_of, sweep_line, write_run, write_sweep

from pipeline.report.groups import comparable, distinguishing, grouped
from pipeline.runs import LeftOut, Run, read_run, read_sweep

HISTORY = [epoch(0, 0.2), epoch(1, 0.4)]


def runs_of(folder: Path, settings: list[dict[str, Any]]) -> list[Run]:
    found = []
    for at, chosen in enumerate(settings):
        write_run(folder / f"run-{at}", HISTORY, **chosen)
        run = read_run(folder / f"run-{at}", f"run-{at}")
        assert isinstance(run, Run)
        found.append(run)
    return found


def test_runs_that_differ_in_seeds_alone_are_one_group(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"seed": 0}, {"seed": 1}, {"seed__init": 7}, {"device": "x"}]
    (group,) = grouped(runs_of(tmp_path, settings))
    assert (len(group.runs), group.seeds) == (4, 3)  # the last one has the seeds of the first


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        (
            [{"loss__name": "ce"}, {}, {"bias__mode": "rectify", "bias__rectified": "pairwise-T4"}],
            ["ce, bias none", "kd, bias none", "kd, rectify"],
        ),
        ([{"loss__name": "ce", "loss__weight": 1.0}, {"loss__weight": 0.5}], ["ce", "kd"]),
        ([{"also": []}, {}], ["kd, bias none"]),  # an older run has no such key
        ([{"tensorboard": False, "loss__standardise": False}, {}], ["kd, bias none"]),
    ],
    ids=["three", "superfluous", "empty-list", "off"],
)
def test_labels_are_the_keys_that_differ(
    tmp_path: Path, settings: list[dict[str, Any]], labels: list[str]
) -> None:
    found = [group.label for group in grouped(runs_of(tmp_path, settings))]
    assert found == labels


def test_runs_are_grouped_by_all_that_decides_a_result(tmp_path: Path) -> None:
    """Those that differ in more than loss and bias are not comparable."""
    changes: list[tuple[dict[str, Any], int, int]] = [
        ({"device": "cuda:3"}, 1, 1),
        ({"data__workers": 9}, 1, 1),
        ({"train__compile": True}, 1, 1),
        ({"train__epochs": 9}, 2, 2),
        ({"model__architecture": "vgg8"}, 2, 2),
        ({"loss__temperature": 9.0}, 2, 1),
        ({"bias__mode": "eliminate"}, 2, 1),
        ({"also": ["b.zarr"]}, 2, 2),
    ]
    for number, (changed, groups, kinds) in enumerate(changes):
        found = grouped(runs_of(tmp_path / f"{number}", [{"seed": 0}, {"seed": 1, **changed}]))
        assert (len(found), len(comparable(found))) == (groups, kinds), changed


def test_one_label_of_a_sweep_with_two_settings_is_two_groups(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", seeds=2)
    config = tmp_path / "sweep" / "plain-1" / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 4", "epochs: 5"))
    shutil.rmtree(tmp_path / "sweep" / "other-1")  # says too little: stays with its label
    runs = [r for r in read_sweep(tmp_path / "sweep", "sweep") if isinstance(r, Run)]
    assert {group.label: len(group.runs) for group in grouped(runs)} == {
        "KD, epochs=4": 1,
        "KD, epochs=5": 1,
        "a & <b>": 2,
    }


def test_a_longer_run_is_not_headlined_over_a_shorter_one(tmp_path: Path) -> None:
    short, long = HISTORY, [*HISTORY, epoch(2, 0.9)]
    write_run(tmp_path / "in" / "kd", short)
    write_run(tmp_path / "in" / "ce", [epoch(0, 0.1), epoch(1, 0.3)], loss__name="ce")
    write_run(tmp_path / "in" / "long", long)
    page = page_of(tmp_path / "in")

    (headline,) = page.find("dl", class_="numbers")
    assert headline.value("best_group") == 0.4  # of the two with two epochs each
    assert "best of 2 groups with train.epochs=2" in headline.text
    assert "n=1" in headline.text
    assert "±" not in headline.text
    (table,) = [t for t in page.find("table") if "standard deviation over n runs" in t.text]
    assert "train.epochs" in [head.text for head in table.find("th")]
    groups = [row for row in table.find("tr") if "data-group" in row.attributes]
    assert sorted(row.find("td")[0].text for row in groups) == ["2", "2", "3"]
    assert all(not page.find(data_field="last_std", data_value="0.0") for _ in groups)


def test_without_comparable_groups_none_is_the_best(tmp_path: Path) -> None:
    write_run(tmp_path / "in" / "a", HISTORY)
    write_run(tmp_path / "in" / "b", [*HISTORY, epoch(2, 0.9)])
    page = page_of(tmp_path / "in")
    assert page.find(data_field="best_group") == []
    assert "differ in train.epochs" in page.text


def test_copies_of_a_cache_and_spellings_of_its_path_are_one(
    tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_cache, tmp_path / "copy.zarr")
    monkeypatch.chdir(tmp_path)
    paths = [str(tiny_cache), "copy.zarr", "./copy.zarr", str(tmp_path / "copy.zarr")]
    for seed, path in enumerate(paths):
        write_run(tmp_path / "in" / f"{seed}", HISTORY, seed, cache=path)
    page = page_of(tmp_path / "in")
    assert page.values("n") == [4]
    assert page.value("passes_cached") == 2  # views, once


def test_a_run_of_all_views_keeps_their_number_when_the_cache_grows(tmp_path: Path) -> None:
    history = [epoch(n, 0.5, view=n % 2) for n in range(4)]
    write_run(tmp_path / "seen", history)
    seen = read_run(tmp_path / "seen", "seen")
    assert isinstance(seen, Run)
    assert seen.config["views"] == 2


def test_paths_are_shortened_unless_they_would_look_the_same() -> None:
    for ends, labels in (
        (("a/one.zarr", "a/two.zarr"), ["one", "two"]),
        (("a/c.zarr", "b/c.zarr"), ["cache=a/c.zarr", "cache=b/c.zarr"]),
    ):
        assert distinguishing([{"cache": end} for end in ends]) == labels


def test_curves_are_means_over_seeds(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [epoch(0, 0.2), epoch(1, 0.4)], seed=0)
    write_run(tmp_path / "b", [epoch(0, 0.4), epoch(1, 0.8)], seed=1)
    runs = [read_run(tmp_path / name, name) for name in ("a", "b")]
    (group,) = grouped([run for run in runs if isinstance(run, Run)])
    assert [point.mean for point in group.curve("test_top1")] == pytest.approx([0.3, 0.6])
    assert group.curve("loss_ce") == []


def test_the_last_line_of_a_run_holds_and_labels_are_kept(tmp_path: Path) -> None:
    lines = write_sweep(tmp_path / "sweep", seeds=1)
    failed = lines[0] | {"status": "failed", "error": "killed", "summary": None}
    texts = [json.dumps(line) for line in (failed, *lines)]
    (tmp_path / "sweep" / "results.jsonl").write_text("\n".join([*texts, "{broken"]))
    found = list(read_sweep(tmp_path / "sweep", "sweep"))
    left_out = [f for f in found if isinstance(f, LeftOut)]
    assert [(f.name, f.status) for f in left_out] == [
        ("sweep/results.jsonl", "unreadable"),
        ("sweep/gone-0", "failed"),
    ]
    assert left_out[1].why == "out of <memory>"
    runs = [run for run in found if isinstance(run, Run)]
    assert [run.name for run in runs] == ["sweep/plain-0", "sweep/other-0"]
    assert [group.label for group in grouped(runs)] == ["KD", "a & <b>"]


def test_the_page_has_the_exact_numbers_of_a_sweep(tmp_path: Path) -> None:
    lines = write_sweep(tmp_path / "sweep")
    page = page_of(tmp_path / "sweep")
    done = [line for line in lines if line["status"] == "done"]
    for line in done:
        (row,) = page.find("tr", data_run=f"sweep/{line['name']}", data_group=line["label"])
        for kind, key in itertools.product(
            ("last", "best"), ("epoch", "test_top1", "test_top5", "loss")
        ):
            assert row.value(f"{kind}.{key}") == line["summary"][kind][key]
        for key in ("train_seconds", "wait_share"):
            assert row.value(key) == line["summary"][key]
    for label in ("KD", "a & <b>"):
        rows = page.find("tr", data_group=label)
        (row,) = [row for row in rows if "data-run" not in row.attributes]
        top1 = [line["summary"]["last"]["test_top1"] for line in done if line["label"] == label]
        assert row.value("last_mean") == pytest.approx(statistics.fmean(top1), abs=1e-15)
        assert row.value("last_std") == pytest.approx(statistics.stdev(top1), abs=1e-15)
        assert row.value("n") == 3
    (failed,) = page.find("tr", data_run="sweep/gone-0")
    assert "out of <memory>" in failed.text


def test_a_run_whose_folder_is_gone_still_counts(tmp_path: Path) -> None:
    summary = write_run(tmp_path / "somewhere", HISTORY)
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "results.jsonl").write_text(json.dumps(sweep_line("moved", "KD", 3, summary)))
    page = page_of(sweep)
    (row,) = page.find("tr", data_run="sweep/moved")
    assert row.value("last.test_top1") == summary["last"]["test_top1"]


def test_datasets_have_sections_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", HISTORY)
    write_run(tmp_path / "runs" / "b", HISTORY, data__dataset="cifar10")
    page = page_of(tmp_path / "runs")
    assert [s.find("h2")[0].text for s in page.find("section", class_="dataset")] == [
        "Dataset digits",
        "Dataset cifar10",
    ]
    assert "neither averaged nor compared" in page.text


@pytest.mark.parametrize(("loss", "online"), [("kd", 4), ("mlkd", 8), ("ce", None)])
def test_teacher_passes(tmp_path: Path, tiny_cache: Path, loss: str, online: int | None) -> None:
    """mlkd takes two views an epoch, ce no teacher."""
    for seed in range(2):
        folder = tmp_path / "runs" / f"{seed}"
        write_run(folder, HISTORY, seed, cache=str(tiny_cache), loss__name=loss)
    page = page_of(tmp_path / "runs")
    if online is None:
        assert "need no teacher" in page.text
        assert page.find(data_field="passes_online") == []
    else:
        assert page.value("passes_online") == online
        assert page.value("passes_cached") == 2
