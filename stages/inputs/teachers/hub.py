"""Models of a local repository with a `hubconf.py`: `hub:REPO:NAME`.

Its code is run, as the user has named it; what that code downloads is its own affair. Fails when:
NAME needs arguments.
"""

from pathlib import Path

import torch
from torch import nn

from stages.errors import ModelError
from stages.inputs.models import Model, with_weights_file
from stages.inputs.teachers.registry import Asked, teacher
from stages.user_code import error_line


@teacher("hub:", weights=True)
def hub(asked: Asked) -> Model:
    """What `torch.hub.load(REPO, NAME, source='local')` returns; `--weights pretrained` passes
    pretrained=True on, and a file's weights are loaded into it. Raises ModelError.
    """
    repository, colon, name = asked.argument.rpartition(":")
    folder = Path(repository).expanduser()
    if not colon or not (folder / "hubconf.py").is_file():
        raise ModelError(f"{asked.name} names no folder with a hubconf.py", "Give hub:FOLDER:NAME.")
    pretrained = {"pretrained": True} if asked.weights == "pretrained" else {}
    try:
        module = torch.hub.load(str(folder), name, source="local", **pretrained)
    except Exception as error:
        raise ModelError(
            f"{asked.name} failed: {error_line(error)}",
            "NAME is a function of hubconf.py that needs no argument.",
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{asked.name} returned a {type(module).__name__}, not a torch.nn.Module")
    note = f"no --weights: {asked.name} is used with those that it was made with"
    if asked.weights in (None, "pretrained"):
        return Model(module, asked.name, 3, notes=() if pretrained else (note,))
    return with_weights_file(Model(module, asked.name, 3), asked.weights or "")
