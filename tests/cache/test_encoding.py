import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from stages.cache.encoding import ENCODINGS, encoding, row_bytes
from stages.errors import CacheError

HALF_MAX = 65_504.0


def rows(largest: float) -> st.SearchStrategy[NDArray[np.float32]]:
    """float32 (n, C), every finite value up to `largest`, denormals and -0 included."""
    values = st.floats(-largest, largest, width=32)
    return hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=values
    )


@given(rows(float(np.finfo(np.float32).max)))
def test_float32_is_exact(logits: NDArray[np.float32]) -> None:
    coding = ENCODINGS["float32"]()

    decoded = coding.decode(coding.encode(torch.from_numpy(logits))).numpy()

    assert decoded.dtype == np.float32
    assert decoded.tobytes() == logits.tobytes()


@given(rows(HALF_MAX))
def test_float16_is_within_half_a_unit_in_the_last_place(logits: NDArray[np.float32]) -> None:
    coding = ENCODINGS["float16"]()

    decoded = coding.decode(coding.encode(torch.from_numpy(logits)))

    assert decoded.dtype == torch.float32
    error = np.abs(decoded.numpy().astype(np.float64) - logits)
    # 11 significant bits; 2^-25 is half the spacing of half precision's denormals
    assert np.all(error <= np.maximum(np.abs(logits.astype(np.float64)) * 2**-11, 2.0**-25))


@pytest.mark.parametrize("value", [65_536.0, -70_000.0, 1e30])
def test_float16_refuses_what_it_cannot_hold(value: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [value, 0.0]])

    with pytest.raises(CacheError, match="does not fit in float16") as caught:
        ENCODINGS["float16"]().encode(logits)
    assert "--encoding float32" in caught.value.remedy


def test_no_rows_are_encoded_and_decoded() -> None:
    for name in ENCODINGS:
        coding = encoding(name, 7)
        assert coding.decode(coding.encode(torch.empty(0, 7))).shape == (0, 7)


@pytest.mark.parametrize(
    ("name", "classes", "chosen"),
    [
        pytest.param("auto", 2, "float32", id="two-classes"),
        pytest.param("auto", 10, "float32", id="ten-classes"),
        pytest.param("float16", 10, "float16", id="asked-for"),
        pytest.param("float32", 1000, "float32", id="exact-asked-for"),
    ],
)
def test_choice(name: str, classes: int, chosen: str) -> None:
    assert encoding(name, classes).name == chosen


@pytest.mark.parametrize("classes", [11, 100, 1000])
def test_auto_is_smaller_than_float32_above_ten_classes(classes: int) -> None:
    assert row_bytes(encoding("auto", classes), classes) < 4 * classes


def test_unknown_encoding_lists_the_known_ones() -> None:
    with pytest.raises(CacheError, match="unknown encoding 'float8'") as caught:
        encoding("float8", 10)
    assert all(name in caught.value.remedy for name in ("auto", *ENCODINGS))


@pytest.mark.parametrize(
    ("name", "classes", "size"), [("float32", 10, 40), ("float16", 100, 200), ("float16", 7, 14)]
)
def test_row_bytes(name: str, classes: int, size: int) -> None:
    assert row_bytes(encoding(name, classes), classes) == size
