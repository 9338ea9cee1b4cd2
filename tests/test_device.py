"""Tensors on their way to a device: on a CPU nothing is copied."""

import pytest
import torch

from stages.device import Upload
from stages.inputs.feed import send

CPU = torch.device("cpu")


def test_nothing_moves_on_a_cpu() -> None:
    tensor = torch.arange(3)
    assert send(tensor, CPU) is tensor
    assert Upload(CPU)(tensor) is tensor


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
