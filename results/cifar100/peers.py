"""What readers of other tools' caches have of a row of logits: log-probabilities at T=1."""

import torch
from torch import Tensor

_LEAST = 1e-8
"""Probabilities below this are taken for it, so that they have a logarithm."""


def k_largest(logits: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The k largest probabilities, kept in `dtype`, and the rest spread evenly, as FKD, TinyViT and
    ml-dr do it. logits: float32 (n, C). Returns float32 (n, C).
    """
    top = logits.softmax(1).topk(k)
    values = top.values.to(dtype).float()
    rest = (1 - values.sum(1, keepdim=True)).clamp(min=_LEAST) / (logits.shape[1] - k)
    return rest.expand_as(logits).scatter(1, top.indices, values.clamp(min=_LEAST)).log()


def sampled(logits: Tensor, draws: int) -> Tensor:
    """How often each class was drawn, with replacement: random sampling KD (Anshumann et al.,
    "Sparse Logit Sampling", ACL 2025). Its mean is the teacher's row at T=1, and at no other
    temperature. Draws are torch's own. logits: float32 (n, C). Returns float32 (n, C).
    """
    drawn = logits.softmax(1).multinomial(draws, replacement=True)
    once = torch.full(drawn.shape, 1 / draws)
    return torch.zeros_like(logits).scatter_add(1, drawn, once).clamp(min=_LEAST).log()
