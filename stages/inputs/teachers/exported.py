"""Models as a file that holds their computation: `torchscript:FILE` and `export:FILE`.

Such a file says neither how its images were normalised nor how large they were: give --mean, --std
and --image-size. Constants may lie in its code beside the weights, so that the whole file is what
the identity has of it. `torch.export.load` unpickles: take files from people you trust alone.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import ModelError
from stages.inputs.models import Model
from stages.inputs.run_files import sha256
from stages.inputs.teachers.registry import Asked, first_line, teacher


@teacher("torchscript:")
def torchscript(asked: Asked) -> Model:
    """What `torch.jit.save` wrote. Raises ModelError."""
    path = _file(asked)
    try:
        with warnings.catch_warnings():  # torch has deprecated it, and people have such files
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"cannot load {asked.name}: {first_line(error)}",
            "Give a file that torch.jit.save wrote; state dicts are --weights.",
        ) from error
    return _model(module, asked, path)


@teacher("export:")
def exported(asked: Asked) -> Model:
    """What `torch.export.save` wrote, for batches of any size. Raises ModelError."""
    path = _file(asked)
    try:
        program = torch.export.load(path)
    except Exception as error:  # zip, pickle and json raise many kinds
        raise ModelError(
            f"cannot load {asked.name}: {first_line(error)}",
            "Give a file that torch.export.save wrote, with this version of torch or an older one.",
        ) from error
    inputs = {*program.graph_signature.user_inputs}
    taken: list[Any] = [node.meta["val"] for node in program.graph.nodes if node.name in inputs]
    shape: tuple[Any, ...] = tuple(taken[0].shape) if taken and isinstance(taken[0], Tensor) else ()
    if not shape or isinstance(shape[0], int):  # else a symbol
        raise ModelError(
            f"{asked.name} was exported for {shape}, not for batches of any size",
            "Export it with dynamic_shapes={'x': {0: torch.export.Dim('batch')}}.",
        )
    return _model(_Program(program.module()), asked, path)


class _Program(nn.Module):
    """An exported program, which refuses to be told that it evaluates: it cannot train."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def train(self, mode: bool = True) -> "_Program":
        """It is as it was exported."""
        return self

    def forward(self, images: Tensor) -> Any:
        """What the program returns."""
        return self.module(images)


def _file(asked: Asked) -> Path:
    path = Path(asked.argument).expanduser()
    if not path.is_file():
        raise ModelError(f"there is no file {path}", f"Give {asked.kind}FILE.")
    return path


def _model(module: nn.Module, asked: Asked, path: Path) -> Model:
    return Model(module, asked.name, 3, digest=sha256(path.read_bytes())[:32])
