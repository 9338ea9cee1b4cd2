"""CLIP and its like as zero-shot classifiers, through open_clip: `clip:MODEL/WEIGHTS`.

A class's weight vector is the mean of the normalised embeddings of its prompts, normalised again
(Radford et al. 2021, section 3.1.4); the logits are exp(logit_scale) times the cosines with an
image's embedding. Texts are embedded once, in float32 on the CPU, and kept as a buffer: the digest
of the weights, and with it the identity, has them. The text tower is then let go.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from stages.errors import ConfigError, ModelError
from stages.inputs.class_maps import imagenet_names
from stages.inputs.models import Model
from stages.inputs.teachers.registry import Asked, first_line, needed, teacher

TEMPLATE = "a photo of a {}."
"""Where no prompts are given."""
_AT_ONCE = 256
_FORM = (
    "A file of prompts has a template a line, `a photo of a {}.`; or is YAML with `templates`, and "
    "`classes` where the texts are not the names: {cat: [cat, kitten]}."
)


class ZeroShot(nn.Module):
    """An image tower and the embeddings of the classes' texts, float32 (C, D)."""

    def __init__(self, visual: nn.Module, texts: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.visual = visual
        for name, value in (("texts", texts), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, 3, H, W)."""
        features = self.visual(images)
        features = features[0] if isinstance(features, tuple) else features  # CoCa's has tokens
        cosines = F.normalize(features.float(), dim=-1) @ self.get_buffer("texts").T
        return self.get_buffer("scale") * cosines + self.get_buffer("bias")


@teacher("clip:")
def clip(asked: Asked) -> Model:
    """MODEL/WEIGHTS: open_clip's name of a model, and a file or its name of weights; or a folder
    with open_clip_config.json and weights. Raises ModelError or ConfigError.
    """
    open_clip = needed("open_clip", "clip", asked.name)
    texts, templates = _prompts(asked)
    name, weights = _named(open_clip, asked)
    try:
        with _quietly():
            whole = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
            tokenize = open_clip.get_tokenizer(name)
    except Exception as error:  # of open_clip, of files and of downloads
        raise ModelError(
            f"cannot load {asked.name}: {first_line(error)}",
            "Give clip:MODEL/FILE with weights that belong to this model.",
        ) from error
    whole.eval()
    embedded = embed(whole, tokenize, [*texts.values()], templates)
    scale = whole.logit_scale.exp().float()
    bias = getattr(whole, "logit_bias", None)
    done = dict(open_clip.get_model_preprocess_cfg(whole))
    size = done["size"]
    return Model(
        module=ZeroShot(whole.visual, embedded, scale, scale * 0 if bias is None else bias),
        architecture=asked.name,
        channels=3,
        statistics=(tuple(done["mean"]), tuple(done["std"])),
        image_size=int(size[0] if isinstance(size, list | tuple) else size),
        source=asked.name,
        notes=(f"{len(texts):,} classes, {len(templates)} prompt(s) each: {templates[0]!r}, ...",),
        classes=tuple(texts),
        zoom=0.0 if done.get("resize_mode") == "squash" else 1.0,
        interpolation=str(done.get("interpolation", "bicubic")),
    )


@torch.no_grad()
def embed(
    model: Any, tokenize: Any, texts: Sequence[Sequence[str]], templates: Sequence[str]
) -> Tensor:
    """The weight vector of each class: float32 (C, D), of length 1. texts: what a class is called;
    every text is put into every template.
    """
    prompts = [[t.format(text) for text in names for t in templates] for names in texts]
    flat = [prompt for of_class in prompts for prompt in of_class]
    parts = [
        F.normalize(model.encode_text(tokenize(flat[start : start + _AT_ONCE])).float(), dim=-1)
        for start in range(0, len(flat), _AT_ONCE)
    ]
    classes = torch.cat(parts).split([len(of_class) for of_class in prompts])
    return F.normalize(torch.stack([rows.mean(0) for rows in classes]), dim=-1)


# ---- names and prompts ----------------------------------------------------------------------


def _named(open_clip: Any, asked: Asked) -> tuple[str, str | None]:
    """The model and the weights as open_clip wants them."""
    folder = Path(asked.argument).expanduser()
    if (folder / "open_clip_config.json").is_file():
        return f"local-dir:{folder}", None
    name, _, weights = asked.argument.partition("/")
    if name not in open_clip.list_models():
        raise ModelError(
            f"open_clip has no model {name!r}",
            "Give clip:MODEL/WEIGHTS with a name of open_clip.list_models(), or a folder with "
            "open_clip_config.json.",
        )
    file = Path(weights).expanduser()
    if weights and file.is_file():
        return name, str(file)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags:
        raise ModelError(
            f"there are no weights {weights!r} for {name}",
            f"Give a file, or one of: {', '.join(tags[:8]) or '(none)'}.",
        )
    return name, weights


def _prompts(asked: Asked) -> tuple[dict[str, list[str]], list[str]]:
    """What each class is called, and the templates. Raises ConfigError."""
    given: Any = {} if asked.prompts is None else _read(Path(asked.prompts).expanduser())
    templates = given.get("templates", [TEMPLATE])
    if not _texts(templates) or not all(_fills(t) for t in templates):
        raise ConfigError(f"{asked.prompts} has templates without a {{}} for the class", _FORM)
    called = given.get("classes", {})
    if not isinstance(called, Mapping):
        raise ConfigError(f"`classes` of {asked.prompts} is no mapping", _FORM)
    texts = {str(n): [t] if isinstance(t, str) else t for n, t in called.items()}
    if not all(_texts(names) for names in texts.values()):
        raise ConfigError(f"`classes` of {asked.prompts} names no texts for a class", _FORM)
    names = asked.class_names or tuple(texts)
    if len(names) < 2:
        raise ConfigError(
            f"{asked.name} needs the names of classes, and the images have none",
            f"Give them with --prompts. {_FORM}",
        )
    known = _words()
    return {name: texts.get(name) or [known.get(name, _plain(name))] for name in names}, templates


def _read(path: Path) -> Any:
    try:
        text = path.read_text()
        given = yaml.safe_load(text) if "templates:" in text or "classes:" in text else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(f"cannot read the prompts {path}: {what}", _FORM) from error
    if given is None:
        return {"templates": [line.strip() for line in text.splitlines() if line.strip()]}
    if not isinstance(given, Mapping):
        raise ConfigError(f"the prompts {path} are a {type(given).__name__}", _FORM)
    if unknown := {*given} - {"templates", "classes"}:
        raise ConfigError(f"the prompts {path} have {', '.join(map(repr, unknown))}", _FORM)
    return given


def _texts(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(t, str) and t for t in given)


def _fills(template: str) -> bool:
    try:
        return template.format("cat") != template.format("dog")
    except (IndexError, KeyError, ValueError):
        return False


def _words() -> dict[str, str]:
    """The first word for each of ImageNet's WordNet ids."""
    return {wordnet: words.split(",")[0] for wordnet, words in imagenet_names() or ()}


def _plain(name: str) -> str:
    return name.replace("_", " ")


@contextmanager
def _quietly() -> Iterator[None]:
    """open_clip tells of each step on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
