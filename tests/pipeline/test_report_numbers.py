"""The numbers of a report against naive loops over the rows of the cache."""

import base64
import io
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import naive_ece, naive_softmax, resized
from PIL import Image
from reports import Element, page_of
from torch import Tensor

from pipeline.report.gallery import choose_samples, load_images
from pipeline.report.measured import calibration_of, count_mistakes, draw_rows, entropy
from stages.cache import LogitCache
from stages.cache_teacher import CacheJob, cache_teacher
from stages.data import Splits
from stages.inputs.views import view_policy


def rows_of(cache: LogitCache) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Logits float64 (n, C), labels and predictions of all views, in dataset order."""
    samples, labels = torch.arange(cache.num_samples), cache.labels
    views = [cache.read_view(view) for view in range(cache.num_views)]
    predictions = [torch.where(view.wrong(samples), -1, labels) for view in views]
    logits = torch.cat([view.rows(samples).double() for view in views])
    return logits, labels.repeat(len(views)).numpy(), torch.cat(predictions).numpy()


@pytest.fixture(scope="module")
def plain_cache(tiny_job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three views of 60 samples; nothing is rectified in it. Read only."""
    path = tmp_path_factory.mktemp("report") / "digits.zarr"
    cache_teacher(resized(tiny_job, 60, 20, views=3), path)
    return path


@pytest.fixture(scope="module")
def page(plain_cache: Path, tiny_splits: Splits) -> Element:
    with pytest.MonkeyPatch.context() as patch:  # the images of fewer samples than digits has
        patch.setattr("pipeline.report.gallery.load_dataset", lambda *_, **__: tiny_splits.train)
        return page_of(plain_cache)


def test_calibration_of_both_splits(page: Element, plain_cache: Path) -> None:
    logits, labels, predictions = rows_of(LogitCache.open(plain_cache))
    right = labels == predictions
    assert page.value("ece") == pytest.approx(naive_ece(logits, right), abs=1e-6)
    confidence = np.mean([max(naive_softmax(row)) for row in logits.tolist()])
    assert page.value("overconfidence") == pytest.approx(confidence - right.mean(), abs=1e-6)
    logits, answers = LogitCache.open(plain_cache).eval_logits()
    right = (logits.argmax(1) == answers).numpy()
    assert page.value("test_top1") == right.mean()
    assert page.value("test_ece") == pytest.approx(naive_ece(logits, right), abs=1e-6)


def test_a_certain_row_falls_into_the_last_bin_and_an_even_one_where_it_belongs() -> None:
    logits = torch.zeros(2, 7)
    logits[0, 3] = 200
    found = calibration_of(logits, torch.tensor([True, False]))
    assert found.rows.nonzero().squeeze(1).tolist() == [2, 14]  # 15 / 7 = 2.1
    assert found.ece == pytest.approx((1 / 7) / 2, abs=1e-6)


def test_wrong_rate_of_every_class(page: Element, plain_cache: Path) -> None:
    cache = LogitCache.open(plain_cache)
    _, labels, predictions = rows_of(cache)
    (table,) = [t for t in page.find("table") if "Wrong rate by class" in t.text]
    shown = {}
    for row in table.find("tbody")[0].find("tr"):
        shown[row.find("th")[0].text] = (row.value("class_wrong_rate"), row.value("class_wrong"))
    for label, name in enumerate(cache.identity.dataset.class_names):
        wrong = [p != k for k, p in zip(labels, predictions, strict=True) if k == label]
        assert shown[name] == (sum(wrong) / len(wrong), sum(wrong))
    assert list(shown.values()) == sorted(shown.values(), reverse=True, key=lambda v: v[0])
    assert page.value("wrong_rate") == np.mean(labels != predictions)


def test_confused_pairs_are_those_of_the_rectification(small_cache: Path) -> None:
    cache = LogitCache.open(small_cache)
    statistics = cache.rectification("pairwise-T4").statistics
    mistakes, names = count_mistakes(cache), cache.identity.dataset.class_names
    counts = Counter({(names[k], names[p]): n for k, p, n in mistakes.confused})
    for pair in statistics["most_confused"]:
        assert counts[pair["label"], pair["predicted"]] == pair["count"]
    assert mistakes.rate == statistics["wrong_rate"]
    assert [*cache.top1_per_view.values()] == pytest.approx(statistics["top1_per_view"])


def test_entropy_of_right_and_wrong_rows(page: Element, plain_cache: Path) -> None:
    logits, labels, predictions = rows_of(LogitCache.open(plain_cache))
    right = labels == predictions
    for field, chosen in (("entropy_right", right), ("entropy_wrong", ~right)):
        rows = [naive_softmax(row) for row in logits[chosen].tolist()]
        naive = np.mean([-sum(p * math.log(p) for p in row if p > 0) for row in rows])
        assert page.value(field) == pytest.approx(naive, abs=1e-5)


def test_rows_before_and_after_are_what_a_student_gets(small_cache: Path) -> None:
    cache = LogitCache.open(small_cache)
    draw = draw_rows(cache, "pairwise-T4")
    assert draw.temperature == 4
    assert draw.after is not None
    wrong = draw.wrong.nonzero().squeeze(1)
    for name, logits in ((None, draw.before), ("pairwise-T4", draw.after)):
        rows = torch.stack([cache.distribution(v, name, 4) for v in range(cache.num_views)])
        theirs = rows[draw.views[wrong], draw.samples[wrong]]
        torch.testing.assert_close(torch.softmax(logits / 4, dim=1), theirs)
    assert float(entropy(draw.after, 4).mean()) != float(entropy(draw.before, 4).mean())


@pytest.mark.parametrize(("rows", "views"), [(40, 2), (7, 3), (1, 1)])
def test_a_large_cache_is_drawn_from(plain_cache: Path, rows: int, views: int) -> None:
    cache = LogitCache.open(plain_cache)
    draw = draw_rows(cache, None, max_rows=rows, max_views=views)
    assert len(draw.labels) == rows // views * views
    assert len(draw.views.unique()) == views
    assert not draw.complete
    assert draw.total == 3 * cache.num_samples
    for view, sample, logits in zip(draw.views, draw.samples, draw.logits, strict=True):
        theirs = cache.read_view(int(view)).rows(sample[None])[0]
        assert torch.equal(theirs, logits)
    assert torch.equal(draw.labels, cache.labels[draw.samples])
    assert len(set(draw.samples.tolist())) == len(draw.samples), "other samples in every view"


def test_predictions_are_counted_up_to_a_limit(plain_cache: Path) -> None:
    cache = LogitCache.open(plain_cache)
    mistakes = count_mistakes(cache, max_predictions=60)
    first = [cache.predictions(view)[:20] != cache.row_labels[:20] for view in range(3)]
    assert (mistakes.used, mistakes.total) == (60, 180)
    assert int(mistakes.wrong.sum()) == int(torch.stack(first).sum())


def test_the_page_says_how_many_rows_were_used(page: Element, small_cache: Path) -> None:
    assert page.value("rows_used") == 180
    assert "all of them" in page.text
    assert "Nothing is rectified" in page.text
    draw = draw_rows(LogitCache.open(small_cache), None)
    assert (draw.complete, len(draw.labels)) == (True, 600)


def assert_shown(card: Element, images: Tensor) -> None:
    """The picture in a card of the gallery is the view of a sample that the card names."""
    sample, view = int(card.attributes["data-sample"]), int(card.attributes["data-view"])
    (image,) = card.find("img")
    content = base64.b64decode(image.attributes["src"].partition(",")[2])
    shown = np.array(Image.open(io.BytesIO(content)))
    policy = view_policy("pad-crop:pad=2")
    expected = policy.apply(images[[sample]], torch.tensor([sample]), view)
    assert np.array_equal(shown, expected[0, 0].numpy())


def test_the_gallery_shows_the_pixels_that_the_teacher_saw(
    page: Element, plain_cache: Path, tiny_splits: Splits
) -> None:
    cache, images, cards = (
        LogitCache.open(plain_cache),
        tiny_splits.train.images,
        page.find("article"),
    )
    assert images is not None
    assert len(cards) == 12
    for card in cards:
        assert_shown(card, images)
        targets = cache.read_view(int(card.attributes["data-view"]))
        assert bool(targets.wrong(torch.tensor([int(card.attributes["data-sample"])])))


def test_surest_mistakes_come_first_and_no_sample_twice(plain_cache: Path) -> None:
    draw = draw_rows(LogitCache.open(plain_cache), None)
    chosen = choose_samples(draw)
    sure = [sample.confidence for sample in chosen if sample.kind == "sure"]
    assert sure == sorted(sure, reverse=True)
    highest = torch.softmax(draw.logits[draw.wrong], dim=1).max()
    assert sure[0] == pytest.approx(float(highest))
    assert len({sample.sample for sample in chosen}) == len(chosen)
    assert len({sample.view for sample in chosen if sample.kind == "drawn"}) > 1


def test_another_dataset_is_not_shown(small_cache: Path) -> None:
    """The small cache holds 300 of the digits: the whole dataset is another one."""
    cache = LogitCache.open(small_cache)
    images = load_images(cache, choose_samples(draw_rows(cache, None)), None, None)
    assert images.uris == {}
    assert "another dataset" in images.note
