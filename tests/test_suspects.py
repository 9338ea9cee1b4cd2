"""Rectification of what the teacher is not sure of, and labels that it holds to be wrong."""

import csv
import shutil
from collections import Counter
from pathlib import Path

import click.testing
import numpy as np
import pytest
import torch
import zarr
from damage import flip, tree
from helpers import naive_softmax

from pipeline.cli import cli
from stages.cache import LogitCache
from stages.errors import CacheError, ConfigError
from stages.rectify import rectify
from stages.repair import repair
from stages.settings import RectifyConfig
from stages.suspects import Suspect, suspected_labels
from stages.teacher.job import CacheJob
from stages.verify import verify

SURE = 0.2
RULE = f"confidence:{SURE}"
NAME = "pairwise-T4-confidence0.2"


@pytest.fixture(scope="module")
def my_cache(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cache with a second rectification. Read only."""
    path = Path(shutil.copytree(small_cache, tmp_path_factory.mktemp("sure") / "c.zarr"))
    rectify(path, RectifyConfig(wrong=RULE))
    return path


def trusted_rows(cache: LogitCache, view: int) -> list[tuple[int, int]]:
    """By a loop: the sample and the answer of rows whose other class has the probability SURE."""
    rows = cache.read_view(view)
    found = []
    for sample in range(cache.num_samples):
        asked = torch.tensor([sample])
        answer = int(rows.predictions[rows.row_of[asked]])
        p = naive_softmax(rows.rows(asked)[0].tolist())
        if answer != int(cache.labels[sample]) and p[answer] >= SURE:
            found.append((sample, answer))
    return found


def test_sure_rows_are_left_and_the_others_rectified(my_cache: Path) -> None:
    cache, samples = LogitCache.open(my_cache), torch.arange(300)
    for view in (0, 1):
        trusted = torch.tensor([sample for sample, _ in trusted_rows(cache, view)])
        plain = cache.read_view(view, "pairwise-T4")
        found = cache.read_view(view, NAME).of(samples, rectified=True)
        expected = plain.rectified_rows(samples)
        expected[trusted] = plain.rows(trusted)
        assert 0 < len(trusted) < int(plain.wrong(samples).sum())
        assert torch.equal(found.at(), expected)
        wrong = plain.wrong(samples).index_fill(0, trusted, False)
        assert torch.equal(found.wrong(), wrong)
        stored = zarr.open_group(my_cache / "rectified" / NAME)["wrong"][view]
        assert (stored[np.argsort(cache.dataset_index.numpy())] == wrong.numpy()).all()


def test_statistics_count_what_was_left(my_cache: Path) -> None:
    cache = LogitCache.open(my_cache)
    found, plain = (cache.rectification(name).statistics for name in (NAME, "pairwise-T4"))
    assert found["trusted_rows"] == sum(len(trusted_rows(cache, view)) for view in (0, 1))
    assert "trusted_rows" not in plain
    for same in ("wrong_rows", "top1_per_view", "most_confused"):
        assert found[same] == plain[same]


def test_suspects_by_a_loop(my_cache: Path) -> None:
    cache, answers = LogitCache.open(my_cache), dict[int, list[int]]()
    for view in (0, 1):
        for sample, answer in trusted_rows(cache, view):
            answers.setdefault(sample, []).append(answer)
    found = suspected_labels(cache, NAME)
    assert {s.sample for s in found} == answers.keys()  # one view is half of them
    assert found == sorted(found, key=lambda s: (-s.views, s.sample))
    for suspect in found:
        said = Counter(answers[suspect.sample])
        assert suspect.views == len(answers[suspect.sample])
        assert said[suspect.predicted] == max(said.values())
        assert suspect.label == int(cache.labels[suspect.sample])
    assert suspected_labels(cache, "pairwise-T4") == []


def test_verify_computes_it_again_and_repair_mends_it(
    my_cache: Path, tmp_path: Path, small_job: CacheJob
) -> None:
    path = Path(shutil.copytree(my_cache, tmp_path / "c.zarr"))
    flip(path / "rectified" / NAME / "label_logit/c/0/0")
    faults = verify(path).faults
    assert {fault.part for fault in faults} == {f"rectified/{NAME}"}  # all else is computed alike
    assert not repair(path, small_job, faults).faults
    assert tree(path / "rectified") == tree(my_cache / "rectified")


def test_rules_that_there_are_not(my_cache: Path) -> None:
    with pytest.raises(CacheError, match="exists with other settings"):
        rectify(my_cache, RectifyConfig(wrong="confidence:0.3", name=NAME))
    for wrong in ("confidence", "confidence:0", "confidence:1.1", "loss:3", ""):
        with pytest.raises(ConfigError, match="confidence:X"):
            RectifyConfig(wrong=wrong)
    with pytest.raises(ConfigError, match="--wrong confidence:X"):  # suspects need a rule
        RectifyConfig(suspects="s.csv", wrong="label")


def test_the_command_writes_them(my_cache: Path, tmp_path: Path) -> None:
    given = ["rectify", str(my_cache), "--wrong", RULE, "--suspects", str(tmp_path / "s.csv")]
    done = click.testing.CliRunner().invoke(cli, given)
    assert done.exit_code == 0, done.output
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    names = LogitCache.open(my_cache).identity.dataset.class_names
    found = [
        Suspect(int(sample), names.index(label), names.index(predicted), int(views))
        for sample, label, predicted, views in (
            [row[key] for key in ("sample", "label", "predicted", "views")] for row in rows
        )
    ]
    assert found == suspected_labels(LogitCache.open(my_cache), NAME)
