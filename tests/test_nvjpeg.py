"""JPEGs that a GPU decodes. The one call that needs it is replaced by torchvision's on the CPU."""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers import members_of, save_table, smooth, student_of_photographs, write_shard
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks import gpu_jpegs
from benchmarks.parts import SkippedError, Where
from stages.cache import LogitCache
from stages.cached_images import named_images
from stages.data import load_data
from stages.errors import ConfigError, DatasetError, IdentityError
from stages.inputs.datasets import ImageDataset, Skip, load_dataset, nvjpeg
from stages.inputs.datasets.compressed import decode
from stages.inputs.feed import ViewFeed
from stages.inputs.views import view_policy
from stages.settings import (
    DataSettings,
)
from stages.train_student import train_student

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torchvision.io")

SIDES = [(24, 32), (33, 17), (16, 40), (50, 50), (24, 31), (19, 23)]
CPU = torch.device("cpu")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs in two classes; the last is grey."""
    root = tmp_path_factory.mktemp("jpegs")
    for label in "ab":
        (root / label).mkdir()
        for i, sides in enumerate(SIDES):
            image = smooth(i, *sides).convert("L" if (label, i) == ("b", 5) else "RGB")
            image.save(root / label / f"{i}.jpg", quality=95, subsampling=0)
    return root


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call decodes, on the CPU."""
    made: list[int] = []

    def on_cpu(contents: Sequence[Tensor], mode: str) -> list[Tensor]:
        made.append(len(contents))
        chosen = ImageReadMode.GRAY if mode == "L" else ImageReadMode.RGB
        return list(decode_jpeg(list(contents), chosen))

    monkeypatch.setattr(nvjpeg, "_decoded", on_cpu)
    monkeypatch.setattr(nvjpeg, "_unusable", lambda: "")
    return made


def settings(folder: Path, **changes: Any) -> DataSettings:
    own = {"test": "none", "workers": 2, "image_size": 16, "decoder": "nvjpeg", **changes}
    return DataSettings(dataset=f"folder:{folder}", feeding="stream", **own)


def decoded(path: Path, mode: ImageReadMode = ImageReadMode.RGB) -> Tensor:
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    return decode_jpeg(content, mode)


def test_pixels_are_the_decoders_and_views_are_made_as_ever(
    folder: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.inputs.workers._LEAST", 1)  # so that few images are several calls
    train = load_data(settings(folder)).train
    paths = sorted(folder.rglob("*.jpg"))
    for i, path in enumerate(paths):
        assert torch.equal(train.load(i), decoded(path))
        off = train.load(i).int() - decode(path, "", "RGB").int()
        assert float(off.abs().float().mean()) < 2  # Pillow's pixels, nearly
    policy, order = view_policy("resized-crop-flip"), torch.arange(12).flip(0)
    by_one = [decoded(path) for path in paths].__getitem__
    known = ImageDataset("x", "train", ("a", "b"), train.labels, by_one, None, "")
    for batch_size, views in ((5, (0, 3)), (12, (1,)), (4, (0, 1, 2, 5))):
        calls.clear()
        feed = ViewFeed(train, policy, CPU, 16, workers=2)
        alone = ViewFeed(known, policy, CPU, 16, workers=0)
        asked = (order, views, batch_size)
        for ours, theirs in zip(feed.views(*asked), alone.views(*asked), strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one.samples, other.samples)
                assert torch.equal(one.pixels, other.pixels)
        assert sum(calls) == 12  # each image once, however many views
        assert max(calls) == -(-batch_size // len(views))
        feed.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_seeding_policies_are_not_threaded(folder: Path, calls: list[int], workers: int) -> None:
    train, order = load_data(settings(folder)).train, torch.arange(12)
    policy = view_policy("v2:torchvision.transforms.v2:TrivialAugmentWide")
    feed = ViewFeed(train, policy, CPU, 16, workers=workers)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = torch.cat([batch.pixels for batch in feed.batches(order, 3, 4)])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, torch.cat([b.pixels for b in feed.batches(order, 3, 6)]))


def test_every_dataset_decodes_alike(folder: Path, tmp_path: Path, calls: list[int]) -> None:
    """Shards, tables of Hugging Face's, a share of a folder, and one with an image left out."""
    train, files = load_data(settings(folder)).train, sorted(folder.rglob("*.jpg"))
    labels = [0] * 6 + [1] * 6
    write_shard(tmp_path / "x.tar", members_of(files, labels))
    save_table(tmp_path / "hf", files, labels)
    given = {"test": "none", "feeding": "stream", "decoder": "nvjpeg"}
    for spec in (f"wds:{tmp_path}/x.tar", f"hf:{tmp_path}/hf"):
        other = load_dataset(spec, "train", **given)
        calls.clear()
        each = other.load_each(range(12))
        assert (calls, other.decoder) == ([12], "nvjpeg")
        assert all(torch.equal(image, train.load(i)) for i, image in enumerate(each))
    part = load_data(settings(folder, test="0.2")).train
    less = load_dataset(f"folder:{folder}", "train", skips=[Skip("train", 3)], **given)
    assert part.decoder == less.decoder == "nvjpeg"
    assert len(part.load_each([0, 1])) == 2
    shown = less.load_each([2, 3, 4])
    assert torch.equal(shown[0], train.load(2))
    assert torch.equal(shown[2], train.load(4))
    assert int(shown[1].max()) == 0  # left out


def test_grey_datasets_stay_grey(tmp_path: Path, calls: list[int]) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(2):
            smooth(i, 20, 30).convert("L").save(tmp_path / label / f"{i}.jpg")
    train = load_data(settings(tmp_path)).train
    assert train.load(1).shape == (1, 20, 30)
    assert torch.equal(train.load(1), decoded(tmp_path / "a" / "1.jpg", ImageReadMode.GRAY))
    smooth(1, 20, 30).save(tmp_path / "b" / "1.jpg")
    with pytest.raises(DatasetError, match=r"b/1.jpg is in colour"):
        train.load_each([0, 3])


BROKEN = {
    "a PNG": (lambda path: smooth(0, 20, 30).save(path, "PNG"), "no JPEG"),
    "empty": (lambda path: path.write_bytes(b""), "no JPEG"),
    "only a beginning": (lambda path: path.write_bytes(b"\xff\xd8\xff"), "no JPEG"),
    "four colours": (
        lambda path: smooth(0, 20, 30).convert("CMYK").save(path, "JPEG"),
        "4 colours",
    ),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:300]), "cannot read image"),
    "gone": (lambda path: path.unlink(), "No such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize(
    ("case", "workers"), [*((case, 0) for case in BROKEN), ("four colours", 2), ("cut short", 2)]
)
def test_one_broken_image_of_a_batch_is_named(
    case: str, workers: int, folder: Path, tmp_path: Path, calls: list[int]
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    train = load_data(settings(tmp_path)).train
    spoil, message = BROKEN[case]
    spoil(tmp_path / "a" / "4.jpg")
    feed = ViewFeed(train, view_policy("resized-crop-flip"), CPU, 16, workers=workers)
    with pytest.raises(DatasetError, match=message) as caught:
        list(feed.batches(torch.arange(12), 0, 12))
    assert str(tmp_path / "a" / "4.jpg") in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert len(list(feed.batches(torch.arange(4), 0, 4))) == 1


def test_a_batch_that_fails_is_told(
    folder: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, single = load_data(settings(folder)).train, nvjpeg._decoded

    def few(contents: Sequence[Tensor], mode: Any) -> list[Tensor]:
        if len(contents) > 1:
            raise RuntimeError("CUDA out of memory\nand more lines")
        return single(contents, mode)

    monkeypatch.setattr(nvjpeg, "_decoded", few)
    with pytest.raises(DatasetError, match=r"5 images .* CUDA out of memory\n.*batch size"):
        train.load_each(range(5))


@pytest.mark.parametrize(
    ("mode", "options", "found"),
    [
        ("L", {}, 1),
        ("RGB", {}, 3),
        ("RGB", {"progressive": True}, 3),
        ("RGB", {"exif": b"Exif\0\0" + bytes(400)}, 3),
        ("RGB", {"comment": b"\xff\xd8\xff\xc0 a comment like a frame"}, 3),
        ("RGB", {"icc_profile": bytes(70000)}, 3),
        ("CMYK", {}, 4),
    ],
)
def test_colours_are_read_from_the_header(mode: str, options: dict[str, Any], found: int) -> None:
    content = io.BytesIO()
    smooth(0, 20, 30).convert(mode).save(content, "JPEG", **options)
    whole = content.getvalue()
    assert nvjpeg.colours(whole) == found
    assert nvjpeg.colours(b"\xff\xd8\xff\xff" + whole[3:]) == found  # filled up
    for end in range(0, len(whole), 7):  # cut anywhere: the number or none
        assert nvjpeg.colours(whole[:end]) in (0, found)


@without_cuda
@pytest.mark.parametrize("spec", ["folder:FOLDER", "digits", "wds:FOLDER"])
def test_a_machine_without_cuda_is_told(spec: str, folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"no CUDA device here\n.*--decoder"):
        load_dataset(spec.replace("FOLDER", str(folder)), "train", decoder="nvjpeg")


def test_a_torchvision_without_nvjpeg_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_built(contents: Sequence[Tensor], mode: str) -> list[Tensor]:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvjpeg, "_decoded", not_built)
    nvjpeg._unusable.cache_clear()
    try:
        with pytest.raises(DatasetError, match="not compiled with nvJPEG support"):
            load_data(settings(folder))
    finally:
        nvjpeg._unusable.cache_clear()


@pytest.mark.parametrize("changes", [{"exif": True}, {"jpeg_side": 64}])
def test_what_does_not_go_together(changes: dict[str, Any], calls: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"--decoder nvjpeg"):
        DataSettings(dataset="folder:x", decoder="nvjpeg", **changes)
    with pytest.raises(DatasetError, match="--decoder is for JPEG files; 'digits'"):
        load_dataset("digits", "train", decoder="nvjpeg")


def test_a_student_decodes_as_the_teacher_did(
    folder: Path, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of_photographs(settings(folder), tmp_path)
    cache = LogitCache.open(student.cache)
    assert cache.identity.dataset.decoder == "nvjpeg"
    assert named_images(cache, f"folder:{folder}").decoder == "nvjpeg"
    pillow = msgspec.structs.replace(student, data=settings(folder, decoder=None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(IdentityError, match=r"decoder: None, not nvjpeg\n.*--decoder"):
        train_student(pillow, tmp_path / "run2")
    monkeypatch.undo()
    if not torch.cuda.is_available():  # with the option and without
        with pytest.raises(IdentityError, match=r"no CUDA device here\n.*CachedDataset"):
            train_student(pillow, tmp_path / "run3")
        with pytest.raises(DatasetError, match="no CUDA device here"):
            train_student(student, tmp_path / "run4")


@pytest.mark.slow
def test_the_part_of_the_smoke_test(
    tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SkippedError):
        gpu_jpegs.decoded_on_gpu(Where("cpu", tmp_path))
    message, measured = gpu_jpegs.compared(tmp_path / "jpegs", 32, CPU)
    assert message.startswith("0.00 grey levels apart")  # both are libjpeg-turbo here
    assert len(measured) == 3
    right = nvjpeg._decoded
    monkeypatch.setattr(
        nvjpeg, "_decoded", lambda *given: [image.flip(0) for image in right(*given)]
    )
    with pytest.raises(AssertionError, match="from Pillow's"):
        gpu_jpegs.compared(tmp_path / "jpegs", 32, CPU)
