"""Tensors on their way to a device: on a CPU nothing is copied."""

import pytest
import torch
from pretended_gpu import pretended_gpu

from stages.device import check_precision, forward
from stages.errors import ConfigError
from stages.inputs.feed import send
from stages.targets.reader import Upload

CPU = torch.device("cpu")


def test_nothing_moves_on_a_cpu() -> None:
    tensor = torch.arange(3)
    assert send(tensor, CPU) is tensor
    assert Upload(CPU)(tensor) is tensor


@pytest.mark.parametrize(("tf32", "expected"), [(None, "ieee"), (False, "ieee"), (True, "tf32")])
def test_products_of_float32_are_exact_unless_asked(tf32: bool | None, expected: str) -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        with pretended_gpu():
            forward(lambda images: images, torch.ones(2, 3).to("cuda"), "float32", tf32)
        assert (matmul.fp32_precision, conv.fp32_precision) == (expected, expected)
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def test_tf32_is_refused_without_a_gpu() -> None:
    check_precision(CPU, None)
    with pytest.raises(ConfigError, match="tf32 is a precision of NVIDIA's GPUs"):
        check_precision(CPU, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_arrive_on_a_gpu_whatever_happens_to_the_memory_they_came_from() -> None:
    gpu = torch.device("cuda")
    upload = Upload(gpu)
    for of in range(20):
        tensor = torch.full((2**20,), of)
        sent, uploaded = send(tensor, gpu), upload(tensor)
        tensor.fill_(-1)
        expected = torch.full((2**20,), of)
        assert torch.equal(sent.cpu(), expected)
        assert torch.equal(uploaded.cpu(), expected)
