"""What a run directory refuses, and that its files are replaced whole."""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from damage import flipped, tree
from helpers import prepared, refused
from safetensors.torch import load_file
from torch import nn

from stages.errors import RunError
from stages.inputs.run_files import read_config
from stages.training.run_directory import RunDirectory

CONFIG = {"kind": "student", "train": {"lr": 1e-4, "milestones": (1, 2)}, "views": None}
CPU = torch.device("cpu")


def begun(path: Path, config: dict[str, Any] = CONFIG, **ways: bool) -> RunDirectory:
    """A run directory with its first files, not held any more."""
    run = prepared(path, config, **ways)
    run.begin()
    run.release()
    return run


@pytest.fixture
def my_run(tmp_path: Path) -> RunDirectory:
    return begun(tmp_path / "deep" / "run")


BEGUN = {"config.yaml", "metrics.jsonl"}


def test_a_new_one_holds_its_configuration(my_run: RunDirectory) -> None:
    assert {*tree(my_run.path)} == BEGUN
    kept = yaml.safe_load((my_run.path / "config.yaml").read_text())
    assert kept == {"kind": "student", "train": {"lr": 1e-4, "milestones": [1, 2]}, "views": None}
    assert my_run.config_text == (my_run.path / "config.yaml").read_text()


def test_a_used_one_is_refused_with_the_way_out_and_not_held(my_run: RunDirectory) -> None:
    before = tree(my_run.path)
    with refused(RunError, "not empty", "--resume", "--overwrite"):
        prepared(my_run.path, CONFIG)
    assert tree(my_run.path) == before
    prepared(my_run.path, CONFIG, resume=True).release()


WAYS = pytest.mark.parametrize("way", ["resume", "overwrite"])
CONFIGS = {
    "none": None,
    "another-kind": b"kind: painter\n",
    "a-list-of-kinds": b"kind: [teacher]\n",
    "not-yaml": b"kind: [teacher",
    "not-text": b"\xff\xfe\x80\x81",
}


@WAYS
@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_a_run_stays(tmp_path: Path, way: str, content: bytes | None) -> None:
    """A project folder of Hydra's or Jekyll's has a config.yaml too."""
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "chapter1.tex").write_text("years of work")
    before = tree(tmp_path)
    for place in (tmp_path, tmp_path / "chapter1.tex"):
        with refused(RunError, "something else than a run", "--out"):
            prepared(place, CONFIG, **{way: True})
    assert tree(tmp_path) == before


RATE = {**CONFIG, "train": {"lr": 2e-4, "milestones": (1, 2)}}
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({**CONFIG, "views": 3}, ": views: 3, not None"),
    ({key: CONFIG[key] for key in ("train", "views")}, ": kind: None, not student"),
    ({**RATE, "views": 3}, ": train.lr: 0.0002, not 0.0001; views: 3, not None"),
]


@pytest.mark.parametrize(("other", "named"), OTHERS, ids=["value", "key-gone", "two"])
def test_resume_with_other_settings_names_the_keys(
    my_run: RunDirectory, other: dict[str, Any], named: str
) -> None:
    before = tree(my_run.path)
    with pytest.raises(RunError) as refused:
        prepared(my_run.path, other, resume=True)
    assert refused.value.cause.endswith(named)
    assert tree(my_run.path) == before


def test_resume_goes_on_without_a_key_that_is_null(my_run: RunDirectory) -> None:
    """A later program has settings that an earlier one did not write."""
    my_run.save_checkpoint({"position": 7})
    again = begun(my_run.path, {**CONFIG, "new": None}, resume=True)
    assert again.load_checkpoint(CPU) == {"position": 7}
    kept = yaml.safe_load(again.config_text)
    assert kept["new"] is None
    assert kept["train"] == {"lr": 1e-4, "milestones": [1, 2]}


def test_places_that_are_refused(tmp_path: Path) -> None:
    attributes = {"attributes": {"format": "teacher-logit-cache"}}
    cache = tmp_path / "c.zarr"
    cache.mkdir()
    (cache / "zarr.json").write_text(json.dumps(attributes))
    (tmp_path / "file").write_text("")
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    before = tree(tmp_path)
    for place, message, ways in (
        (cache / "runs" / "kd", "lies inside the cache", {}),
        (tmp_path / "file" / "run", "cannot make", {}),
        (tmp_path / "latest", "latest", {"resume": True}),
        (tmp_path / "latest", "latest", {"overwrite": True}),
    ):
        with pytest.raises(RunError, match=message):
            prepared(place, CONFIG, **ways)
    assert tree(tmp_path) == before


STATE = {"position": 3, "weights_of": torch.arange(1000.0)}


def goes_on(run: RunDirectory) -> dict[str, Any] | None:
    """What the run would go on from."""
    again = prepared(run.path, CONFIG, resume=True)
    try:
        return again.load_checkpoint(CPU)
    finally:
        again.release()


def test_a_checkpoint_with_any_bit_flipped_is_told(my_run: RunDirectory, tmp_path: Path) -> None:
    """As is one of another run, or without a digest."""
    assert goes_on(my_run) is None
    my_run.save_checkpoint(STATE)
    file = my_run.path / "last.pt"
    content, last = file.read_bytes(), len(file.read_bytes()) - 1
    assert torch.load(file, weights_only=True)["position"] == 3
    found = goes_on(my_run)
    assert found is not None
    assert torch.equal(found["weights_of"], STATE["weights_of"])
    without_digest = io.BytesIO()
    torch.save(STATE, without_digest)
    harmed = [b"", b"junk", content[:-1], content[: last // 2], content + b"0"]
    harmed += [flipped(content, 0), flipped(content, last, 128), without_digest.getvalue()]
    random = torch.Generator().manual_seed(0)
    places = torch.randint(len(content) * 8, (40,), generator=random).tolist()
    for bad in (*harmed, *(flipped(content, place // 8, 1 << place % 8) for place in places)):
        file.write_bytes(bad)
        before = tree(my_run.path)
        with refused(RunError, "last.pt is damaged", "--overwrite"):
            goes_on(my_run)
        assert tree(my_run.path) == before
    other = begun(tmp_path / "other", {**CONFIG, "views": 3})
    other.save_checkpoint(STATE)
    shutil.copy(other.path / "last.pt", file)
    with pytest.raises(RunError, match=r"last\.pt does not fit this run"):
        goes_on(my_run)


def write_config(run: RunDirectory, epochs: int) -> None:
    run.config_text = f"epochs: {epochs}\n"
    run.begin()


WRITES: dict[str, Callable[[RunDirectory, int], None]] = {
    "last.pt": lambda run, n: run.save_checkpoint({"position": n}),
    "model.safetensors": lambda run, n: run.save_weights(nn.Linear(n, 2).state_dict()),
    "summary.json": lambda run, n: run.save_summary({"epochs": n}),
    "metrics.jsonl": lambda run, n: run.begin([{"epoch": e} for e in range(n)]),
    "config.yaml": write_config,
}


@pytest.mark.parametrize("full", [True, False], ids=["full-disk", "killed"])
@pytest.mark.parametrize("name", list(WRITES))
def test_files_are_replaced_whole(
    my_run: RunDirectory, monkeypatch: pytest.MonkeyPatch, name: str, full: bool
) -> None:
    """What fails before the new file takes the old one's place leaves the old one."""
    my_run.goes_on = True
    WRITES[name](my_run, 2)
    before = (my_run.path / name).read_bytes()

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device") if full else KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(RunError if full else KeyboardInterrupt) as caught:
        WRITES[name](my_run, 1)
    assert (my_run.path / name).read_bytes() == before
    if isinstance(caught.value, RunError):
        assert "--resume" in caught.value.remedy
        assert not (my_run.path / f"{name}.partial").exists()
    monkeypatch.undo()
    WRITES[name](my_run, 1)
    assert (my_run.path / name).read_bytes() != before


def test_metrics_of_epochs_that_will_be_run_again_are_dropped(my_run: RunDirectory) -> None:
    path = my_run.path / "metrics.jsonl"
    lines = [{"epoch": epoch, "loss": 0.1 * epoch} for epoch in range(3)]
    for line in lines:
        my_run.add_metrics(line)
    path.write_text(path.read_text() + '{"epoch": 3, "lo')  # killed while writing
    my_run.goes_on = True
    my_run.begin(lines[:2])
    my_run.add_metrics(lines[2])
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines


def test_tied_weights_and_those_of_any_strides_can_be_saved(my_run: RunDirectory) -> None:
    """As plain, contiguous tensors."""
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    for module in (
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        nn.Sequential(one, other),
    ):
        my_run.save_weights(module.state_dict())
        found = load_file(my_run.path / "model.safetensors")
        assert found.keys() == module.state_dict().keys()
        assert all(torch.equal(found[n], tensor) for n, tensor in module.state_dict().items())


def finished(path: Path) -> RunDirectory:
    """A run with every file that a run may have, and half-written ones."""
    run = begun(path)
    WRITES["last.pt"](run, 1)
    WRITES["model.safetensors"](run, 1)
    WRITES["summary.json"](run, 1)
    run.log("hello")
    (path / "last.pt.partial").write_bytes(b"half")
    (path / "tensorboard").mkdir()
    (path / "tensorboard" / "events.out.tfevents.1700000000.host.1.0").write_bytes(b"events")
    (path / ".DS_Store").write_bytes(b"the system's")
    return run


MINE: dict[str, Callable[[Path], object]] = {
    "notes": lambda run: (run / "notes.txt").write_text("mine"),
    "cache": lambda run: (run / "a.zarr").mkdir(),
    "nested-run": lambda run: begun(run / "inner"),
    "among-events": lambda run: (run / "tensorboard" / "notes.txt").write_text("mine"),
    "event-folder-elsewhere": lambda run: (run / "tensorboard").symlink_to(
        (run / "tensorboard").rename(run.parent / "elsewhere")
    ),
    "folder-of-that-name": lambda run: (run / "log.txt.partial").mkdir(),
}


def test_overwrite_removes_every_file_of_a_run(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    with pytest.raises(RunError, match="cannot be resumed and overwritten"):
        prepared(run.path, CONFIG, resume=True, overwrite=True)
    again = begun(run.path, {**CONFIG, "kind": "teacher"}, overwrite=True)
    assert set(tree(run.path)) == BEGUN | {".DS_Store"}
    assert not (run.path / "tensorboard").exists()
    assert yaml.safe_load(again.config_text)["kind"] == "teacher"


@pytest.mark.parametrize("put", MINE.values(), ids=MINE)
def test_overwrite_refuses_what_is_not_the_runs(
    tmp_path: Path, put: Callable[[Path], object]
) -> None:
    run = finished(tmp_path / "run")
    put(run.path)
    before = tree(tmp_path)
    with refused(RunError, "files that are not the run's", "--out"):
        prepared(run.path, CONFIG, overwrite=True)
    assert tree(tmp_path) == before


def test_overwrite_through_a_link(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (tmp_path / "latest").symlink_to(run.path)
    begun(tmp_path / "latest", {**CONFIG, "views": 3}, overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert read_config(run.path)["views"] == 3
    assert not (run.path / "last.pt").exists()


def test_the_weights_to_start_from_are_not_overwritten(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    before = tree(tmp_path)
    config = {**CONFIG, "model": {"init": f"{tmp_path}/./run"}}
    with pytest.raises(RunError, match="weights to start from"):
        prepared(run.path, config, overwrite=True)
    assert tree(tmp_path) == before


@WAYS
def test_a_second_writer_is_refused_before_anything_is_removed(tmp_path: Path, way: str) -> None:
    run = finished(tmp_path / "run")
    first = prepared(run.path, CONFIG, resume=True)
    before = tree(tmp_path)
    with pytest.raises(RunError, match=f"another process is writing to {run.path}"):
        prepared(run.path, CONFIG, **{way: True})
    assert tree(tmp_path) == before
    first.release()
    prepared(run.path, CONFIG, **{way: True}).release()


def test_a_forked_process_does_not_hold_what_its_parent_held(tmp_path: Path) -> None:
    """A DataLoader's worker may outlive a training that was killed."""
    first = prepared(tmp_path / "run", CONFIG)
    (reading, writing), (begun, begins) = os.pipe(), os.pipe()
    if (number := os.fork()) == 0:
        os.close(writing)
        os.write(begins, b"1")  # what it inherited has been let go by now
        os.read(reading, 1)  # until the parent has closed its end
        os._exit(0)
    os.read(begun, 1)
    first.release()
    prepared(tmp_path / "run", CONFIG).release()
    os.close(writing)
    os.waitpid(number, 0)
    for end in (reading, begun, begins):
        os.close(end)
