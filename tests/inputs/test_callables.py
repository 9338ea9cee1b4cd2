"""Datasets of a user's own that are not what they should be: one error each, with its remedy."""

import errno
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refused
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets import Skip, load_dataset
from stages.inputs.feed import ViewFeed, plain_view
from stages.inputs.rendered import worker_error

_fresh = itertools.count()

SOURCE = '''
import random
import numpy as np
import torch
from PIL import Image

HWC = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)

class Data:
    """Four images; whatever is given replaces what is right."""

    def __init__(self, images=HWC, **given):
        self.images = images
        self.__dict__.update(given)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.images[i], (0, 1, 0, 1)[i]

def labelled(targets, **given):
    return lambda split: Data(targets=targets, **given)

fine = labelled([0, 1, 2, 0])
multi_label = labelled([[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1]])
ragged = labelled([[1], [0, 1], [], [2]])
texts = labelled(["cat", "dog", "cat", "dog"])
one_hot = labelled(np.eye(4))
column = labelled(torch.tensor([[0], [1], [2], [0]]))
floats = labelled([0.0, 0.5, 1.0, 1.0])
missing = labelled([0.0, float("nan"), 1.0, 1.0])
whole_floats = labelled([0.0, 1.0, 2.0, 0.0])
from_one = labelled([1, 2, 3, 1])
from_one_named = labelled([1, 2, 3, 1], classes=["a", "b", "c"])
negative = labelled([0, -1, 1, 1], classes=["a", "b"])
beyond = labelled([0, 1, 2, 1], classes=["a", "b"])
huge = labelled([0, 1, 10**12, 1])
no_list = labelled(3)
odd_classes = labelled([0, 1, 2, 0], classes=7)

nothing = lambda split: None

not_callable = 3

def raises(split):
    raise OSError("the disk is on fire")

def leaves(split):
    raise SystemExit("bye")

def wants_more(split, more):
    return Data()

iterable = lambda split: iter([(HWC[0], 0)])

class Raising(Data):
    def __getitem__(self, i):
        if i == 2:
            raise KeyError("sample")  # line to be named
        return super().__getitem__(i)

item_raises = lambda split: Raising(targets=[0, 1, 0, 1])

class Returning(Data):
    def __getitem__(self, i):
        return self.item

item_dict = lambda split: Returning(item={"image": HWC[0], "label": 0})
item_alone = lambda split: Returning(item=(HWC[0],))
image_object = lambda split: Returning(item=(object(), 0), targets=[0, 1, 0, 1])
image_float = lambda split: Data(images=HWC / 255)
image_deep = lambda split: Data(images=HWC.astype(np.uint16))
channels_first = lambda split: Data(images=HWC.transpose(0, 3, 1, 2))
palette = lambda split: Data(images=[Image.fromarray(x).convert("P") for x in HWC])
grey_among_colour = lambda split: Data(images=[HWC[0], HWC[1][..., 0], HWC[2], HWC[3]])

class Random(Data):
    def __getitem__(self, i):
        return HWC[i] + np.uint8(random.randrange(1, 200)), i % 2

random_pixels = lambda split: Random()
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("code"), SOURCE)


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for folder in tmp_path_factory.getbasetemp().glob("code*"):
        monkeypatch.syspath_prepend(folder)


def write(folder: Path, source: str) -> str:
    name = f"user_code_{os.getpid()}_{next(_fresh)}"
    (folder / f"{name}.py").write_text(source)
    return name


@pytest.mark.parametrize(
    ("kind", "cause", "remedy"),
    [
        ("multi_label", "shape 4x3", "one class number"),
        ("ragged", "different kinds or lengths", "one class number"),
        ("texts", "texts as labels, 'cat'", "classes.index"),
        ("one_hot", "shape 4x4", "argmax(1)"),
        ("column", "shape 4x1", "[:, 0]"),
        ("floats", "no class numbers", "integers that count from 0"),
        ("missing", "no class numbers", "integers that count from 0"),
        ("from_one", "labels from 1 to 3", "subtract 1"),
        ("huge", "no class numbers", "integers that count from 0"),
        ("from_one_named", "labels from 1 to 3 for 3 classes", "subtract 1"),
        ("negative", "labels from -1 to 1", "count from 0"),
        ("beyond", "labels from 0 to 2 for 2 classes", "one class name a label"),
        ("no_list", "targets of", "Mend"),
        ("odd_classes", "classes of", "Mend"),
        ("nothing", "is a NoneType", "len(dataset)"),
        ("not_callable", "int, which cannot be called", "'train' and 'test'"),
        ("raises", "raised OSError: the disk is on fire", "Mend"),
        ("leaves", "raised SystemExit: bye", "Mend"),
        ("wants_more", "raised TypeError", "Mend"),
        ("iterable", "without length", "len(dataset)"),
        ("item_dict", "is a dict of 2", "(image, label)"),
        ("item_alone", "is a tuple of 1", "(image, label)"),
        ("image_object", "no image but object", "PIL images or uint8"),
        ("image_float", "float64", "uint8 pixels"),
        ("image_deep", "uint16", "uint8 pixels"),
        ("channels_first", "channels first", "transpose"),
        ("palette", "mode P", "convert('RGB')"),
        ("random_pixels", "other pixels each time", "--augment"),
    ],
)
def test_one_error_with_its_remedy(module: str, kind: str, cause: str, remedy: str) -> None:
    with refused(DatasetError, cause, remedy):
        load_dataset(f"{module}:{kind}", "train", feeding="memory")


def test_what_is_right_stays_right(module: str) -> None:
    for kind in ("fine", "whole_floats"):
        dataset = load_dataset(f"{module}:{kind}", "train")
        assert dataset.labels.tolist() == [0, 1, 2, 0]
        assert dataset.labels.dtype == torch.int64
        assert dataset.class_names == ("0", "1", "2")
        expected = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
        assert np.array_equal(dataset.load(3).numpy(), expected[3].transpose(2, 0, 1))


def test_the_line_of_the_users_code_is_named(module: str) -> None:
    line = SOURCE[: SOURCE.index("# line to be named")].count("\n") + 1
    with pytest.raises(DatasetError, match=rf"sample 2 of .*{module}\.py:{line}"):
        load_dataset(f"{module}:item_raises", "train", feeding="memory")


def test_code_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for source, message in (("1 / 0", "ZeroDivisionError"), ("x = (", "SyntaxError")):
        name = write(tmp_path, source)
        with pytest.raises(DatasetError, match=rf"importing .*{message}.*{name}\.py:1"):
            load_dataset(f"{name}:x", "train")


def test_a_sample_that_raises_can_be_skipped(module: str) -> None:
    dataset = load_dataset(f"{module}:item_raises", "train", skips=[Skip("train", 2)])
    assert dataset.shown.tolist() == [0, 1, 3]
    assert not bool(dataset.load(2).any())


def test_channels_that_differ(module: str) -> None:
    with pytest.raises(DatasetError, match=r"image 1 .* 1 channel\(s\), others 3"):
        load_dataset(f"{module}:grey_among_colour", "train", feeding="memory").load(1)


def first_batch(load: Callable[[int], Tensor], module: str, workers: int) -> None:
    import dataclasses

    dataset = load_dataset(f"{module}:fine", "train", feeding="stream")
    dataset = dataclasses.replace(dataset, load=load)
    feed = ViewFeed(dataset, plain_view(None, None), torch.device("cpu"), workers=workers)
    try:
        list(feed.batches(torch.arange(4), 0, 2))
    finally:
        feed.close()


def killed(index: int) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def failing(index: int) -> Tensor:
    raise RuntimeError("something of ours")


@pytest.mark.parametrize(
    ("load", "cause"), [(killed, "ended by the system"), (failing, "something of ours")]
)
def test_a_failing_worker_is_told(module: str, load: Callable[[int], Tensor], cause: str) -> None:
    with refused(DatasetError, cause, "--workers 0"):
        first_batch(load, module, workers=1)


def test_without_workers_a_fault_of_ours_keeps_its_traceback(module: str) -> None:
    with pytest.raises(RuntimeError, match="something of ours"):
        first_batch(failing, module, workers=0)


WORKER = "DataLoader worker (pid 7)"


@pytest.mark.parametrize(
    ("error", "cause", "remedy"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many files", "ulimit"),
        (RuntimeError("received 0 items of ancdata"), "too many files", "ulimit"),
        (RuntimeError(f"{WORKER} is killed by signal: Bus error."), "shared memory", "--shm-size"),
        (RuntimeError("unable to write: No space left on device"), "shared memory", "--workers 0"),
        (RuntimeError(f"{WORKER} exited unexpectedly"), "ended by the system", "memory was short"),
        (RuntimeError(f"{WORKER} is killed by signal: Killed. "), "(Killed)", "memory was short"),
    ],
)
def test_what_torch_says_of_workers(error: Exception, cause: str, remedy: str) -> None:
    message = worker_error(error, 4)
    assert cause in message.cause
    assert remedy in message.remedy
