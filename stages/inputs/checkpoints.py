"""Weights in files: where they lie, what their names begin with, and whether a model can take them.

No code of a file is run: it is read with weights_only=True, and beside tensors only numpy scalars,
argparse Namespaces and paths are accepted. `FILE#KEY` names what is wanted: a key of the file
(`state_dict`, dotted where it is nested), or what the names of the tensors begin with.
"""

import argparse
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.errors import ModelError

EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model")
"""A moving average of the weights, as timm and torchvision's references keep it."""
WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "net", "student", "state")
_INSIDE_EMA = ("shadow", "module")
_COUNTERS = ("n_averaged", "initted", "step")
"""What averaging keeps beside the weights."""
_AUXILIARY = re.compile(r"(AuxLogits|aux\d?|aux_classifier|aux_head)\.")
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module)\.")


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. tensors: by their names in the file. taken: the keys that lead to them.

    document: everything that lies beside them. notes: what was chosen, for people.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    taken: str
    document: Any
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Fitted:
    """Tensors under the names of a model. without_auxiliary: of heads that only training uses."""

    tensors: dict[str, Tensor]
    without_auxiliary: bool
    notes: tuple[str, ...]


def weights_file(weights: str) -> tuple[Path, str]:
    """The file and the key that `FILE#KEY` names; the key is empty where there is none."""
    if "#" not in weights or Path(weights).exists():
        return Path(weights), ""
    file, _, key = weights.rpartition("#")
    return Path(file), key


def read_checkpoint(path: Path, key: str = "") -> Checkpoint:
    """The weights in a file: the moving average where there is one, unless `key` names others.

    Raises ModelError if it cannot be read, or holds no weights there.
    """
    document = _read(path)
    found, trail, prefix = _named(document, key, path) if key else (document, [], "")
    found, trail, others = _searched(found, trail)
    tensors = _tensors(found)
    if prefix:
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not tensors:
        raise ModelError(
            f"{path} does not hold a state dict{_where(trail, key)}",
            f"Save model.state_dict() and give that file{_offer(document, path)}.",
        )
    taken, notes = ".".join([*trail, *([prefix[:-1]] if prefix else [])]), []
    if taken:
        average = any(part in EMA_KEYS for part in trail)
        kind = " (a moving average)" if average else ""
        notes.append(f"taken from '{taken}'{kind}")
    if others:
        notes.append(f"not from {', '.join(f'#{other}' for other in others)}")
    if isinstance(found, Mapping) and len(found) > len(tensors) and not prefix:
        rest = [str(n) for n in found if n not in tensors]
        notes.append(f"left out{examples(rest)}: no tensors")
    return Checkpoint(path, tensors, taken, document, tuple(notes))


def fitted(own: Mapping[str, Tensor], checkpoint: Checkpoint) -> Fitted:
    """The checkpoint's tensors under the names that the model has: what they begin with in the
    file is stripped. own: the model's state dict.

    Raises ModelError where tensors are missing or left over, or where several sets of them fit.
    """
    theirs = {_WRAPPERS.sub(r"\1", name): t for name, t in checkpoint.tensors.items()}
    notes = [] if theirs.keys() == checkpoint.tensors.keys() else ["'_orig_mod.' stripped"]
    prefix = _prefix(own, theirs, checkpoint.path)
    state = {n.removeprefix(prefix): t for n, t in theirs.items() if n.startswith(prefix)}
    outside = [n for n in theirs if not n.startswith(prefix)]
    if prefix:
        notes.insert(0, f"'{prefix}' stripped")
    extra = [n for n in state if n not in own and (n in _COUNTERS or _AUXILIARY.match(n))]
    for name in extra:
        del state[name]
    if left := [*outside, *extra]:
        notes.append(f"left out{examples(left)}")
    missing = sorted(n for n in own if n not in state and not n.endswith("num_batches_tracked"))
    auxiliary = [n for n in missing if _AUXILIARY.match(n)]
    missing = [n for n in missing if n not in auxiliary]
    unexpected = sorted(n for n in state if n not in own)
    if missing or unexpected:
        raise ModelError(
            f"{checkpoint.path} belongs to another architecture: {len(missing)} keys missing"
            f"{examples(missing)}, {len(unexpected)} unexpected{examples(unexpected)}",
            "Name the model the weights were trained with"
            + (f", or other weights: {checkpoint.path}#KEY." if checkpoint.taken else "."),
        )
    if auxiliary:
        notes.append("built without the auxiliary heads, which it does not have")
    counted = {n: t for n, t in own.items() if n.endswith("num_batches_tracked")}
    tensors = {**counted, **state}
    return Fitted(tensors, bool(auxiliary), tuple(notes))


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError for weights that no model computes with: sparse, complex, quantised or not
    finite.
    """
    for name, tensor in tensors.items():
        if what := _unusable(own[name], tensor):
            raise ModelError(
                f"{path}: the weights of {name} are {what}",
                "Save a dense float32 state dict of a model that works.",
            )


def examples(names: list[str]) -> str:
    """The first of some names in brackets, with a blank before; nothing for none."""
    return f" ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" if names else ""


# ---- reading --------------------------------------------------------------------------------


def _harmless() -> list[Any]:
    """Types that hold data and do nothing when they are made, as pickles name them."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = "?bhilqBHILQefd"
    return [
        argparse.Namespace,
        pathlib.PosixPath,
        pathlib.PurePosixPath,
        np.dtype,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),  # before numpy 2
        *{type(np.dtype(kind)) for kind in kinds},
    ]


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors: they are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"no weights at {path}", "Has the run finished?") from None
    except Exception as error:  # pickle and safetensors raise many kinds, with advice not for users
        raise ModelError(
            f"{path} cannot be read as plain tensors ({type(error).__name__})",
            "Save the state dict alone (torch.save(model.state_dict(), ...)) or as .safetensors.",
        ) from error


def _tensors(found: Any) -> dict[str, Tensor]:
    if not isinstance(found, Mapping):
        return {}
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _holds_tensors(found: Any) -> bool:
    return isinstance(found, Mapping) and any(
        isinstance(value, Tensor) or _holds_tensors(value) for value in found.values()
    )


def _searched(found: Any, trail: list[str]) -> tuple[Any, list[str], list[str]]:
    """Follow the known keys down to weights; and the places that were passed by, as dotted keys."""
    passed: list[str] = []
    while isinstance(found, Mapping):
        keys = [*EMA_KEYS, *WEIGHT_KEYS]
        if trail and trail[-1] in EMA_KEYS:
            keys += _INSIDE_EMA
        there = [key for key in keys if key in found and _holds_tensors(found[key])]
        if not there:
            break
        passed += [".".join([*trail, key]) for key in there[1:]]
        found, trail = found[there[0]], [*trail, there[0]]
    return found, trail, passed


def _named(document: Any, key: str, path: Path) -> tuple[Any, list[str], str]:
    """What a dotted key names: a mapping, the keys to it, and what its tensors begin with."""
    trail: list[str] = []
    found, rest = document, key
    while rest and isinstance(found, Mapping):
        parts = rest.split(".")
        heads = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        head = next((h for h in heads if _holds_tensors(found.get(h))), None)
        if head is None:
            break
        found, trail, rest = found[head], [*trail, head], rest[len(head) + 1 :]
    prefix = f"{rest}." if rest else ""
    if not any(name.startswith(prefix) for name in _tensors(found)) and (
        prefix or not _holds_tensors(found)
    ):
        raise ModelError(
            f"{path} has no weights under '{key}'",
            f"Give one of its keys{_offer(document, path)}.",
        )
    return found, trail, prefix


def _offer(document: Any, path: Path) -> str:
    """The keys of a file under which there are tensors, as a user would name them."""
    if not isinstance(document, Mapping):
        return ""
    keys = [str(key) for key, value in document.items() if _holds_tensors(value)]
    return f": {', '.join(f'{path.name}#{key}' for key in keys[:4])}" if keys else ""


def _where(trail: list[str], key: str) -> str:
    return f" under '{key or '.'.join(trail)}'" if trail or key else ""


# ---- names ----------------------------------------------------------------------------------


def _prefix(own: Mapping[str, Tensor], theirs: Iterable[str], path: Path) -> str:
    """What the names of the model's tensors begin with in a file."""
    names = {*theirs}
    needed = {n for n in own if not n.endswith("num_batches_tracked") and not _AUXILIARY.match(n)}
    fits = [p for p in _candidates(needed, names) if all(p + n in names for n in needed)]
    if "" in fits:
        return ""
    for wanted in ("ema", "student"):
        if len(fits) > 1:
            fits = [p for p in fits if wanted in p] or fits
    if len(fits) > 1:
        raise ModelError(
            f"{path} holds several models: {', '.join(map(repr, fits[:4]))}",
            f"Choose one: {path}#{fits[0].rstrip('.')}.",
        )
    if fits:
        return fits[0]
    shared, names = "", names - {*_COUNTERS}
    while len(parts := {n[len(shared) :].partition(".")[0] for n in names}) == 1:
        (part,) = parts
        if f"{shared}{part}" in names or any(n.startswith(f"{part}.") for n in needed):
            break
        shared += f"{part}."
    return shared


def _candidates(needed: set[str], names: set[str]) -> Iterator[str]:
    """What stands before one of the model's names in the file: sorted, each once."""
    if not needed:
        yield ""
        return
    anchor = min(needed)
    before = {n[: -len(anchor)] for n in names if n.endswith(anchor)}
    yield from sorted(p for p in before if not p or p.endswith("."))


def _unusable(own: Tensor, theirs: Tensor) -> str:
    """Why a model cannot compute with a tensor; empty if it can."""
    if theirs.layout != torch.strided:
        return f"sparse ({theirs.layout})"
    if theirs.is_complex():
        return "complex numbers"
    if theirs.is_quantized or (own.is_floating_point() and not theirs.is_floating_point()):
        return f"{theirs.dtype}: quantised to integers"
    if not own.is_floating_point() or not theirs.is_floating_point():
        return ""
    finite = torch.isfinite(theirs.float()).all()
    # A buffer may hold infinities by design, a mask for example: then the new model has them too.
    return "" if finite or not torch.isfinite(own).all() else "not finite"
