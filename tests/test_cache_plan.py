import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers import first
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import ENCODINGS
from stages.cache.encoding.base import PLAIN_BUDGET
from stages.cache_teacher import cache_teacher, prepare
from stages.data import Splits
from stages.errors import CacheError, IdentityError
from stages.settings import CacheConfig
from stages.teacher.logits import TeacherPass
from stages.teacher.measure import measured_teacher
from stages.teacher.plan import CachePlan, plan_cache


@pytest.fixture(scope="module")
def few(digits: Splits) -> Splits:
    """300 training and 100 test images."""
    return Splits(first(digits.train, 300), first(digits.test, 100))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.teacher.measure.MEASURED_SECONDS", 0.05)


def files_and_bytes(store: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in store.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"block_rows": 100, "views": 3}, 9),
        pytest.param({"block_rows": 65_536, "views": 16}, 16, marks=SLOW),
        pytest.param({"block_rows": 150, "views": 2, "encoding": "klt"}, 4, marks=SLOW),
    ],
)
def test_a_plan_foretells_what_is_written(
    cache_config: CacheConfig, few: Splits, tmp_path: Path, changes: dict[str, Any], blocks: int
) -> None:
    config = msgspec.structs.replace(cache_config, **changes)
    job, out = prepare(config, few), tmp_path / "deep" / "c.zarr"

    plan = plan_cache(job, out)

    assert not out.parent.exists()  # planning writes nothing
    assert (plan.samples, plan.views) == (300, config.views)
    assert plan.blocks == plan.missing_blocks == blocks
    name = config.encoding.partition(":")[0]
    assert plan.encoding == {"auto": "float32"}.get(name, name)
    assert plan.missing_share == 1
    assert plan.device == "cpu"
    assert plan.fixed_seconds > 0  # fitting, making the store, the test split
    assert plan.hours * 3600 == pytest.approx(
        300 * config.views / plan.samples_per_second + plan.fixed_seconds, rel=1e-9
    )
    cache_teacher(job, out)
    files, everything = files_and_bytes(out)
    assert plan.files == files
    assert plan.total_bytes == pytest.approx(everything, rel=0.05 if blocks == 16 else 0.1)
    blocks_of = [*LogitCache.open(out).encoding.arrays(), "prediction"]
    shards = sum(files_and_bytes(out / name / "c")[1] for name in blocks_of)
    assert plan.total_bytes - plan.fixed_bytes == pytest.approx(shards, rel=0.25)


def test_a_plan_takes_the_smallest_encoding(
    cache_config: CacheConfig, few: Splits, tmp_path: Path
) -> None:
    def planned(max_kl: float) -> CachePlan:
        config = msgspec.structs.replace(cache_config, max_kl=max_kl)
        return plan_cache(prepare(config, few), tmp_path / "c.zarr")

    plan, exact = planned(5e-3), planned(1e-12)

    found = {m.coding.name: m for m in plan.encodings}
    assert list(found) == list(ENCODINGS)
    assert found["float32"].fidelity.mean_kl == (0, 0, 0, 0)
    assert found["float32"].fidelity.top1_agreement == 1
    assert found["klt"].fidelity.mean_kl[0] <= PLAIN_BUDGET[1.0]
    assert found["klt"].row_bytes < found["uint8"].row_bytes < found["float32"].row_bytes
    for measured in found.values():
        assert measured.fidelity.rows == 300
        assert measured.decoded_per_second > 0
    assert (plan.encoding, exact.encoding) == ("klt", "float32")
    able = [m for m in plan.encodings if m.fidelity.mean_kl[0] <= 5e-3]
    assert plan.bytes_per_view == min(m.row_bytes for m in able)


def test_a_plan_counts_what_is_missing(
    cache_config: CacheConfig, few: Splits, tmp_path: Path
) -> None:
    out, replace = tmp_path / "c.zarr", msgspec.structs.replace
    made = replace(cache_config, encoding="topk:k=4", views=2, block_rows=100)
    cache_teacher(prepare(made, few), out)

    plan = plan_cache(prepare(made, few), out)

    assert (plan.blocks, plan.missing_blocks, plan.hours) == (6, 0, 0)
    dataclasses.replace(plan, free_bytes=0).check_fits(out)

    (out / "commits/logits/v00001.json").unlink()
    asked = replace(made, encoding="auto", views=4, block_rows=65_536)
    plan = plan_cache(prepare(asked, few), out)

    assert (plan.blocks, plan.missing_blocks) == (12, 9)
    assert plan.missing_share == pytest.approx(9 / 12)
    assert plan.fixed_seconds == 0  # the store is made, and the test split is there
    assert plan.hours == pytest.approx(3 * 300 / plan.samples_per_second / 3600)
    assert plan.encoding == "topk"
    chosen = next(m for m in plan.encodings if m.coding.name == plan.encoding)
    assert chosen.coding.parameters == LogitCache.open(out).encoding.parameters
    assert plan.bytes_per_view == chosen.row_bytes


def test_another_cache_is_refused(
    finished_cache: Path, cache_config: CacheConfig, digits: Splits
) -> None:
    job = prepare(msgspec.structs.replace(cache_config, seed=1), digits)

    with pytest.raises(IdentityError, match=r"views\.seed: "):
        plan_cache(job, finished_cache)


PLAN = CachePlan(
    samples=1000,
    views=10,
    blocks=20,
    missing_blocks=5,
    encoding="float32",
    bytes_per_view=40.0,
    files=60,
    samples_per_second=100.0,
    free_bytes=10**9,
    device="cpu",
    encodings=[],
)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"free_bytes": 99_999}, False),
        ({"free_bytes": 100_000, "fixed_bytes": 10**6}, True),  # the rest is there
        ({"free_bytes": 0, "missing_blocks": 0}, True),
        ({"free_bytes": 499_999, "fixed_bytes": 10**5, "missing_blocks": 20}, False),
        ({"free_bytes": 500_000, "fixed_bytes": 10**5, "missing_blocks": 20}, True),
    ],
)
def test_only_what_is_missing_must_fit(changes: dict[str, Any], fits: bool) -> None:
    plan = dataclasses.replace(PLAN, **changes)

    if fits:
        plan.check_fits("shelf.zarr")
    else:
        with pytest.raises(CacheError, match=r"shelf\.zarr needs .* more") as caught:
            plan.check_fits("shelf.zarr")
        assert "--views" in caught.value.remedy


def test_the_rows_that_are_measured(
    cache_config: CacheConfig, few: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In runs that grow, each in whole batches; the rows that come back are the first ones."""
    job = prepare(msgspec.structs.replace(cache_config, batch_size=64), few)
    order, runs, of_views = job.row_order, [], TeacherPass.of_views

    def spy(teacher: TeacherPass, samples: Tensor, views: Sequence[int]) -> list[Tensor]:
        runs.append(samples.tolist())
        return of_views(teacher, samples, views)

    monkeypatch.setattr(TeacherPass, "of_views", spy)
    logits, pace = measured_teacher(job)

    assert pace > 0
    warm_up, *timed = runs
    assert warm_up == order[:64].tolist()
    assert [len(run) for run in timed[:3]] == [64, 128, 256]
    asked = [sample for run in timed for sample in run]
    assert asked[:448] == [*order.tolist(), *order.tolist()[:148]]  # and round again
    torch.testing.assert_close(logits, of_views(TeacherPass.of(job), order, [0])[0])


@pytest.mark.parametrize(
    ("ranks", "missing", "fixed", "seconds"),
    [
        pytest.param(1, 20, 0, 100, id="alone"),
        pytest.param(4, 20, 0, 25, id="divided"),
        pytest.param(4, 20, 7, 32, id="what-does-not-grow-takes-its-time-once"),
        pytest.param(8, 20, 0, 15, id="three-blocks-at-the-most"),
        pytest.param(64, 5, 0, 5, id="more-ranks-than-blocks"),
        pytest.param(2, 0, 0, 0, id="nothing-missing"),
    ],
)
def test_time_is_that_of_the_last_rank(
    ranks: int, missing: int, fixed: float, seconds: float
) -> None:
    plan = dataclasses.replace(PLAN, ranks=ranks, missing_blocks=missing, fixed_seconds=fixed)

    assert plan.hours * 3600 == pytest.approx(seconds)
