"""What helps when the teacher is wrong: every method at its own best settings, in one regime.

    python study.py grid  --cache C --dataset D --out runs/R     # writes runs/R/grid.yaml
    pipeline sweep runs/R/grid.yaml
    python study.py final --out runs/R                           # chosen on validation; final.yaml
    pipeline sweep runs/R/final.yaml
    python study.py compare runs/R ...                           # paired tests, Holm's correction

A regime R is a cache (what kind of teacher) of a dataset (clean or wrong labels). The grid has
every method at every CE weight and temperature, one seed, measured on held-out samples: a tenth of
the training samples, or, with `--on features`, half of the test samples, as no teacher has seen
these. The final sweep has each method once, at the settings with the best held-out top-1, with
eight seeds that the grid has not used, on all training samples and the other test samples. Only
its test top-1 is compared.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from scipy import stats  # type: ignore[import-untyped]

CE_WEIGHTS, TEMPERATURES = (0.1, 0.5, 0.9), (1, 4)
GRID_SEEDS, FINAL_SEEDS = [100], [*range(8)]
METHODS: dict[str, dict[str, Any]] = {
    "KD": {},
    "eliminate": {"bias.mode": "eliminate"},
    "rectify, as published": {
        "bias.mode": "rectify",
        "bias.rectified": "pairwise-T{T}",
        "bias.schedule": "cosine",
        "bias.reduction": "subset",
    },
    "rectify, constant": {
        "bias.mode": "rectify",
        "bias.rectified": "pairwise-T{T}",
        "bias.schedule": "constant",
        "bias.reduction": "batch",
    },
    "rectify, by confidence": {
        "bias.mode": "rectify",
        "bias.rectified": "confident-T{T}",
        "bias.schedule": "constant",
        "bias.reduction": "batch",
    },
    "LA": {"loss.name": "la"},
    "RC": {"loss.name": "rc"},
    "AdaptConf": {"loss.name": "adaptconf"},
    "correct": {"bias.mode": "correct"},
}
HARD = "hard labels"
PRIMARY = "correct"
"""Against KD: the one comparison of every regime that was fixed before anything ran."""
BASES: dict[str, dict[str, Any]] = {
    "pixels": {
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
    },
    "features": {
        "model": {"architecture": "features:student"},
        "train": {
            "epochs": 10,
            "batch_size": 256,
            "lr": 0.1,
            "nesterov": True,
            "weight_decay": 5e-4,
            "schedule": "onecycle",
        },
        "device": "cpu",
    },
}

CHOSEN_ON: dict[str, dict[str, Any]] = {
    "pixels": {"val_fraction": 0.1},
    "features": {"eval_dataset": "features:choosing"},
}
"""The samples on which the settings are chosen; none of them is scored."""


def runs() -> Iterator[dict[str, Any]]:
    """Every method at every setting, as runs of a sweep file."""
    yield {"label": HARD, "loss.name": "ce"}
    for (method, keys), ce, t in product(METHODS.items(), CE_WEIGHTS, TEMPERATURES):
        weights = {"loss.ce_weight": ce, "loss.weight": round(1 - ce, 3), "loss.temperature": t}
        own = {k: v.format(T=t) if isinstance(v, str) else v for k, v in keys.items()}
        label = f"{method}, CE {ce:g}, T {t}"
        yield {"label": label, "loss.name": "kd", **weights, **own}


def write_grid(out: Path, cache: str, dataset: str, on: str = "pixels") -> Path:
    """The sweep file of all settings."""
    sweep = {
        "out": str(out / "grid"),
        "base": {**BASES[on], "cache": cache, "data": {"dataset": dataset, **CHOSEN_ON[on]}},
        "seeds": GRID_SEEDS,
        "together": True,
        "runs": [*runs()],
    }
    return _written(out / "grid.yaml", sweep)


def write_final(out: Path, seeds: Sequence[int] = FINAL_SEEDS) -> Path:
    """The sweep file of each method at its best settings by mean held-out top-1."""
    grid = yaml.safe_load((out / "grid.yaml").read_text())
    held_out: dict[str, list[float]] = defaultdict(list)
    for line in results(out / "grid"):
        selected = line["summary"]["selected"]
        key = "val_top1" if "val_top1" in selected else "test_top1"
        held_out[line["label"]].append(selected[key])
    chosen = []
    for method in (HARD, *METHODS):
        mine = [run for run in grid["runs"] if method_of(run["label"]) == method]
        if missing := [r["label"] for r in mine if len(held_out[r["label"]]) < len(grid["seeds"])]:
            raise SystemExit(f"not finished: {missing[0]} and {len(missing) - 1} more")
        best = max(mine, key=lambda run: fmean(held_out[run["label"]]))
        chosen.append(best)
        print(f"{method}: {best['label']}, held-out top-1 {fmean(held_out[best['label']]):.2%}")
    base = {**grid["base"], "data": {"dataset": grid["base"]["data"]["dataset"]}}
    kd = next(run for run in chosen if run["label"].startswith("KD, "))
    baseline = {k: v for k, v in kd.items() if k != "label"} | {"bias.mode": "none"}
    final = {
        "out": str(out / "final"),
        "base": base,
        "seeds": [*seeds],
        "together": True,
        "baseline": baseline,
        "runs": chosen,
    }
    return _written(out / "final.yaml", final)


def compare(regimes: Sequence[Path]) -> str:
    """Three tables: test top-1 of every method in every regime; its difference to KD in points with
    a 95 % interval, paired by seed; and each regime's primary comparison, with p of the paired
    t-test and after Holm's correction over all regimes. Then the settings that were chosen.
    """
    methods = [HARD, *METHODS]
    top1s = {regime: _top1s(regime) for regime in regimes}
    teachers = {r: 100 * next(iter(results(r / "final")))["teacher_top1"] for r in regimes}
    means = _table(
        ["regime", "teacher", *methods],
        [
            [r.name, f"{teachers[r]:.1f}", *(f"{fmean(found[m].values()):.2f}" for m in methods)]
            for r, found in top1s.items()
        ],
    )
    others = [method for method in methods if method != "KD"]
    pairs = {(r, m): paired(found[m], found["KD"]) for r, found in top1s.items() for m in others}
    against = _table(
        ["regime", *others],
        [
            [r.name, *(f"{pairs[r, m][0]:+.2f} ± {pairs[r, m][1]:.2f}" for m in others)]
            for r in regimes
        ],
    )
    corrected = holm([pairs[r, PRIMARY][2] for r in regimes])
    rows = []
    for regime, after in zip(regimes, corrected, strict=True):
        mean, half, p = pairs[regime, PRIMARY]
        seeds = str(len(top1s[regime]["KD"]))
        rows.append([regime.name, f"{mean:+.2f} ± {half:.2f}", seeds, f"{p:.2g}", f"{after:.2g}"])
    primary = _table(["regime", f"{PRIMARY} against KD", "seeds", "p", "Holm"], rows)
    settings = _table(
        ["regime", *METHODS], [[r.name, *(_chosen(r)[m] for m in METHODS)] for r in regimes]
    )
    return "\n\n".join([means, against, primary, settings])


def scores(regimes: Sequence[Path]) -> str:
    """JSON lines: every run of the final sweeps."""
    lines = [
        {
            "regime": regime.name,
            "run": line["label"],
            "seed": line["seed"],
            "test_top1": round(line["summary"]["last"]["test_top1"], 4),
            "teacher_top1": line["teacher_top1"],
        }
        for regime in regimes
        for line in results(regime / "final")
    ]
    return "\n".join(map(json.dumps, lines)) + "\n"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, float]:
    """Mean difference over common seeds, half of its 95 % interval, p of the paired t-test."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    mean, n = fmean(differences), len(differences)
    if n < 2 or len({*differences}) == 1:
        return mean, float("nan"), 1.0
    half = float(stats.t.ppf(0.975, n - 1) * stdev(differences) / n**0.5)
    return mean, half, float(stats.ttest_1samp(differences, 0).pvalue)


def _top1s(regime: Path) -> dict[str, dict[int, float]]:
    """Method -> seed -> test top-1 in percent, of the last epoch."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in results(regime / "final"):
        found[method_of(line["label"])][line["seed"]] = 100 * line["summary"]["last"]["test_top1"]
    return found


def _chosen(regime: Path) -> dict[str, str]:
    labels = [run["label"] for run in yaml.safe_load((regime / "final.yaml").read_text())["runs"]]
    return {method_of(label): label.partition(", CE ")[2] for label in labels}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
    grid.add_argument("--on", choices=BASES, default="pixels")
    commands.add_parser("final").add_argument("--out", type=Path, required=True)
    comparison = commands.add_parser("compare")
    comparison.add_argument("regimes", type=Path, nargs="+")
    comparison.add_argument("--runs-to", type=Path, help="JSON lines of every run, for others")
    given = parser.parse_args()
    if given.command == "grid":
        write_grid(given.out, given.cache, given.dataset, given.on)
    elif given.command == "final":
        write_final(given.out)
    else:
        print(compare(given.regimes))
        if given.runs_to:
            given.runs_to.write_text(scores(given.regimes))


if __name__ == "__main__":
    main()
