"""Sizes as people write them, and slabs that fit."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers import refused, student_of
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding.klt import Klt
from stages.cache.metadata import NewCache
from stages.cache.targets import ViewTargets
from stages.errors import ConfigError
from stages.order import ViewSchedule
from stages.settings import TrainSettings
from stages.sizes import in_words, parse_bytes
from stages.targets import chunks, memory
from stages.targets.chunks import RESIDENT_BYTES, SlabPlan, available_bytes, plan_slabs, slab_bytes
from stages.targets.reader import TargetReader

CPU = torch.device("cpu")


def test_sizes() -> None:
    for text, count in {
        "4096": 4096,
        "2 gb": 2 * 10**9,
        "1.5GiB": 3 * 2**29,
        "64KiB": 2**16,
        "0.5TB": 5 * 10**11,
    }.items():
        assert parse_bytes(text, "x") == count
    for text in ("", "GB", "-1GB", "2GBs", "1e9", "2iB", "2,5GB"):
        with refused(ConfigError, ", not a size", "2GB"):
            parse_bytes(text, "slab_memory")
    for count in (0, 1, 999, 1000, 12345, 999_999, 25_010_000, 3 * 10**9 + 1):
        assert count <= parse_bytes(in_words(count), "x") <= count * 1.01 + 1  # given back


FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
SECOND = ("memory.max", "memory.current", "inactive_file")
MIB = 2**20


def group(
    folder: Path, names: tuple[str, str, str], limit: int | str, used: int, files: int
) -> None:
    """A control group's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\nactive_file 7\n")


@pytest.mark.parametrize(
    ("names", "line", "root"),
    [
        pytest.param(SECOND, "0::{}", "", id="version-2"),
        pytest.param(FIRST, "4:memory:{}", "memory", id="version-1"),
        pytest.param(FIRST, "4:cpu,memory:{}", "memory", id="version-1-shared"),
    ],
)
def test_memory_of_a_container_is_what_its_limit_leaves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str, str],
    line: str,
    root: str,
) -> None:
    mounted, own = tmp_path / "cgroup", tmp_path / "own"
    monkeypatch.setattr(memory, "_MOUNTED", mounted)
    monkeypatch.setattr(memory, "_OWN_GROUPS", own)
    assert 2**20 < (free := available_bytes(CPU)) < 2**50  # none is known

    own.write_text("1:name=systemd:/\n" + line.format("/job/step") + "\n")
    group(mounted / root / "job/step", names, 300 * MIB, 200 * MIB, 0)
    assert available_bytes(CPU) == 100 * MIB
    group(mounted / root / "job/step", names, 300 * MIB, 200 * MIB, 50 * MIB)
    assert available_bytes(CPU) == 150 * MIB
    group(mounted / root / "job", names, 900 * MIB, 800 * MIB, 20 * MIB)  # the one around it
    assert available_bytes(CPU) == 120 * MIB
    group(mounted / root / "job", names, 100 * MIB, 200 * MIB, 0)
    assert available_bytes(CPU) == 0

    own.write_text(line.format("/of/the/host") + "\n")  # as a container sees its own, mounted
    group(mounted / root, names, 60 * MIB, 20 * MIB, 0)
    assert available_bytes(CPU) == 40 * MIB
    group(mounted / root, names, "max" if names is SECOND else 2**63 - 4096, 20 * MIB, 0)
    assert available_bytes(CPU) > free / 2


@pytest.fixture
def my_cache(finished_cache: Path) -> LogitCache:
    """1,000 rows in three chunks of 334, 334 and 332."""
    return LogitCache.open(finished_cache)


def plan(
    cache: LogitCache, wanted: int | None, views: int = 3, at_once: int = 1, **more: Any
) -> SlabPlan:
    """more: samples, or batch_size."""
    memory = None if wanted is None else f"{wanted}"
    train = TrainSettings(batch_size=more.get("batch_size", 64))
    config = student_of(cache.path, slab_memory=memory, train=train)
    choices = [tuple(range(v, v + at_once)) for v in range(0, views, at_once)]
    schedule = ViewSchedule(choices, 0, epochs=20, per_decode=1)
    return plan_slabs([cache], schedule, more.get("samples", torch.arange(1000)), config, CPU)


def offered(remedy: str) -> int:
    """The size that a remedy names, in bytes."""
    found = re.fullmatch(r"Give --slab-memory (\S+).*", remedy, re.DOTALL)
    assert found is not None
    return parse_bytes(found[1], "x")


def test_views_share_labels_and_places_once_they_are_read(my_cache: LogitCache) -> None:
    labels = torch.arange(1000)
    schedule = ViewSchedule([(view,) for view in range(3)], seed=0, epochs=3)
    reader = TargetReader([my_cache], None, schedule, SlabPlan(resident=True), labels)
    read = [reader.of_epoch(epoch) for epoch in range(3)]
    tensors: list[Tensor] = []
    for targets in read:
        assert isinstance(targets, ViewTargets)
        tensors += [*targets.arrays.values(), targets.predictions, targets.labels, targets.row_of]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    unused = 3 * 1000 * 2 * 4  # a rectification, counted whether it is used or not
    of_three = slab_bytes([my_cache], 1000, views=3)
    assert sum(storages.values()) == of_three - unused
    assert slab_bytes([my_cache] * 3, 1000, views=3) == 3 * of_three


def test_all_views_of_cifar100_stay_resident(tmp_path: Path, my_cache: LogitCache) -> None:
    """162 views of 50,000 rows of 100 classes in klt: codes, answers and a rectification."""
    identity = my_cache.identity
    names = tuple(f"class {n}" for n in range(100))
    dataset = msgspec.structs.replace(identity.dataset, num_samples=50_000, class_names=names)
    cache = LogitCache.create(
        tmp_path / "c.zarr",
        NewCache(
            identity=msgspec.structs.replace(identity, dataset=dataset),
            coding=Klt(torch.eye(100), torch.zeros(100), torch.ones(100)),
            num_views=162,
            dataset_index=torch.arange(50_000),
            labels=torch.arange(50_000) % 100,
            eval_labels=torch.arange(100),
            pixel_probes=[],
            provenance={},
        ),
    )
    assert cache.row_bytes == 100 + 4 + 8
    settings = {"samples": torch.arange(50_000), "batch_size": 64}
    assert plan(cache, None, views=162, **settings) == SlabPlan(None, resident=True)
    assert slab_bytes([cache], 50_000, views=162) < RESIDENT_BYTES


def test_plans_by_budget(my_cache: LogitCache) -> None:
    two, three = (slab_bytes([my_cache], 1000, views) for views in (2, 3))
    three += 3 * 1000  # the masks of wrong rows
    assert plan(my_cache, None) == plan(my_cache, three) == SlabPlan(None, resident=True)
    assert plan(my_cache, three - 1) == plan(my_cache, two) == SlabPlan(None)
    grouped = plan(my_cache, two - 1)
    assert grouped.groups is not None
    assert (grouped.groups.most, grouped.groups.num_chunks, grouped.resident) == (2, 3, False)
    two_chunks = 2 * slab_bytes([my_cache], 334)
    one = slab_bytes([my_cache], 1000)
    assert plan(my_cache, one + 1000, views=1) == SlabPlan(None, resident=True)
    assert plan(my_cache, one, views=1) == SlabPlan(None)
    assert plan(my_cache, one - 1, views=1).groups is not None
    least = plan(my_cache, two_chunks)
    assert least.groups is not None
    assert least.groups.most == 1


def test_two_views_at_once_need_four(my_cache: LogitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    four = slab_bytes([my_cache], 1000, views=4) + 4 * 1000
    monkeypatch.setattr(chunks, "available_bytes", lambda device: 2 * four)
    assert plan(my_cache, None, views=10, at_once=2).groups is None
    monkeypatch.setattr(chunks, "available_bytes", lambda device: 2 * four - 2)
    assert plan(my_cache, None, views=2, at_once=2).groups is None
    with pytest.raises(ConfigError, match=r"targets of 4 views take .* more than half") as caught:
        plan(my_cache, None, views=10, at_once=2)
    assert "slab" not in caught.value.remedy


def test_too_small_a_budget_names_the_least(my_cache: LogitCache) -> None:
    least = 2 * slab_bytes([my_cache], 334)
    with pytest.raises(ConfigError, match=r"too small: two groups of whole chunks \(334") as caught:
        plan(my_cache, least - 1)
    assert plan(my_cache, offered(caught.value.remedy)).groups is not None


def test_a_group_is_never_smaller_than_a_batch(my_cache: LogitCache) -> None:
    """The smallest chunk has 332 rows; three chunks in groups of up to two are a 2 and a 1."""
    tight, batch_size = 2 * slab_bytes([my_cache], 334), 332
    assert plan(my_cache, tight, batch_size=331).groups is not None
    with pytest.raises(ConfigError, match="no smaller than a batch") as caught:
        plan(my_cache, tight, batch_size=batch_size)
    wanted = offered(caught.value.remedy)
    assert plan(my_cache, wanted, batch_size=batch_size) == SlabPlan(None)
    few = torch.arange(0, 1000, 5)  # the others are held out
    with pytest.raises(ConfigError, match="no smaller than a batch"):
        plan(my_cache, tight, samples=few, batch_size=100)
    assert plan(my_cache, tight, samples=few, batch_size=40).groups is not None


def test_nothing_is_chosen_silently_where_memory_is_short(
    my_cache: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = slab_bytes([my_cache], 1000, views=2) + 2 * 1000
    monkeypatch.setattr(chunks, "available_bytes", lambda device: 2 * two)
    assert plan(my_cache, None).groups is None
    monkeypatch.setattr(chunks, "available_bytes", lambda device: 2 * two - 2)
    with pytest.raises(ConfigError, match=r"targets of 2 views take .* more than half") as caught:
        plan(my_cache, None)
    plan(my_cache, offered(caught.value.remedy))  # what it offers works
    assert plan(my_cache, None, views=1).groups is None
