"""The teachers of a folder that `train-teacher --folds` made: one for each fold.

DIR/fold-0, DIR/fold-1, ... are run directories. The rows of a sample come from the teacher that was
trained without its fold; what no teacher has seen, the test split, has the mean of their logits.
All of them are held in memory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.cache.identity import FoldsIdentity, weights_digest
from stages.data import Splits, split_digests
from stages.errors import IdentityError, ModelError, RunError
from stages.folds import fold_map, map_digest
from stages.inputs.models import Model, load_model
from stages.inputs.run_files import read_config
from stages.inputs.teachers import load_teacher
from stages.inputs.views import ViewPolicy
from stages.settings import TeacherSettings


@dataclass(frozen=True)
class FoldTeachers:
    """modules: of every fold, in order. fold_of: int64 (N,), the fold of every sample."""

    modules: tuple[nn.Module, ...]
    fold_of: Tensor
    identity: FoldsIdentity

    @property
    def weights(self) -> str:
        """One digest for all of them."""
        return hashlib.sha256(" ".join(self.identity.weights).encode()).hexdigest()[:32]

    def parts(self, samples: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Who answers for which of some samples: each teacher, and where among them its own are
        (int64, ascending).
        """
        folds = self.fold_of[samples]
        return [(m, (folds == k).nonzero().squeeze(1)) for k, m in enumerate(self.modules)]


def fold_folder(out: str | Path, fold: int) -> Path:
    """The run directory of a fold."""
    return Path(out) / f"fold-{fold}"


def _is_fold_folder(weights: str) -> bool:
    """Whether these weights are a folder of folds, and no run directory."""
    path = Path(weights)
    return not (path / "config.yaml").exists() and (fold_folder(path, 0) / "config.yaml").exists()


def load_teachers(
    teacher: TeacherSettings, splits: Splits
) -> tuple[list[Model], FoldTeachers | None]:
    """The teacher; or those of every fold, and who answers for which sample. Raises ModelError, and
    what `load_folds` raises.
    """
    train = splits.train
    if teacher.weights is not None and _is_fold_folder(teacher.weights):
        own_head = teacher.classes is not None
        return load_folds(teacher.weights, teacher.architecture, splits, own_head)
    model = load_teacher(teacher, train.class_names, train.shape[0])
    return [model], None


def load_folds(
    folder: str, architecture: str | None, splits: Splits, own_head: bool = False
) -> tuple[list[Model], FoldTeachers]:
    """The models of every fold, and who answers for which sample.

    Raises ModelError where a fold is missing or not finished, or they are not of one training;
    IdentityError where they were trained on other images or labels than these.
    """
    path, train = Path(folder), splits.train
    runs = [_run(fold_folder(path, 0))]
    count = runs[0]["folds"]
    runs += [_run(fold_folder(path, fold)) for fold in range(1, count)]
    _check_alike(path, runs)
    trained_on = (runs[0].get("made_from") or {}).get("train_split")
    if trained_on != split_digests(splits)["train_split"]:
        raise IdentityError(
            f"the teachers of {path} were trained on folds of other images than those of "
            f"{train.name}",
            "Cache the dataset that they were trained on: else a teacher may have seen its rows.",
        )
    models = [
        load_model(
            architecture,
            str(fold_folder(path, fold)),
            len(train.class_names),
            train.shape[0],
            own_head=own_head,
        )
        for fold in range(count)
    ]
    seed = runs[0]["seed"]["data"]
    fold_of = fold_map(train.labels, count, seed)
    identity = FoldsIdentity(
        count=count,
        seed=seed,
        map=map_digest(fold_of),
        weights=tuple(weights_digest(m.module.state_dict()) for m in models),
    )
    modules = tuple(m.module for m in models)
    return models, FoldTeachers(modules, fold_of, identity)


def check_unmixed_folds(policy: ViewPolicy) -> None:
    """Raise ModelError for views that mix samples: a partner may be of any fold."""
    if policy.mixes:
        raise ModelError(
            f"views of '{policy.name}' mix samples of several folds, and no teacher has seen none "
            "of them",
            "Use an --augment without mixup and cutmix.",
        )


def _run(folder: Path) -> dict[str, Any]:
    """The settings of a fold's run. Raises ModelError unless it is one, and finished."""
    try:
        config = read_config(folder)
        finished = (folder / "summary.json").exists()
    except RunError as error:
        raise ModelError(
            error.cause, "Train every fold: `pipeline train-teacher --folds K --resume`."
        ) from error
    if not isinstance(config.get("folds"), int) or not isinstance(config.get("fold"), int):
        raise ModelError(
            f"{folder} is not the run of a fold", "Give what --folds K --out DIR made."
        )
    if not finished:
        raise ModelError(
            f"{folder} is not trained to its end",
            "Finish it: `pipeline train-teacher --folds K --resume`.",
        )
    return config


def _check_alike(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Raise ModelError unless these runs differ in nothing but their fold, one for each."""
    for fold, run in enumerate(runs):
        if run["fold"] != fold:
            raise ModelError(
                f"{fold_folder(path, fold)} was trained without fold {run['fold']}",
                "Let each fold lie in its own folder.",
            )
        for key in ("folds", "seed", "model", "made_from"):
            if run.get(key) != runs[0].get(key):
                raise ModelError(
                    f"{fold_folder(path, 0)} and {fold_folder(path, fold)} differ in their {key}",
                    "Train all folds with the same settings.",
                )


def mean_logits(rows: Sequence[Tensor]) -> Tensor:
    """What several teachers say together of samples that none has seen: float32 (n, C)."""
    return torch.stack(list(rows)).mean(0)
