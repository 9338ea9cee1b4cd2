"""What helps when the teacher is wrong: every method at its own best settings, in one regime.

    python study.py grid  --cache C --dataset D --out runs/R     # writes runs/R/grid.yaml
    pipeline sweep runs/R/grid.yaml
    python study.py final --out runs/R                           # chosen on validation; final.yaml
    pipeline sweep runs/R/final.yaml
    python study.py compare runs/R ...                           # paired tests, Holm's correction

A regime R is a cache (what kind of teacher) of a dataset (clean or wrong labels). The grid has
every method at every CE weight and temperature, one seed, a tenth of the training samples held out;
the final sweep has each method once, at the settings with the best held-out top-1, with eight seeds
that the grid has not used, on all training samples. Only test top-1 of the final sweep is compared.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from scipy import stats  # type: ignore[import-untyped]

CE_WEIGHTS, TEMPERATURES = (0.1, 0.5, 0.9), (1, 4)
GRID_SEEDS, FINAL_SEEDS = [100], [*range(8)]
METHODS: dict[str, dict[str, Any]] = {
    "KD": {},
    "eliminate": {"bias.mode": "eliminate"},
    "rectify, as published": {"bias.mode": "rectify", "bias.rectified": "pairwise-T{T}"},
    "rectify, constant": {
        "bias.mode": "rectify",
        "bias.rectified": "pairwise-T{T}",
        "bias.schedule": "constant",
        "bias.reduction": "batch",
    },
    "LA": {"loss.name": "la"},
    "RC": {"loss.name": "rc"},
    "correct": {"bias.mode": "correct"},
}
HARD = "hard labels"
PRIMARY = "correct"
"""Against KD: the one comparison of every regime that was fixed before anything ran."""
BASE = {
    "model": {"architecture": "resnet9_w8"},
    "train": {
        "epochs": 5,
        "batch_size": 256,
        "lr": 0.2,
        "nesterov": True,
        "weight_decay": 5e-4,
        "schedule": "onecycle",
        "dtype": "bfloat16",
    },
    "device": "cpu",
}


def runs() -> Iterator[dict[str, Any]]:
    """Every method at every setting, as runs of a sweep file."""
    yield {"label": HARD, "loss.name": "ce"}
    for (method, keys), ce, t in product(METHODS.items(), CE_WEIGHTS, TEMPERATURES):
        weights = {"loss.ce_weight": ce, "loss.weight": round(1 - ce, 3), "loss.temperature": t}
        own = {k: v.format(T=t) if isinstance(v, str) else v for k, v in keys.items()}
        label = f"{method}, CE {ce:g}, T {t}"
        yield {"label": label, "loss.name": "kd", **weights, **own}


def write_grid(out: Path, cache: str, dataset: str, base: Mapping[str, Any] = BASE) -> Path:
    """The sweep file of all settings."""
    held_out = {"dataset": dataset, "val_fraction": 0.1}
    sweep = {
        "out": str(out / "grid"),
        "base": {**base, "cache": cache, "data": held_out},
        "seeds": GRID_SEEDS,
        "runs": [*runs()],
    }
    return _written(out / "grid.yaml", sweep)


def write_final(out: Path, seeds: Sequence[int] = FINAL_SEEDS) -> Path:
    """The sweep file of each method at its best settings by held-out top-1."""
    grid = yaml.safe_load((out / "grid.yaml").read_text())
    found: dict[str, float] = {}
    for line in results(out / "grid"):
        found[line["label"]] = line["summary"]["selected"]["val_top1"]
    chosen = []
    for method in (HARD, *METHODS):
        mine = [run for run in grid["runs"] if method_of(run["label"]) == method]
        if missing := [run["label"] for run in mine if run["label"] not in found]:
            raise SystemExit(f"not finished: {missing[0]} and {len(missing) - 1} more")
        best = max(mine, key=lambda run: found[run["label"]])
        chosen.append(best)
        print(f"{method}: {best['label']}, held-out top-1 {found[best['label']]:.2%}")
    base = {**grid["base"], "data": {"dataset": grid["base"]["data"]["dataset"]}}
    kd = next(run for run in chosen if run["label"].startswith("KD, "))
    baseline = {k: v for k, v in kd.items() if k != "label"} | {"bias.mode": "none"}
    final = {
        "out": str(out / "final"),
        "base": base,
        "seeds": [*seeds],
        "baseline": baseline,
        "runs": chosen,
    }
    return _written(out / "final.yaml", final)


def compare(regimes: Sequence[Path]) -> str:
    """Every method against KD in every regime: the mean difference of test top-1 in points, and p
    of a t-test paired by seed. The primary comparison of each regime also has p after Holm's
    correction over all primary ones; the others are there to look at.
    """
    rows: list[list[Any]] = []
    for regime in regimes:
        top1: dict[str, dict[int, float]] = defaultdict(dict)
        for line in results(regime / "final"):
            top1[method_of(line["label"])][line["seed"]] = (
                100 * line["summary"]["last"]["test_top1"]
            )
        kd = top1.pop("KD")
        for method, found in top1.items():
            differences = [found[seed] - kd[seed] for seed in sorted(kd.keys() & found.keys())]
            several = len(differences) > 1 and len({*differences}) > 1
            p = float(stats.ttest_1samp(differences, 0).pvalue) if several else 1.0
            mean = sum(differences) / len(differences)
            rows.append([regime.name, method, mean, len(differences), p])
    corrected = iter(holm([row[-1] for row in rows if row[1] == PRIMARY]))
    table = ["| regime | method | against KD | seeds | p | Holm |", "|---|---|---|---|---|---|"]
    for regime_name, method, mean, seeds, p in rows:
        after = f"{next(corrected):.2g}" if method == PRIMARY else ""
        table.append(f"| {regime_name} | {method} | {mean:+.2f} | {seeds} | {p:.2g} | {after} |")
    return "\n".join(table)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values, in their order."""
    order, least = sorted(range(len(values)), key=values.__getitem__), 0.0
    corrected = [1.0] * len(values)
    for place, index in enumerate(order):
        least = max(least, min(1.0, values[index] * (len(values) - place)))
        corrected[index] = least
    return corrected


def method_of(label: str) -> str:
    """The method of a run, by its label."""
    return label.rpartition(", CE")[0] or label


def results(sweep: Path) -> list[dict[str, Any]]:
    """The finished runs of a sweep."""
    lines = [json.loads(line) for line in (sweep / "results.jsonl").read_text().splitlines()]
    return [line for line in lines if line["status"] == "done"]


def _written(path: Path, content: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    print(f"{path}: {len(content['runs'])} runs, {len(content['seeds'])} seeds")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    grid = commands.add_parser("grid")
    grid.add_argument("--cache", required=True)
    grid.add_argument("--dataset", required=True)
    grid.add_argument("--out", type=Path, required=True)
    commands.add_parser("final").add_argument("--out", type=Path, required=True)
    commands.add_parser("compare").add_argument("regimes", type=Path, nargs="+")
    given = parser.parse_args()
    if given.command == "grid":
        write_grid(given.out, given.cache, given.dataset)
    elif given.command == "final":
        write_final(given.out)
    else:
        print(compare(given.regimes))


if __name__ == "__main__":
    main()
