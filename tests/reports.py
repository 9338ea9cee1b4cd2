"""Runs, sweeps and pages for the tests of `pipeline report`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from pipeline.report import write_report

VOID = {"img", "meta"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def find(self, tag: str | None = None, **wanted: str) -> list["Element"]:
        """All elements below that have these attributes (`_` for `-`)."""
        named = {key.rstrip("_").replace("_", "-"): value for key, value in wanted.items()}
        found = []
        for child in self.children:
            if (tag in (None, child.tag)) and named.items() <= child.attributes.items():
                found.append(child)
            found += child.find(tag, **wanted)
        return found

    def value(self, field: str) -> float:
        """The number of the one element with this data-field."""
        (found,) = self.find(data_field=field)
        return float(found.attributes["data-value"])

    def values(self, field: str) -> list[float]:
        return [float(e.attributes["data-value"]) for e in self.find(data_field=field)]


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs})
        assert len(element.attributes) == len(attrs), f"an attribute of {tag} is there twice"
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data


def parse(page: Path) -> Element:
    """The page as a tree; fails where elements are not closed in order."""
    tree = _Tree()
    tree.feed(page.read_text())
    tree.close()
    assert len(tree._open) == 1
    return tree.root


def page_of(*paths: Path, out: str = "report.html") -> Element:
    """The report on these paths, written beside the first."""
    file = write_report([str(path) for path in paths], str(paths[0].parent / out))
    return parse(file)


def epoch(number: int, top1: float, **more: float) -> dict[str, float]:
    """A line of metrics.jsonl."""
    line = {"epoch": number, "view": 0, "loss": 2.0 / (number + 1), "seconds": 1.5}
    return line | {"test_top1": top1, "test_top5": min(1.0, top1 + 0.3), "wait_seconds": 0.1} | more


def summary_of(history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What summary.json tells of these epochs."""
    keys = ("epoch", "test_top1", "test_top5", "loss")
    last, best = history[-1], max(history, key=lambda line: line["test_top1"])
    picked = {"last": last, "best": best, "selected": last}
    return {
        **{name: {key: line[key] for key in keys} for name, line in picked.items()},
        "epochs": len(history),
        "parameters": 12345,
        "train_seconds": sum(line["seconds"] for line in history),
        "wait_share": 0.1 / 1.5,
        "epoch_seconds": history[-1]["seconds"],
    }


def write_run(
    folder: Path,
    history: Sequence[Mapping[str, float]] = (),
    seed: int = 0,
    finished: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """A run directory; settings by keys like `loss__name`. Returns its summary."""
    config: dict[str, Any] = {
        "kind": "student",
        "data": {"dataset": "digits"},
        "model": {"architecture": "resnet8"},
        "train": {"epochs": len(history) or 2},
        "seed": {"data": seed, "init": seed},
        "cache": "nowhere.zarr",
        "loss": {"name": "kd"},
        "bias": {"mode": "none"},
    }
    for key, value in settings.items():
        *outer, last = key.split("__")
        inside = config
        for name in outer:
            inside = inside.setdefault(name, {})
        inside[last] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    if not (finished and history):
        return {}
    summary = summary_of(history)
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def sweep_line(name: str, label: str, seed: int, summary: Mapping[str, Any]) -> dict[str, Any]:
    """A line of results.jsonl about a run that is done."""
    return {
        "name": name,
        "label": label,
        "keys": {"loss.name": "kd"},
        "seed": seed,
        "status": "done",
        "error": None,
        "cache": "nowhere.zarr",
        "dataset": "digits",
        "teacher_top1": 0.97,
        "summary": dict(summary),
    }


def write_sweep(folder: Path, seeds: int = 3, epochs: int = 4) -> list[dict[str, Any]]:
    """A sweep of two groups and one failed run; returns the lines of its results.jsonl."""
    lines = []
    for group, bonus in (("KD", 0.0), ("a & <b>", 0.0123456789012345)):
        for seed in range(seeds):
            name = f"{'plain' if bonus == 0 else 'other'}-{seed}"
            history = [
                epoch(
                    number,
                    0.3 + bonus + 0.1 * number + seed / 97,
                    loss_ce=1.0 / (number + 1),
                    loss_right=0.7 / (number + 1),
                    loss_wrong=0.2,
                    weight_right=1 - number / epochs,
                    weight_wrong=number / epochs,
                )
                for number in range(epochs)
            ]
            mode = "none" if bonus == 0 else "rectify"
            summary = write_run(folder / name, history, seed, bias__mode=mode)
            lines.append(sweep_line(name, group, seed, summary))
    failed = sweep_line("gone-0", "gone", 0, {})
    lines.append(failed | {"status": "failed", "error": "out of <memory>", "summary": None})
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines
