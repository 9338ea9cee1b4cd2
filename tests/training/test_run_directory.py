"""What a run directory refuses, and that its files are replaced whole."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import RUN_FILES
from safetensors.torch import load_file
from torch import nn

from stages.errors import RunError
from stages.training.run_directory import RunDirectory

CONFIG = {"kind": "student", "train": {"lr": 1e-4, "milestones": (1, 2)}, "views": None}
CPU = torch.device("cpu")


@pytest.fixture
def my_run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.prepare(tmp_path / "deep" / "run", CONFIG)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_one_holds_its_configuration(my_run: RunDirectory) -> None:
    assert set(everything_in(my_run.path)) == {"config.yaml"}
    kept = yaml.safe_load((my_run.path / "config.yaml").read_text())
    assert kept == {"kind": "student", "train": {"lr": 1e-4, "milestones": [1, 2]}, "views": None}
    assert my_run.config_text == (my_run.path / "config.yaml").read_text()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert RunDirectory.prepare(tmp_path, CONFIG).path == tmp_path


def test_a_used_one_is_refused_with_the_way_out(my_run: RunDirectory) -> None:
    before = everything_in(my_run.path)
    with pytest.raises(RunError, match="not empty") as refused:
        RunDirectory.prepare(my_run.path, CONFIG)
    assert "--resume" in refused.value.remedy
    assert "--overwrite" in refused.value.remedy
    assert everything_in(my_run.path) == before


def test_overwrite_starts_afresh(my_run: RunDirectory) -> None:
    my_run.save_checkpoint({"position": 1})
    again = RunDirectory.prepare(my_run.path, {**CONFIG, "views": 3}, overwrite=True)
    assert set(everything_in(again.path)) == {"config.yaml"}
    assert yaml.safe_load(again.config_text)["views"] == 3


@pytest.mark.parametrize("way", ["resume", "overwrite"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_a_run_stays(tmp_path: Path, way: str, kind: str) -> None:
    precious = tmp_path / "thesis"
    if kind == "folder":
        precious.mkdir()
        (precious / "chapter1.tex").write_text("years of work")
    else:
        precious.write_text("years of work")
    with pytest.raises(RunError, match="something else than a run") as refused:
        RunDirectory.prepare(precious, CONFIG, **{way: True})
    assert "--out" in refused.value.remedy
    contents = everything_in(tmp_path)
    assert list(contents.values()) == [b"years of work"]


@pytest.mark.parametrize("way", ["resume", "overwrite"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"title: my homepage\n", id="jekyll"),
        pytest.param(b"kind: painter\n", id="another-kind"),
        pytest.param(b"kind: [teacher]\n", id="a-list-of-kinds"),
        pytest.param(b"- kind: teacher\n", id="list"),
        pytest.param(b"teacher\n", id="word"),
        pytest.param(b"", id="empty"),
        pytest.param(b"kind: [teacher", id="not-yaml"),
        pytest.param(b"\xff\xfe\x80\x81", id="not-text"),
    ],
)
def test_somebody_elses_config_yaml_does_not_make_a_run(
    tmp_path: Path, way: str, content: bytes
) -> None:
    """A project folder of Hydra's or Jekyll's has a config.yaml too."""
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "chapter1.tex").write_text("years of work")
    before = everything_in(tmp_path)
    with pytest.raises(RunError, match="something else than a run"):
        RunDirectory.prepare(tmp_path, CONFIG, **{way: True})
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_run_of_either_kind_may_be_overwritten(tmp_path: Path, kind: str) -> None:
    run = RunDirectory.prepare(tmp_path / "run", {"kind": kind})
    run.log("hello")
    assert set(everything_in(run.path)) == {"config.yaml", "log.txt"}
    RunDirectory.prepare(run.path, CONFIG, overwrite=True)
    assert set(everything_in(run.path)) == {"config.yaml"}


@pytest.mark.parametrize("there", [True, False])
def test_resume_and_overwrite_exclude_each_other(tmp_path: Path, there: bool) -> None:
    if there:
        RunDirectory.prepare(tmp_path / "run", CONFIG).log("hello")
    before = everything_in(tmp_path)
    with pytest.raises(RunError, match="cannot be resumed and overwritten") as refused:
        RunDirectory.prepare(tmp_path / "run", CONFIG, resume=True, overwrite=True)
    assert refused.value.remedy
    assert everything_in(tmp_path) == before
    assert (tmp_path / "run").exists() is there


def test_resume_with_the_same_settings(my_run: RunDirectory) -> None:
    my_run.save_checkpoint({"position": 7})
    again = RunDirectory.prepare(my_run.path, CONFIG, resume=True)
    assert again.load_checkpoint(CPU) == {"position": 7}


def test_resume_where_nothing_is_yet(tmp_path: Path) -> None:
    run = RunDirectory.prepare(tmp_path / "new", CONFIG, resume=True)
    assert run.load_checkpoint(CPU) is None


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**CONFIG, "views": 3}, "views: 3, not None"),
        (
            {**CONFIG, "train": {"lr": 2e-4, "milestones": (1, 2)}},
            "train.lr: 0.0002, not 0.0001",
        ),
        (
            {**CONFIG, "train": {"lr": 1e-4, "milestones": (1, 3)}},
            "train.milestones: [1, 3], not [1, 2]",
        ),
        ({key: CONFIG[key] for key in ("train", "views")}, "kind: None, not student"),
        ({**CONFIG, "device": "cpu"}, "device: cpu, not None"),
        (
            {**CONFIG, "train": {"lr": 2e-4, "milestones": (1, 2)}, "views": 3},
            "train.lr: 0.0002, not 0.0001; views: 3, not None",
        ),
    ],
    ids=["value", "nested-value", "list", "key-gone", "key-new", "two"],
)
def test_resume_with_other_settings_names_the_key(
    my_run: RunDirectory, other: dict[str, Any], named: str
) -> None:
    before = everything_in(my_run.path)
    with pytest.raises(RunError, match=f"other settings: {re.escape(named)}\n"):
        RunDirectory.prepare(my_run.path, other, resume=True)
    assert everything_in(my_run.path) == before


def test_resume_goes_on_without_a_key_that_is_null(my_run: RunDirectory) -> None:
    """A later program has settings that an earlier one did not write."""
    my_run.save_checkpoint({"position": 7})
    again = RunDirectory.prepare(my_run.path, {**CONFIG, "new": None}, resume=True)
    assert again.load_checkpoint(CPU) == {"position": 7}
    kept = yaml.safe_load(again.config_text)
    assert kept["new"] is None
    assert kept["train"] == {"lr": 1e-4, "milestones": [1, 2]}


def test_nothing_is_written_into_a_cache(tmp_path: Path) -> None:
    attributes = {"attributes": {"format": "teacher-logit-cache"}}
    (tmp_path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(RunError, match="lies inside the cache"):
        RunDirectory.prepare(tmp_path / "runs" / "kd", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["zarr.json"]


@pytest.mark.parametrize("text", ["", "junk", "PK\x03\x04cut off"])
def test_a_damaged_checkpoint_is_told(my_run: RunDirectory, text: str) -> None:
    (my_run.path / "last.pt").write_text(text)
    with pytest.raises(RunError, match=r"last\.pt is cut off or damaged") as told:
        my_run.load_checkpoint(CPU)
    assert "--overwrite" in told.value.remedy


@pytest.mark.parametrize("text", [None, "", '{"epoch": 0}\n', '{"epoch": 0}\n{"epo', "\0\0\n\0\n"])
def test_damaged_metrics_are_told(my_run: RunDirectory, text: str | None) -> None:
    if text is not None:
        (my_run.path / "metrics.jsonl").write_text(text)
    before = everything_in(my_run.path)
    with pytest.raises(RunError, match=r"metrics\.jsonl is cut off or damaged"):
        my_run.keep_metrics(2)
    assert everything_in(my_run.path) == before


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make"):
        RunDirectory.prepare(tmp_path / "file" / "run", CONFIG)


WRITES: dict[str, Callable[[RunDirectory, int], None]] = {
    "last.pt": lambda run, n: run.save_checkpoint({"position": n}),
    "model.safetensors": lambda run, n: run.save_model(nn.Linear(n, 2)),
    "summary.json": lambda run, n: run.save_summary({"epochs": n}),
    "metrics.jsonl": lambda run, n: void(run.keep_metrics(n)),
}


def void(_: object) -> None: ...


@pytest.mark.parametrize("name", list(WRITES))
def test_files_are_replaced_whole(
    my_run: RunDirectory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A kill right before the new file takes the old one's place leaves the old one."""
    my_run.add_metrics({"epoch": 0})
    my_run.add_metrics({"epoch": 1})
    WRITES[name](my_run, 2)
    before = (my_run.path / name).read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        WRITES[name](my_run, 1)
    assert (my_run.path / name).read_bytes() == before
    monkeypatch.undo()
    WRITES[name](my_run, 1)
    assert (my_run.path / name).read_bytes() != before


def test_saved_weights_are_plain_and_contiguous(my_run: RunDirectory) -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    my_run.save_model(module)
    found = load_file(my_run.path / "model.safetensors")
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())


def test_keep_metrics_drops_what_will_be_run_again(my_run: RunDirectory) -> None:
    for epoch in range(3):
        my_run.add_metrics({"epoch": epoch, "loss": 0.1 * epoch})
    path = my_run.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"epoch": 3, "lo')  # killed while writing
    kept = my_run.keep_metrics(2)
    assert kept == [{"epoch": 0, "loss": 0.0}, {"epoch": 1, "loss": 0.1}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept


def test_tied_weights_can_be_saved(my_run: RunDirectory) -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    my_run.save_model(nn.Sequential(one, other))
    found = load_file(my_run.path / "model.safetensors")
    assert found.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for name in ("0.weight", "1.weight"):
        assert torch.equal(found[name], one.weight)
    assert torch.equal(found["1.bias"], other.bias)


def test_nothing_temporary_stays(my_run: RunDirectory) -> None:
    my_run.save_checkpoint({})
    my_run.save_model(nn.Linear(1, 1))
    my_run.save_summary({"epochs": 1})
    my_run.keep_metrics(0)
    my_run.log("hello")
    assert set(everything_in(my_run.path)) == RUN_FILES
    assert json.loads((my_run.path / "summary.json").read_text()) == {"epochs": 1}
