"""From a sweep file to runs: against itertools by hand, and what is refused."""

import itertools
import operator
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from helpers import changed, student_of

from pipeline.sweep.check import grouped
from pipeline.sweep.grid import Run, expand, read_sweep
from stages.errors import ConfigError
from stages.settings import DataSettings, TrainSettings

SWEEPS = Path(__file__).parents[2] / "docs" / "sweeps.md"
BASE = {"cache": "a.zarr", "data": {"dataset": "digits"}, "model.architecture": "resnet8"}
BASE["device"] = "cpu"


def write(tmp_path: Path, **values: Any) -> Path:
    file = tmp_path / "ablation.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "runs": [{}]} | values, sort_keys=False))
    return file


def expanded(tmp_path: Path, **values: Any) -> list[Run]:
    return expand(read_sweep(write(tmp_path, **values)))


def test_a_grid_is_the_product_of_its_lists_and_of_the_seeds(tmp_path: Path) -> None:
    grid = {"loss.name": ["kd", "dkd"], "bias.mode": ["none", "eliminate"], "train.epochs": 2}
    runs = expanded(tmp_path, runs=[grid], seeds=[3, 5])
    whole = {"data": DataSettings(dataset="digits"), "train": TrainSettings(epochs=2)}
    plain = student_of("a.zarr", model__architecture="resnet8", **whole)
    by_hand = [
        changed(plain, loss__name=loss, bias__mode=mode, seed__data=seed, seed__init=seed)
        for loss, mode, seed in itertools.product(["kd", "dkd"], ["none", "eliminate"], [3, 5])
    ]
    assert [run.config for run in runs] == by_hand
    assert runs[0].keys == {"loss.name": "kd", "bias.mode": "none", "train.epochs": 2}
    names = ["bias-none-epochs-2-s3", "bias-none-epochs-2-s5", "eliminate-epochs-2-s3"]
    assert [run.name for run in runs[:3]] == [f"kd-{name}" for name in names]


def test_keys_that_hold_lists_take_each_of_a_list_of_lists(tmp_path: Path) -> None:
    grids: list[tuple[str, list[Any], list[Any]]] = [
        ("train.milestones", [[3, 5], [4]], [(3, 5), (4,)]),
        ("also", [[], ["b.zarr"]], [(), ("b.zarr",)]),
        ("model.mean", [[0.5], None], [(0.5,), None]),
    ]
    for key, value, found in grids:
        runs = expanded(tmp_path, runs=[{key: value}])
        assert [operator.attrgetter(key)(run.config) for run in runs] == found


# a sweep; of each run: loss, epochs, both seeds, label, name
EXPANDED: dict[str, tuple[dict[str, Any], list[tuple[str, int, int, int, str, str]]]] = {
    "grids come one after another and overrule the base": (
        {
            "base": {**BASE, "train": {"epochs": 9}, "loss": {"name": "dkd"}},
            "runs": [{"loss": {"name": "ce"}}, {}, {"train.epochs": [1, 9], "loss.name": "kd"}],
        },
        [
            ("ce", 9, 0, 0, "ce", "ce-s0"),
            ("dkd", 9, 0, 0, "base", "base-s0"),
            ("kd", 1, 0, 0, "epochs=1, kd", "epochs-1-kd-s0"),
            ("kd", 9, 0, 0, "epochs=9, kd", "epochs-9-kd-s0"),
        ],
    ),
    "a seed sets both unless the run does": (
        {
            "runs": [
                {"loss.name": "ce"},
                {"loss.name": "kd", "seed.data": 7},
                {"loss.name": "dkd", "seed": {"data": 1, "init": [1, 2]}},
            ],
            "seeds": [0, 1],
        },
        [
            ("ce", 30, 0, 0, "ce", "ce-s0"),
            ("ce", 30, 1, 1, "ce", "ce-s1"),
            ("kd", 30, 7, 0, "kd", "kd-s0-d7"),
            ("kd", 30, 7, 1, "kd", "kd-s1-d7"),
            ("dkd", 30, 1, 1, "dkd", "dkd-s1"),
            ("dkd", 30, 1, 2, "dkd", "dkd-s2-d1"),
        ],
    ),
    "a label comes before what its grid varies": (
        {
            "runs": [
                {"label": "LA", "loss.name": "dkd", "train.lr": 0.5},
                {"label": "T", "loss.name": "kd", "loss.temperature": [2, 8]},
            ]
        },
        [
            ("dkd", 30, 0, 0, "LA", "LA-s0"),
            ("kd", 30, 0, 0, "T, temperature=2", "T-temperature-2-s0"),
            ("kd", 30, 0, 0, "T, temperature=8", "T-temperature-8-s0"),
        ],
    ),
}


@pytest.mark.parametrize(("values", "expected"), EXPANDED.values(), ids=EXPANDED)
def test_expanded(tmp_path: Path, values: dict[str, Any], expected: list[Any]) -> None:
    found = [
        (run.config.loss.name, run.config.train.epochs, *run.seeds, run.label, run.name)
        for run in expanded(tmp_path, **values)
    ]
    assert found == expected


def test_names_stay_when_runs_are_added(tmp_path: Path) -> None:
    first = [{"train.schedule": "cosine"}, {"cache": ["x/a.zarr", "y/a.zarr"]}]
    more = [{"bias.schedule": "cosine"}, {"cache": "z/a.zarr"}, {"label": "COSINE", "views": 1}]
    before = expanded(tmp_path, runs=first)
    after = expanded(tmp_path, runs=first + more, seeds=[0, 4])
    names = {run.config: run.name for run in after}
    assert all(names[run.config] == run.name for run in before)
    assert len({run.name.lower() for run in after}) == len(after) == 12


def test_long_and_odd_labels_make_folders(tmp_path: Path) -> None:
    labels = ["../up", "größe / *?", "x" * 300, "x" * 301]
    runs = expanded(tmp_path, runs=[{"label": x, "views": n} for n, x in enumerate(labels, 1)])
    for run in runs:
        (tmp_path / run.name).mkdir()
        assert (tmp_path / run.name).parent.samefile(tmp_path)
    assert [run.label for run in runs] == labels


# ---- what is refused ------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed": [1]}, "'seeds'"),
    ({"base": {**BASE, "train.lrr": 1}}, "'train.lr'"),
    ({"runs": [{"los.name": "kd"}]}, "'loss.name'"),
    ({"runs": None}, "'runs'"),
    ({"runs": [{"label": "a\nb"}]}, "label"),
    ({"seeds": []}, "'seeds'"),
    ({"runs": [{"loss.name": []}]}, "'loss.name'"),
    ({"seeds": [0, True]}, "seeds: True"),
    ({"seeds": 3}, "seeds"),
    ({"runs": [{"seed.init": "1"}]}, "seed.init: '1'"),
    ({"runs": [{"loss.name": ["kd", "dkd"]}, {"label": "mine", "loss.name": "dkd"}]}, "'mine'"),
    ({"seeds": [1, 1]}, "seed 1"),
    ({"runs": [{"label": "x", "views": 1}, {"label": "x", "views": 2}]}, "'x'"),
    ({"runs": [{"loss.name": "kd", "loss": {"name": "ce"}}]}, "'loss.name'"),
    ({"runs": [{"loss": "kd"}]}, "'loss'"),
    ({"base": {**BASE, "train.epochs": [1, 2]}}, "'base': train.epochs"),
    ({"runs": [{"train.epochs": 0}]}, "train.epochs"),
    ({"base": {"model.architecture": "a"}}, "'cache'"),
    ({"workers": 0}, "workers"),
    ({"runs": ["kd"]}, "runs[0]"),
]


@pytest.mark.parametrize(("values", "named"), REFUSED, ids=str)
def test_refused(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expanded(tmp_path, **values)
    assert named in caught.value.cause


def test_the_sweep_in_the_documentation(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(out: .*?)```", SWEEPS.read_text(), re.DOTALL)
    (tmp_path / "ablation.yaml").write_text(text)
    assert len(expand(read_sweep(tmp_path / "ablation.yaml"))) == (1 + 2 * 3 + 2) * 3


def test_flags_overrule_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, workers=2)
    assert read_sweep(file).out == "runs/ablation"
    assert read_sweep(file, workers=3, out=None).workers == 3
    assert read_sweep(file, out="elsewhere").out == "elsewhere"


def test_runs_that_share_a_stream_go_together(tmp_path: Path) -> None:
    runs = expanded(
        tmp_path,
        runs=[
            {"loss.name": ["ce", "kd"], "model.architecture": ["resnet8", "vgg8"]},
            {"loss.name": "kd", "train.epochs": 2},
            {"loss.name": "kd", "bias.mode": "rectify", "bias.rectified": ["a", "b"]},
            {"loss.name": "kd", "cache": "b.zarr"},
            {"loss.name": "kd", "seed.data": 0, "seed.init": 9},
            {"loss.name": "kd", "views": 2},
            {"loss.name": "kd", "data.image_size": 16},
            {"loss.name": "kd", "model.image_size": 16},
            {"loss.name": "kd", "train.batch_size": 16},
        ],
        seeds=[0, 1],
    )
    groups = grouped(runs, None)

    def stream(run: Run) -> tuple[Any, ...]:
        config = run.config
        sizes = config.train.epochs, config.train.batch_size, config.model.image_size
        return config.cache, config.views, config.data, config.seed.data, *sizes

    assert sorted(run.name for group in groups for run in group) == sorted(r.name for r in runs)
    assert all(len({stream(run) for run in group}) == 1 for group in groups)
    assert len(groups) == len({stream(run) for run in runs}) == 14
    assert [len(group) for group in groups[:2]] == [7, 6]  # seed 0 with the one of its own; seed 1


@pytest.mark.parametrize(
    ("together", "sizes"), [(False, [1] * 5), (1, [1] * 5), (2, [2, 2, 1]), (True, [5]), (8, [5])]
)
def test_together_may_limit_the_group(tmp_path: Path, together: Any, sizes: list[int]) -> None:
    file = write(tmp_path, runs=[{"loss.temperature": [1, 2, 3, 4, 5]}], together=together)
    sweep = read_sweep(file)
    groups = grouped(expand(sweep), sweep.most_together)
    assert [len(group) for group in groups] == sizes
    assert msgspec.to_builtins(groups[0][0].config)["loss"]["temperature"] == 1
