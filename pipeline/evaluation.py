"""Tables of `pipeline evaluate`, and its JSON."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from pipeline.console import Console
from stages.cache.storage import cache_around
from stages.errors import ConfigError, refusals
from stages.evaluate import Evaluated
from stages.files import replace_file
from stages.scores import ClassScore, Scores

FEW_CLASSES = 20
"""So many are shown whole; of more, the worst and the best ten."""


def check_json(out: str, kind: type[msgspec.Struct]) -> None:
    """Raise ConfigError, before anything is computed, unless a JSON file can go there: to a place
    where nothing lies, or in place of one that holds the same `kind`.
    """
    path = Path(out)
    if path.suffix != ".json" or path.is_dir():
        raise ConfigError(f"--out {out} is not a .json file", "Give --out FILE.json.")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} for {path.name}", "Make it first.")
    if (cache := cache_around(path)) is not None:
        raise ConfigError(f"--out {out} lies inside the cache {cache}", "Choose another --out.")
    there = path.exists()
    with refusals(ConfigError, f"cannot write {out}", "Choose another --out."):
        path.open("ab").close()
    if not there:
        path.unlink()
    elif not _holds(path, kind):
        raise ConfigError(
            f"--out {out} holds something else than what this command writes",
            "Choose another --out, or delete the file.",
        )


def _holds(path: Path, kind: type[msgspec.Struct]) -> bool:
    """Whether a JSON file has every field of `kind`; an empty file is free to be used."""
    content = path.read_bytes()
    try:
        found = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return not content
    return {field.name for field in msgspec.structs.fields(kind)} <= found.keys()


def write_json(out: str, evaluated: Evaluated) -> None:
    """Everything that was measured, every class included."""
    replace_file(Path(out), msgspec.json.format(msgspec.json.encode(evaluated), indent=2) + b"\n")


def show_evaluation(console: Console, evaluated: Evaluated) -> None:
    """Scores, who is right where, and the classes."""
    comparison, rows = evaluated.comparison, [("run", *_cells(evaluated.scores))]
    if comparison is not None:
        rows.append(("teacher", *_cells(comparison.teacher)))
    console.table(
        f"{evaluated.run} on {evaluated.dataset}, {evaluated.samples:,} test samples",
        ("", "top-1", "top-5", "NLL", "ECE"),
        rows,
    )
    if evaluated.recorded_top1 is not None:
        console.say(f"top-1 as the run recorded it: {evaluated.recorded_top1:.2%}")
    if comparison is not None:
        counts = (
            ("both right", comparison.both_right),
            ("only the teacher right", comparison.only_teacher),
            ("only the student right", comparison.only_student),
            ("both wrong", comparison.both_wrong),
        )
        console.table(
            f"beside the teacher of {', '.join(comparison.caches)}: same answer on "
            f"{comparison.agreement:.2%}, KL(teacher || student) {comparison.kl:.4f} at T=1",
            ("", "samples", "share"),
            [(who, f"{n:,}", f"{n / evaluated.samples:.2%}") for who, n in counts],
        )
    _show_classes(console, evaluated)


def _cells(scores: Scores) -> tuple[str, ...]:
    return (f"{scores.top1:.2%}", f"{scores.top5:.2%}", f"{scores.nll:.4f}", f"{scores.ece:.2%}")


def _show_classes(console: Console, evaluated: Evaluated) -> None:
    classes = [c for c in evaluated.classes if c.top1 is not None]
    few, compared = len(classes) <= FEW_CLASSES, evaluated.comparison is not None
    if not few or not compared:
        which = "each class" if few else "the worst and the best ten classes"
        worst_first = _extremes(classes, lambda c: c.top1 or 0.0)
        _class_table(console, f"top-1 of {which}", worst_first)
    if compared:
        which = "each class" if few else "the ten classes with the least and the most"
        least_first = _extremes(classes, lambda c: c.gain)
        _class_table(console, f"{which}, by the student's gain on the teacher", least_first)


def _extremes(
    classes: Sequence[ClassScore], key: Callable[[ClassScore], float]
) -> list[ClassScore]:
    """In rising order: all where they are few, else half as many from each end."""
    ordered, each = sorted(classes, key=key), FEW_CLASSES // 2
    return ordered if len(ordered) <= FEW_CLASSES else [*ordered[:each], *ordered[-each:]]


def _class_table(console: Console, title: str, classes: Sequence[ClassScore]) -> None:
    compared = any(c.teacher_top1 is not None for c in classes)
    columns = ("class", "samples", "top-1", *(("teacher", "gain") if compared else ()))
    rows = [
        (c.name, c.samples, f"{c.top1:.2%}")
        + ((f"{c.teacher_top1:.2%}", f"{c.gain * 100:+.2f}") if compared else ())
        for c in classes
    ]
    console.table(title, columns, rows)
