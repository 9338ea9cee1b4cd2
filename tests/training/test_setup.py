"""What teachers and students need before the first step."""

import dataclasses
from collections.abc import Sequence

import pytest

from stages.data import Splits, chosen_policy, dataset_identity
from stages.errors import ConfigError, ViewError
from stages.inputs.feed import plain_view
from stages.inputs.model_input import normalisation
from stages.inputs.models import build_model
from stages.inputs.views import view_policy


def test_policies() -> None:
    """No augmentation shows what evaluation shows; others are as they are named."""
    for image_size, resize in ((None, None), (8, None), (8, 12), (224, 256), (None, 12)):
        plain = plain_view(image_size, resize)
        assert chosen_policy("none", 7, plain) == plain
    for augment in ("pad-crop:pad=2", "pad-crop-flip", "resized-crop-flip"):
        assert chosen_policy(augment, 7, plain_view(224, 256)) == view_policy(augment, 7)
    with pytest.raises(ViewError, match="pad-corp"):
        chosen_policy("pad-corp", 0, plain_view(None, None))


def test_identity_of_a_dataset(digits: Splits) -> None:
    train, identity = digits.train, dataset_identity(digits.train)
    assert (identity.name, identity.split, identity.num_samples) == ("digits", "train", 1000)
    assert identity.class_names == tuple("0123456789")
    assert (identity.labels, identity.images) == (train.labels_digest, train.images_digest)
    relabelled = dataclasses.replace(train, labels=train.labels.flip(0))
    assert dataset_identity(relabelled).labels != identity.labels
    assert dataset_identity(digits.test) != identity


def test_whole_numbers_become_floats(digits: Splits) -> None:
    chosen = normalisation(build_model("resnet8", 10, 1), digits.train, (0,), (1,))
    assert chosen == ((0.0,), (1.0,))
    assert {type(value) for values in chosen for value in values} == {float}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((NAN,), (1.0,), "mean must be finite"),
        ((INF,), (1.0,), "mean must be finite"),
        ((0.0,), (NAN,), "std must be positive"),
        ((0.0,), (INF,), "std must be positive"),
        ((0.0,), (0.0,), "std must be positive"),
        ((0.0,), (-1.0,), "std must be positive"),
        ((0.0,), None, "belong together"),
        (None, (1.0,), "belong together"),
        ((0.0,) * 2, (1.0,) * 2, "mean has 2 numbers"),
    ],
)
def test_a_normalisation_that_cannot_be(
    digits: Splits, mean: Sequence[float] | None, std: Sequence[float] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        normalisation(build_model("resnet8", 10, 1), digits.train, mean, std)
