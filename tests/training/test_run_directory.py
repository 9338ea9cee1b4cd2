"""What a run directory refuses, and that its files are replaced whole."""

import errno
import io
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from damage import tree
from helpers import prepared
from safetensors.torch import load_file
from torch import nn

from stages.errors import RunError
from stages.inputs.run_files import check_file, read_config, read_summary
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
    assert set(tree(my_run.path)) == BEGUN
    kept = yaml.safe_load((my_run.path / "config.yaml").read_text())
    assert kept == {"kind": "student", "train": {"lr": 1e-4, "milestones": [1, 2]}, "views": None}
    assert my_run.config_text == (my_run.path / "config.yaml").read_text()


def test_a_used_one_is_refused_with_the_way_out_and_not_held(my_run: RunDirectory) -> None:
    before = tree(my_run.path)
    with pytest.raises(RunError, match="not empty") as refused:
        prepared(my_run.path, CONFIG)
    assert "--resume" in refused.value.remedy
    assert "--overwrite" in refused.value.remedy
    assert tree(my_run.path) == before
    prepared(my_run.path, CONFIG, resume=True).release()


CONFIGS = {
    "none": None,
    "another-kind": b"kind: painter\n",
    "a-list-of-kinds": b"kind: [teacher]\n",
    "not-yaml": b"kind: [teacher",
    "not-text": b"\xff\xfe\x80\x81",
}


@pytest.mark.parametrize("way", ["resume", "overwrite"])
@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_a_run_stays(tmp_path: Path, way: str, content: bytes | None) -> None:
    """A project folder of Hydra's or Jekyll's has a config.yaml too."""
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "chapter1.tex").write_text("years of work")
    before = tree(tmp_path)
    for place in (tmp_path, tmp_path / "chapter1.tex"):
        with pytest.raises(RunError, match="something else than a run") as refused:
            prepared(place, CONFIG, **{way: True})
        assert "--out" in refused.value.remedy
    assert tree(tmp_path) == before


RATE = {**CONFIG, "train": {"lr": 2e-4, "milestones": (1, 2)}}
OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "value": ({**CONFIG, "views": 3}, ["views: 3, not None"]),
    "key-gone": ({key: CONFIG[key] for key in ("train", "views")}, ["kind: None, not student"]),
    "two": ({**RATE, "views": 3}, ["train.lr: 0.0002, not 0.0001", "views: 3, not None"]),
}


@pytest.mark.parametrize(("other", "named"), OTHERS.values(), ids=OTHERS)
def test_resume_with_other_settings_names_the_keys(
    my_run: RunDirectory, other: dict[str, Any], named: list[str]
) -> None:
    before = tree(my_run.path)
    with pytest.raises(RunError) as refused:
        prepared(my_run.path, other, resume=True)
    assert refused.value.cause.endswith(f": {'; '.join(named)}")
    assert tree(my_run.path) == before


def test_resume_goes_on_without_a_key_that_is_null(my_run: RunDirectory) -> None:
    """A later program has settings that an earlier one did not write."""
    my_run.save_checkpoint({"position": 7})
    again = begun(my_run.path, {**CONFIG, "new": None}, resume=True)
    assert again.load_checkpoint(CPU) == {"position": 7}
    kept = yaml.safe_load(again.config_text)
    assert kept["new"] is None
    assert kept["train"] == {"lr": 1e-4, "milestones": [1, 2]}


def test_nothing_is_written_into_a_cache(tmp_path: Path) -> None:
    attributes = {"attributes": {"format": "teacher-logit-cache"}}
    (tmp_path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(RunError, match="lies inside the cache"):
        prepared(tmp_path / "runs" / "kd", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["zarr.json"]


STATE = {"position": 3, "weights_of": torch.arange(1000.0)}


def whole_checkpoint(run: RunDirectory) -> bytes:
    run.save_checkpoint(STATE)
    return (run.path / "last.pt").read_bytes()


def goes_on(run: RunDirectory) -> dict[str, Any] | None:
    """What the run would go on from."""
    again = prepared(run.path, CONFIG, resume=True)
    try:
        return again.load_checkpoint(CPU)
    finally:
        again.release()


def test_a_checkpoint_with_any_bit_flipped_is_told(my_run: RunDirectory) -> None:
    assert goes_on(my_run) is None
    content = whole_checkpoint(my_run)
    assert torch.load(my_run.path / "last.pt", weights_only=True)["position"] == 3
    found = goes_on(my_run)
    assert found is not None
    assert torch.equal(found["weights_of"], STATE["weights_of"])
    random = torch.Generator().manual_seed(0)
    places = torch.randint(len(content) * 8, (40,), generator=random).tolist()
    harmed = [b"", b"junk", content[:-1], content[: len(content) // 2], content + b"0"]
    for place in (0, *places, len(content) * 8 - 1):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        harmed.append(bytes(flipped))
    for bad in (*harmed, torch_saved(STATE)):  # the last without a digest
        (my_run.path / "last.pt").write_bytes(bad)
        before = tree(my_run.path)
        with pytest.raises(RunError, match=r"last\.pt is damaged") as caught:
            goes_on(my_run)
        assert "--overwrite" in caught.value.remedy
        assert tree(my_run.path) == before


def torch_saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_a_checkpoint_of_another_run_is_told(my_run: RunDirectory, tmp_path: Path) -> None:
    other = begun(tmp_path / "other", {**CONFIG, "views": 3})
    (my_run.path / "last.pt").write_bytes(whole_checkpoint(other))
    with pytest.raises(RunError, match=r"last\.pt does not fit this run"):
        goes_on(my_run)


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make"):
        prepared(tmp_path / "file" / "run", CONFIG)


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
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    with_strides = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    my_run.save_weights(with_strides.state_dict())  # as plain, contiguous tensors
    found = load_file(my_run.path / "model.safetensors")
    assert torch.equal(found["weight"], with_strides.weight)
    my_run.save_weights(nn.Sequential(one, other).state_dict())
    found = load_file(my_run.path / "model.safetensors")
    assert found.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for name in ("0.weight", "1.weight"):
        assert torch.equal(found[name], one.weight)
    assert torch.equal(found["1.bias"], other.bias)


# ---- only its own files ---------------------------------------------------------------------


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
    "event-folder-elsewhere": lambda run: linked_elsewhere(run / "tensorboard"),
    "folder-of-that-name": lambda run: (run / "log.txt.partial").mkdir(),
}


def linked_elsewhere(folder: Path) -> None:
    folder.rename(folder.parents[1] / "elsewhere")
    folder.symlink_to(folder.parents[1] / "elsewhere")


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
    with pytest.raises(RunError, match="files that are not the run's") as refused:
        prepared(run.path, CONFIG, overwrite=True)
    assert "--out" in refused.value.remedy
    assert tree(tmp_path) == before


def test_overwrite_through_a_link(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (tmp_path / "latest").symlink_to(run.path)
    begun(tmp_path / "latest", {**CONFIG, "views": 3}, overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert read_config(run.path)["views"] == 3
    assert not (run.path / "last.pt").exists()


@pytest.mark.parametrize("way", ["resume", "overwrite"])
def test_a_link_to_nowhere_is_refused(tmp_path: Path, way: str) -> None:
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match="latest"):
        prepared(tmp_path / "latest", CONFIG, **{way: True})


def test_the_weights_to_start_from_are_not_overwritten(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    before = tree(tmp_path)
    config = {**CONFIG, "model": {"init": f"{tmp_path}/./run"}}
    with pytest.raises(RunError, match="weights to start from"):
        prepared(run.path, config, overwrite=True)
    assert tree(tmp_path) == before


# ---- one writer -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["resume", "overwrite"])
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
    reading, writing = os.pipe()
    if (number := os.fork()) == 0:
        os.write(writing, b"here")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reading, 4) == b"here"
        first.release()
        prepared(tmp_path / "run", CONFIG).release()
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        os.close(reading)
        os.close(writing)


# ---- as others read it ----------------------------------------------------------------------


def read_everything(run: Path) -> tuple[Any, ...]:
    summary = read_summary(run)
    for name in ("metrics.jsonl", "model.safetensors"):
        check_file(run, name)
    return read_config(run), summary


@pytest.mark.parametrize(
    "name", ["config.yaml", "summary.json", "metrics.jsonl", "model.safetensors"]
)
def test_damage_is_told_or_changes_nothing(tmp_path: Path, name: str) -> None:
    run = begun(tmp_path / "run")
    run.add_metrics({"epoch": 0, "loss": 0.5})
    run.save_weights(nn.Linear(2, 2).state_dict())
    run.save_summary({"last": {"test_top1": 0.5}, "epochs": 1})
    file, right = run.path / name, read_everything(run.path)
    content, message = file.read_bytes(), 0
    random = torch.Generator().manual_seed(0)
    for place in torch.randint(len(content) * 8, (100,), generator=random).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            assert read_everything(run.path)[0].items() >= right[0].items()
        except RunError:
            message += 1
        else:
            assert name == "summary.json" or place < 8 * content.index(b"\n")
    assert message >= 70
    for part in (b"", content[: len(content) // 2]):
        file.write_bytes(part)
        with pytest.raises(RunError, match=re.escape(name)):
            read_everything(run.path)
