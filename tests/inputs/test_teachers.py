"""Teachers of other libraries: small random models, saved as these libraries save them.

The truth is the library itself: its model on what its own preprocessing makes of an image.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, smooth
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.cache import LogitCache
from stages.cache_teacher import CacheJob, cache_teacher, prepare
from stages.errors import PipelineError
from stages.inputs.datasets import ImageDataset
from stages.inputs.models import build_model, load_model
from stages.inputs.teachers import KINDS, load_teacher
from stages.inputs.teachers.hugging_face import processing_of
from stages.settings import CacheConfig, DataSettings, TeacherSettings
from stages.teacher.logits import TeacherPass
from stages.teacher.recorded import recorded_job
from stages.user_code import trusting

CLASSES = ("cat", "dog", "tree_frog")
SIDE = 32
OFFSET = {"rescale_offset": True, "rescale_factor": 2 / 255}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/CLASS/IMAGE; the last image of a class is not square."""
    root = tmp_path_factory.mktemp("photographs")
    for seed, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(4):
            smooth(4 * seed + i, 48, 64 if i == 3 else 48).save(root / name / f"{i}.png")
    return root


def job(photographs: Path, **teacher: Any) -> CacheJob:
    data = DataSettings(dataset=f"folder:{photographs}", test="0.3", workers=0)
    own = {"data": data, "teacher": TeacherSettings(**teacher), "augment": "none", "views": 1}
    return prepare(CacheConfig(device="cpu", **own))


def pillow(dataset: ImageDataset, sample: int) -> Image.Image:
    return Image.fromarray(dataset.load(sample).permute(1, 2, 0).numpy())


def logits_of(made: CacheJob, samples: list[int]) -> Tensor:
    teacher = TeacherPass.of(made)
    found = teacher.logits(torch.tensor(samples), 0)
    teacher.feed.close()
    return found


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer of one layer, of the three classes in another order."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=SIDE,
        patch_size=8,
        id2label=dict(enumerate(reversed(CLASSES))),
        label2id={name: i for i, name in enumerate(reversed(CLASSES))},
        initializer_range=0.5,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    size = {"height": SIDE, "width": SIDE}
    transformers.ViTImageProcessor(size=size, **statistics).save_pretrained(folder)
    return folder


def test_a_transformer_says_what_its_library_says(
    vit: Path, photographs: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(PipelineError, match="another order"):
        job(photographs, architecture=f"hf-model:{vit}")
    made = job(photographs, architecture=f"hf-model:{vit}", class_order="teacher")
    train = made.splits.train
    processor = transformers.AutoImageProcessor.from_pretrained(vit)
    model = transformers.AutoModelForImageClassification.from_pretrained(vit).eval()
    samples = list(range(len(train)))  # one of them is not square: it is squashed
    pixels = processor([pillow(train, i) for i in samples], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**pixels).logits.flip(1)
    torch.testing.assert_close(logits_of(made, samples), theirs, atol=0.05, rtol=0.05)
    assert made.identity.teacher.class_order == (2, 1, 0)
    assert made.identity.teacher.image_size == SIDE
    assert made.identity.teacher.mean == pytest.approx((0.5, 0.4, 0.3))
    cache_teacher(made, tmp_path / "c.zarr")
    again = recorded_job(tmp_path / "c.zarr")
    assert again.identity == LogitCache.open(tmp_path / "c.zarr").identity


@pytest.mark.parametrize(
    ("kind", "options", "size", "zoom"),
    [
        ("ViT", {"size": {"height": 16, "width": 16}}, 16, 0.0),
        ("Bit", {"size": {"shortest_edge": 20}, "crop_size": 16}, 16, 1.25),
        ("ConvNext", {"size": {"shortest_edge": 14}, "crop_pct": 0.875}, 14, 8 / 7),
        ("ConvNext", {"size": {"shortest_edge": 384}, "crop_pct": 0.9}, 384, 0.0),
        ("EfficientNet", {"size": {"height": 16, "width": 16}, **OFFSET}, 16, 0.0),
    ],
)
def test_processors(kind: str, options: dict[str, Any], size: int, zoom: float) -> None:
    """Mean and deviation are compared with what the processor makes of two grey images."""
    transformers, processor = pytest.importorskip("transformers"), f"{kind}ImageProcessor"
    made = getattr(transformers, processor)(**options)
    found = processing_of(made.to_dict(), processor)
    assert (found.image_size, found.zoom) == (size, pytest.approx(zoom))
    assert found.statistics is not None
    mean, std = (torch.tensor(values)[:, None] for values in found.statistics)
    for shade in (0, 200):
        grey = Image.new("RGB", (64, 64), (shade, shade, shade))
        theirs = torch.as_tensor(made(grey, return_tensors="pt")["pixel_values"][0]).flatten(1)
        torch.testing.assert_close(theirs, ((shade / 255 - mean) / std).expand_as(theirs))


def test_unnamed_outputs_are_no_classes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=7, layer_type="basic"
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    model = load_teacher(TeacherSettings(architecture=f"hf-model:{tmp_path}"), CLASSES, 3)
    assert model.classes is None
    assert "no processor" in model.notes[0]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": SIDE, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}})
    )
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def test_a_zero_shot_classifier(clip_folder: Path, photographs: Path, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "prompts.yaml").write_text(
        "templates: ['a photo of a {}.', 'a drawing of the {}']\nclasses: {cat: [cat, kitten]}\n"
    )
    made = job(
        photographs, architecture=f"clip:{clip_folder}", prompts=str(tmp_path / "prompts.yaml")
    )
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    model.eval()
    train = made.splits.train
    square = [i for i in range(len(train)) if train.load(i).shape[1:] == (48, 48)]
    weights, templates = [], ["a photo of a {}.", "a drawing of the {}"]
    with torch.no_grad():
        for names in (["cat", "kitten"], ["dog"], ["tree frog"]):
            prompts = [t.format(n) for n in names for t in templates]
            rows = [F.normalize(model.encode_text(tokenize([p])), dim=-1) for p in prompts]
            weights.append(F.normalize(torch.cat(rows).mean(0), dim=0))
        images = torch.stack([preprocess(pillow(train, i)) for i in square])
        theirs = (
            model.logit_scale.exp()
            * model.encode_image(images, normalize=True)
            @ torch.stack(weights).T
        )
    # torchvision's bicubic filter of tensors and Pillow's, which open_clip uses, round differently.
    ours = logits_of(made, square)
    assert float((ours - theirs).abs().max()) < 0.02 * float(theirs.std())
    assert made.policy.parameters["interpolation"] == "bicubic"
    other = job(photographs, architecture=f"clip:{clip_folder}")
    assert other.identity.teacher.weights != made.identity.teacher.weights  # other texts
    assert not any("token" in name for name in made.model.module.state_dict())


def test_prompts_name_classes(clip_folder: Path, tmp_path: Path) -> None:
    def classes(name: str, text: str, known: tuple[str, ...]) -> tuple[str, ...] | None:
        (tmp_path / name).write_text(text)
        asked = {"architecture": f"clip:{clip_folder}", "prompts": str(tmp_path / name)}
        return load_teacher(TeacherSettings(**asked), known, 3).classes

    assert classes("p.yaml", "classes: {cat: cat, emu: a tall bird}", ()) == ("cat", "emu")
    assert classes("p.txt", "a {}\n\nthe {}\n", CLASSES) == CLASSES


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).amax((2, 3))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, small: nn.Module) -> Path:
    folder = tmp_path_factory.mktemp("files")
    example = torch.zeros(2, 3, SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has deprecated TorchScript
        torch.jit.save(torch.jit.trace(small, example), str(folder / "m.pt"))
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    torch.export.save(
        torch.export.export(small, (example,), dynamic_shapes=(batch,)), folder / "m.pt2"
    )
    torch.export.save(torch.export.export(small, (example,)), folder / "two.pt2")
    torch.save(small.state_dict(), folder / "state.pth")
    (folder / "hubconf.py").write_text(
        "import torch\n"
        "def net(pretrained=False):\n"
        "    torch.manual_seed(5 if pretrained else 1)\n"
        "    import test_teachers\n"
        "    return test_teachers.Small()\n"
        "def text(): return 'no module'\n"
        "def broken(): raise KeyError('gamma')\n"
    )
    return folder


@pytest.mark.parametrize("name", ["torchscript:FILES/m.pt", "export:FILES/m.pt2"])
def test_files_that_hold_their_computation(
    files: Path, small: nn.Module, photographs: Path, tmp_path: Path, name: str
) -> None:
    how = {"image_size": SIDE, "mean": (0.5,), "std": (0.25,)}
    made = job(photographs, architecture=name.replace("FILES", str(files)), **how)
    train = made.splits.train
    feed = made.feed(train, made.policy)
    samples = torch.arange(len(train))
    (batch,) = feed.batches(samples, 0, 100)
    with torch.no_grad():
        theirs = small(made.normalise(batch.pixels))
    torch.testing.assert_close(logits_of(made, samples.tolist()), theirs)
    cache_teacher(made, tmp_path / "c.zarr")
    assert recorded_job(tmp_path / "c.zarr").identity == made.identity


def test_a_hub_repository(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    name = f"hub:{files}:net"
    plain, pretrained, saved = (
        load_teacher(TeacherSettings(architecture=name, weights=weights), CLASSES, 3)
        for weights in (None, "pretrained", str(files / "state.pth"))
    )
    states = [m.module.state_dict()["layer.weight"] for m in (plain, pretrained, saved)]
    torch.manual_seed(5)
    assert torch.equal(states[1], Small().layer.weight)
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[2], torch.load(files / "state.pth")["layer.weight"])
    assert "no --weights" in plain.notes[0]
    assert not pretrained.notes


def test_code_of_a_repository_that_only_a_cache_names(
    files: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    how = {"image_size": SIDE, "mean": (0.5,), "std": (0.25,)}
    cache_teacher(job(photographs, architecture=f"hub:{files}:net", **how), tmp_path / "c.zarr")
    with pytest.raises(PipelineError, match="names code of its own"):
        recorded_job(tmp_path / "c.zarr")
    with trusting(f"hub:{files}"):
        recorded_job(tmp_path / "c.zarr")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Folders with mistakes."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.bin").write_text("no archive")
    for name, text in {
        "holes.txt": "a photo\n",
        "other.yaml": "templates: ['{}']\ncolour: red\n",
        "broken.yaml": "templates: [",
        "map.yaml": "classes: [cat]",
        "void.yaml": "classes: {cat: []}",
        "seq.yaml": "- templates: a",
    }.items():
        (tmp_path / name).write_text(text)
    return {"TMP": tmp_path}


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def headless(folder: Path) -> None:
    weights = folder / "model.safetensors"
    state = {n: t for n, t in load_file(weights).items() if "classifier" not in n}
    save_file(state, weights, {"format": "pt"})


OBLONG = {"size": {"height": SIDE, "width": 2 * SIDE}}
WRONG: dict[str, Callable[[Path], object]] = {
    "headless": headless,
    "unknown": lambda f: rewrite(f / "config.json", model_type="no_such_type"),
    "no json": lambda f: (f / "config.json").write_text("{"),
    "no config": lambda f: (f / "config.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "cut off": lambda f: os.truncate(f / "model.safetensors", 1000),
    "oblong": lambda f: rewrite(f / "preprocessor_config.json", **OBLONG),
    "wide": lambda f: rewrite(f / "config.json", hidden_size=32),
}


@pytest.mark.parametrize("kind", WRONG)
def test_folders_of_transformers_that_cannot_be_used(vit: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(vit, tmp_path / "wrong")
    WRONG[kind](folder)
    with pytest.raises(PipelineError) as raised:
        load_teacher(TeacherSettings(architecture=f"hf-model:{folder}"), CLASSES, 3)
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("hf-model:TMP/nowhere", {}, "hf-model:"),
        ("hf-model:TMP/empty", {}, "save_pretrained"),
        ("hf-model:TMP", {"weights": "w.pth"}, "brings its weights"),
        ("hf-model:TMP", {"prompts": "p"}, "--prompts is for clip"),
        ("clip:ViT-B-33/openai", {}, "no model 'ViT-B-33'"),
        ("clip:ViT-B-32/no-such-tag", {}, "Give a file, or one of: openai"),
        ("clip:TMP/empty", {}, "no model"),
        ("clip:ViT-S-32-alt/TMP/text.bin", {}, "cannot load"),
        ("clip:RN50/openai", {"weights": "w"}, "brings its weights"),
        ("clip:RN50/openai", {"prompts": "TMP/none"}, "cannot read the prompts"),
        ("clip:RN50/openai", {"prompts": "TMP/holes.txt"}, "without a {}"),
        ("clip:RN50/openai", {"prompts": "TMP/other.yaml"}, "'colour'"),
        ("clip:RN50/openai", {"prompts": "TMP/broken.yaml"}, "cannot read the prompts"),
        ("clip:RN50/openai", {"prompts": "TMP/map.yaml"}, "no mapping"),
        ("clip:RN50/openai", {"prompts": "TMP/void.yaml"}, "no texts"),
        ("clip:RN50/openai", {"prompts": "TMP/seq.yaml"}, "are a list"),
        ("torchscript:TMP/nowhere", {}, "there is no file"),
        ("torchscript:TMP/text.bin", {}, "torch.jit.save"),
        ("torchscript:FILES/m.pt2", {}, "torch.jit.save"),
        ("torchscript:FILES/m.pt", {"weights": "w"}, "brings its weights"),
        ("export:TMP", {}, "there is no file"),
        ("export:TMP/text.bin", {}, "torch.export.save"),
        ("export:FILES/m.pt", {}, "torch.export.save"),
        ("export:FILES/two.pt2", {}, "batches of any size"),
        ("export:FILES/m.pt2", {"weights": "w"}, "brings its weights"),
        ("hub:FILES", {}, "hubconf.py"),
        ("hub:TMP:net", {}, "hubconf.py"),
        ("hub:FILES:nothing", {}, "failed"),
        ("hub:FILES:text", {}, "returned a str"),
        ("hub:FILES:broken", {}, "KeyError: 'gamma'"),
        ("hub:FILES:net", {"weights": "TMP/nowhere"}, "no weights at"),
        ("hub:FILES:net", {"weights": "TMP/text.bin"}, "plain tensors"),
    ],
)
def test_teachers_that_cannot_be(  # type: ignore[no-untyped-def]
    name, more, message, places, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith(("hf-model:", "clip:")) and "weights" not in more:
        pytest.importorskip("transformers" if name.startswith("hf") else "open_clip")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for place, path in {**places, "FILES": files}.items():
        name = name.replace(place, str(path))
        more = {key: value.replace(place, str(path)) for key, value in more.items()}
    with pytest.raises(PipelineError) as raised:
        load_teacher(TeacherSettings(architecture=name, **more), CLASSES, 3)
    assert message in f"{raised.value.cause} {raised.value.remedy}"
    assert len(str(raised.value).splitlines()) <= 3


def test_a_teacher_of_other_classes(vit: Path, tmp_path: Path) -> None:
    config = CacheConfig(
        data=DIGITS,
        teacher=TeacherSettings(architecture=f"hf-model:{vit}"),
        augment="none",
        views=1,
    )
    with pytest.raises(PipelineError, match="other classes than the dataset"):
        prepare(config)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_they_are_no_students(kind: str) -> None:
    with pytest.raises(PipelineError, match="brings its weights"):
        build_model(f"{kind}x", 10, 3)


def test_timm_has_its_data_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: Path
) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model
    torch.manual_seed(0)
    torch.save(create("test_resnet").state_dict(), tmp_path / "timm.pth")
    overlay = {
        **{"file": str(tmp_path / "timm.pth"), "input_size": (3, 64, 64), "crop_pct": 0.8},
        **{"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "interpolation": "bicubic"},
    }
    monkeypatch.setattr(
        timm, "create_model", lambda name, **o: create(name, **o, pretrained_cfg_overlay=overlay)
    )
    model = load_model("timm:test_resnet", "pretrained", 1000, 3)
    config = timm.data.resolve_data_config(model=model.module)
    transform = timm.data.create_transform(**config)
    resized, cropped = transform.transforms[0].size, transform.transforms[1].size
    assert model.image_size == cropped[0]
    assert round(float(model.zoom or 0) * cropped[0]) == resized
    assert model.statistics == (config["mean"], config["std"])
    made = job(
        photographs, architecture="timm:test_resnet", weights="pretrained", classes=_map(tmp_path)
    )
    parameters = made.policy.parameters
    assert parameters["zoom"] == pytest.approx(1 / 0.8)
    assert parameters["interpolation"] == config["interpolation"] == "bicubic"


def _map(folder: Path) -> str:
    (folder / "map.yaml").write_text("cat: 281\ndog: [151, 152]\ntree_frog: 31\n")
    return str(folder / "map.yaml")
