"""The study of results/bias: its labels, its sweep files, its table."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

FOLDER = Path(__file__).parents[1] / "results" / "bias"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bias_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STUDY, NOISY = loaded("study"), loaded("noisy")


def test_a_share_of_the_labels_is_another_class() -> None:
    labels = torch.arange(20_000) % 10
    noisy = NOISY.noisy_labels(labels, 10, 0.3)
    changed = noisy != labels
    assert changed.double().mean().item() == pytest.approx(0.3, abs=0.01)
    moved = ((noisy - labels) % 10)[changed]
    shares = torch.bincount(moved, minlength=10)[1:].double() / len(moved)
    assert shares.sub(1 / 9).abs().max() < 0.01
    assert torch.equal(NOISY.noisy_labels(labels, 10, 0.0), labels)


def test_holms_correction_by_hand() -> None:
    assert STUDY.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert STUDY.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_each_method_is_tried_everywhere_and_run_once_at_its_best(tmp_path: Path) -> None:
    grid = yaml.safe_load(STUDY.write_grid(tmp_path, "c.zarr", "digits").read_text())
    labels = [run["label"] for run in grid["runs"]]
    assert len(labels) == len({*labels}) == 1 + len(STUDY.METHODS) * 3 * 2
    assert grid["base"]["data"] == {"dataset": "digits", "val_fraction": 0.1}
    best = {f"{method}, CE 0.5, T 1" for method in STUDY.METHODS}
    lines = [
        {
            "label": label,
            "seed": 100,
            "status": "done",
            "summary": {"selected": {"val_top1": 0.9 if label in best else 0.1}},
        }
        for label in labels
    ]
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    final = yaml.safe_load(STUDY.write_final(tmp_path).read_text())
    assert {run["label"] for run in final["runs"]} == best | {STUDY.HARD}
    assert final["base"]["data"] == {"dataset": "digits"}
    assert not {*final["seeds"]} & {*grid["seeds"]}


def final_sweep(folder: Path, top1: dict[str, list[float]]) -> Path:
    """A regime's files as `study.py final` and `pipeline sweep` leave them."""
    settings = {label for label in top1 if ", CE " in label}
    all_runs = {STUDY.method_of(label): label for label in settings}
    labels = [all_runs.get(method, f"{method}, CE 0.1, T 1") for method in STUDY.METHODS]
    labels = [STUDY.HARD, *labels]
    lines = [
        {
            "label": label,
            "seed": seed,
            "status": "done",
            "teacher_top1": 0.7,
            "summary": {"last": {"test_top1": value}},
        }
        for label in labels
        for seed, value in enumerate(top1.get(label, [0.4, 0.42, 0.44]))
    ]
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "final.yaml").write_text(yaml.safe_dump({"runs": [{"label": x} for x in labels]}))
    return folder


def test_methods_are_compared_by_seed(tmp_path: Path) -> None:
    top1 = {"KD, CE 0.5, T 1": [0.5, 0.6, 0.55], "correct, CE 0.1, T 4": [0.52, 0.61, 0.56]}
    tables = STUDY.compare([final_sweep(tmp_path / "r", top1)]).split("\n\n")
    rows = [
        dict(zip(*(line.strip("| ").split(" | ") for line in (head, row)), strict=True))
        for head, _, row in (table.splitlines() for table in tables)
    ]
    means, against, primary, settings = rows
    assert (means["teacher"], means["KD"], means["correct"]) == ("70.0", "55.00", "56.33")
    # differences 2, 1, 1: mean 1.33, deviation .577, t = 4, p = .0572 with two degrees of freedom;
    # the interval is 4.303 * .577 / sqrt(3) to either side
    assert against["correct"] == "+1.33 ± 1.43"
    assert (
        against[STUDY.HARD] == "-13.00 ± 10.83"
    )  # 10, 18, 11: deviation 4.36, 4.303 * 4.36 / sqrt(3)
    assert [*primary.values()] == ["r", "+1.33 ± 1.43", "3", "0.057", "0.057"]
    assert (settings["KD"], settings["correct"]) == ("0.5, T 1", "0.1, T 4")
    lines = [json.loads(line) for line in STUDY.scores([tmp_path / "r"]).splitlines()]
    assert len(lines) == 3 * (1 + len(STUDY.METHODS))
    kd = [line["test_top1"] for line in lines if line["run"] == "KD, CE 0.5, T 1"]
    assert kd == [0.5, 0.6, 0.55]
