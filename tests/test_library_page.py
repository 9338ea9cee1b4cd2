"""docs/library.md against the code: names, signatures, members, dtypes and shapes, errors."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import stages
import stages.errors
from stages import CachedDataset, CachedEpochs, EpochSampler
from stages.cache.targets import ViewTargets
from stages.cached_dataset import CachedBatch

PAGE = (Path(__file__).parents[1] / "docs" / "library.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
TYPE = re.compile(r"(int64|float32|uint8|bool) \(([\w, ]+)\)")
SIZES = {"N": 1000, "M": 797, "K": 10}


def table(section: str, heading: str) -> dict[str, str]:
    """The first two columns of a section's table: a member, called as shown -> its type."""
    (rows,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", SECTIONS[section], re.M)
    cells = [row.split(" | ") for row in rows.splitlines()]
    return {name: cell[1].strip("| ") for cell in cells for name in re.findall(r"`(.+?)`", cell[0])}


Objects = dict[str, tuple[Any, dict[str, Any]]]


@pytest.fixture(scope="module")
def objects(rectified_cache: Path) -> Objects:
    """What each table is about, and what the arguments in it stand for."""
    dataset, samples = CachedDataset(rectified_cache), torch.arange(5)
    sampler = EpochSampler(dataset)
    targets = dataset.cache.read_view(0, "pairwise-T4")
    given = {"view": 0, "epoch": 0, "index": 0, "samples": samples, "device": torch.device("cpu")}
    given |= {"state": sampler.state_dict(), "targets": targets}
    return {
        "a batch": (dataset.read(0, samples), given),
        "CachedDataset": (dataset, given),
        "EpochSampler": (sampler, given),
        "CachedEpochs": (CachedEpochs(dataset, device="cpu"), given),
        "LogitCache": (dataset.cache, given),
        "method of targets": (targets, given),
    }


TABLES = {
    "a batch": ("CachedDataset", "field of a batch"),
    "CachedDataset": ("CachedDataset", "member"),
    "EpochSampler": ("EpochSampler", "member"),
    "CachedEpochs": ("CachedEpochs", "member"),
    "LogitCache": ("LogitCache", "member"),
    "method of targets": ("LogitCache", "method of targets"),
}


def value_of(thing: Any, member: str, given: dict[str, Any]) -> Any:
    """`name`, or what `name(argument, other=default)` returns."""
    name, _, arguments = member.partition("(")
    value = getattr(thing, name)
    if not arguments:
        return value
    parameters = inspect.signature(value).parameters
    shown = [part.strip().partition("=")[0] for part in arguments.rstrip(")").split(",")]
    assert all(part in parameters for part in shown if part), member
    return value(*(given[name] for name in shown if name in given and name in parameters))


@pytest.mark.parametrize("name", TABLES)
def test_members_have_the_types_of_the_page(name: str, objects: Objects) -> None:
    thing, given = objects[name]
    for member, documented in table(*TABLES[name]).items():
        value = value_of(thing, member, given)
        if match := TYPE.fullmatch(documented):
            assert value.dtype == getattr(torch, match[1]), member
            letters = match[2].split(", ")
            assert value.ndim == len(letters), member
            for letter, size in zip(letters, value.shape, strict=True):
                assert SIZES.get(letter, size) == size, member
        elif documented and value is not None:
            kinds = {kind.__name__ for kind in type(value).__mro__}
            assert kinds & set(documented.split(", ")), (member, documented, kinds)


@pytest.mark.parametrize("name", ["CachedDataset", "EpochSampler", "CachedEpochs"])
def test_the_page_has_every_public_member(name: str, objects: Objects) -> None:
    thing, _ = objects[name]
    own = {n for n in (*vars(type(thing)), *vars(thing)) if not n.startswith("_")}
    assert {member.partition("(")[0] for member in table(name, "member")} == own


def test_the_page_has_every_field_of_a_batch() -> None:
    assert [*table("CachedDataset", "field of a batch")] == [*CachedBatch._fields]
    assert {m.partition("(")[0] for m in table("LogitCache", "method of targets")} <= {
        *dir(ViewTargets)
    }


@pytest.mark.parametrize("name", stages.__all__)
def test_every_public_name_has_a_section_with_its_signature(name: str) -> None:
    section = SECTIONS[name]
    shown = " ".join(re.findall(r"\A\n((?:    .*\n)+)", section)[0].split())
    thing = getattr(stages, name)
    if name == "LOSSES":
        assert shown == "LOSSES: dict[str, Callable]"
        return
    call, of = (thing.open, "LogitCache.open") if name == "LogitCache" else (thing, name)
    parameters = inspect.signature(call).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert shown == of + str(inspect.Signature(plain))


def test_every_error_of_the_page_is_one() -> None:
    named = set(re.findall(r"`(\w+Error)`", PAGE)) - {"IndexError"}
    assert len(named) >= 5
    for name in named:
        assert issubclass(getattr(stages.errors, name), stages.errors.PipelineError)


def test_every_public_name_is_the_one_of_its_module() -> None:
    """And the package loads no torch before one of them is asked for."""
    for name in stages.__all__:
        value = getattr(stages, name)
        module = importlib.import_module(getattr(value, "__module__", "stages.objectives.losses"))
        assert module.__name__.startswith("stages")
        assert name == "LOSSES" or getattr(module, name) is value
    assert {*stages.__all__} <= {*dir(stages)}
    assert not hasattr(stages, "LogitCash")
    program = "import stages, stages.settings, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
