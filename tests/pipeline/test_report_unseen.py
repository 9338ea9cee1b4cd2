"""The report of a cache of folds beside one of one teacher, and of labels that may be wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import cache_of, cut, naive_ece, naive_softmax, teacher_of
from reports import Element, page_of
from test_report_numbers import assert_shown, rows_of

from pipeline.report.suspects import suspected_of
from stages.cache import LogitCache
from stages.calibrate import calibrate
from stages.data import Splits
from stages.rectify import rectify
from stages.settings import RectifyConfig
from stages.suspects import suspected_labels
from stages.train_teacher import train_folds

SAMPLES, SURE = 80, 0.11


@pytest.fixture(scope="module")
def my_splits(digits: Splits) -> Splits:
    return cut(digits, SAMPLES, 20)


@pytest.fixture(scope="module")
def my_caches(
    my_splits: Splits, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two views of 80 digits: of two folds, with labels that may be wrong, and of one teacher."""
    folder, splits = tmp_path_factory.mktemp("unseen"), my_splits
    config = teacher_of(train__epochs=3, train__batch_size=20, folds=2)
    train_folds(config, folder / "t", splits=splits)
    folds = cache_of(folder / "t", folder / "folds.zarr", splits, encoding="float32")
    one = cache_of(teacher_run, folder / "one.zarr", splits, encoding="float32")
    rectify(folds, RectifyConfig(wrong=f"confidence:{SURE}"))
    return folds, one


@pytest.fixture(scope="module")
def my_page(my_caches: tuple[Path, Path], my_splits: Splits) -> Element:
    calibrate(my_caches[1])
    with pytest.MonkeyPatch.context() as patch:  # the images of fewer samples than digits has
        patch.setattr("pipeline.report.gallery.load_dataset", lambda *_, **__: my_splits.train)
        return page_of(*my_caches)


def test_both_teachers_by_loops_over_their_rows(
    my_page: Element, my_caches: tuple[Path, Path]
) -> None:
    """Out of fold first."""
    (table,) = (t for t in my_page.find("table") if t.find(data_field="unseen_nll"))
    for at, path in enumerate(my_caches):
        logits, labels, predictions = rows_of(LogitCache.open(path))
        p = np.array([naive_softmax(row) for row in logits.tolist()])
        right = labels == predictions
        expected = {
            "unseen_confidence": p.max(1).mean(),
            "unseen_wrong_rate": 1 - right.mean(),
            "unseen_overconfidence": p.max(1).mean() - right.mean(),
            "unseen_ece": naive_ece(logits, right),
            "unseen_nll": -np.log(p[np.arange(len(p)), labels]).mean(),
        }
        for field, value in expected.items():
            assert table.values(field)[at] == pytest.approx(value, abs=1e-6), field
    out_of_fold, one = (row.text for row in table.find("tr")[1:])
    assert "out of fold" in out_of_fold
    assert "one teacher" in one
    assert f"{LogitCache.open(my_caches[1]).calibration:.3g}" in one


def test_labels_that_may_be_wrong_are_shown_with_their_images(
    my_page: Element, my_caches: tuple[Path, Path], my_splits: Splits
) -> None:
    cache, shown = LogitCache.open(my_caches[0]), my_splits.train.images
    assert shown is not None
    (name,) = cache.rectifications
    found = suspected_labels(cache, name)
    assert len(found) > 3
    assert my_page.value("suspected_labels") == len(found)
    (gallery,) = (g for g in my_page.find(class_="gallery") if "may be" in g.text)
    cards = gallery.find("article")
    names = cache.identity.dataset.class_names
    for card, suspect in zip(cards, found[:12], strict=True):
        assert int(card.attributes["data-sample"]) == suspect.sample
        view = int(card.attributes["data-view"])
        targets = cache.read_view(view)
        (row,) = targets.rows(torch.tensor([suspect.sample]))
        p = np.array(naive_softmax(row.double().tolist()))
        assert int(p.argmax()) == suspect.predicted
        assert p.max() >= SURE
        assert f"confidence {100 * p.max():.1f}%" in card.text.replace(" %", "%")
        assert f"{names[suspect.label]} may be {names[suspect.predicted]}" in card.text
        assert f"confident on {suspect.views} of 2 views" in card.text
        assert_shown(card, shown)


def test_a_cache_of_folds_by_itself(
    my_caches: tuple[Path, Path], small_cache: Path, tmp_path: Path
) -> None:
    """Nothing is beside it, and no label is suspected without a rule."""
    assert suspected_of(LogitCache.open(small_cache)) is None
    path = Path(shutil.copytree(my_caches[0], tmp_path / "folds.zarr"))
    shutil.rmtree(path / "rectified" / f"pairwise-T4-confidence{SURE}")
    shutil.rmtree(path / "commits" / "rectified")
    page = page_of(path)
    assert len(page.values("unseen_nll")) == 1
    assert not page.find(data_field="suspected_labels")
    assert "--wrong confidence:X" in page.text
