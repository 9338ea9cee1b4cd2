"""What a row that the teacher has wrong should say instead.

Formulas: "Can Students Beyond The Teacher?", Zhang et al., AAAI 2025, as released. With p the row,
l the label, k the predicted class and S = p_l + p_k:

    pairwise   p_l' = S (p_l + 1) / (S + 1),  p_k' = S p_k / (S + 1)      label above k, sum kept
    swap       p_l' = p_k, p_k' = p_l                                     Wen et al., 1911.07471
    blend      p' = (p + onehot(l)) / 2

Spaces: `probability-T` rectifies softmax(z / T), the target that a loss at T sees; `probability-1`
rectifies softmax(z) and may be softened to any temperature afterwards; `logit` applies `pairwise`
to raw logits, as the released training scripts do: the label then often stays below the wrong
class, and the result depends on the logits' common offset.
"""

import torch
from torch import Tensor

from stages.settings import Method, Space


def rectify_rows(
    probabilities: Tensor, labels: Tensor, method: Method, predictions: Tensor | None = None
) -> Tensor:
    """Rectify rows of probabilities; rows whose prediction is the label stay as they are.

    Parameters
    ----------
    probabilities : Tensor
        float (n, C); each row sums to 1.
    labels : Tensor
        int64 (n,).
    method : {"pairwise", "swap", "blend"}
        See the formulas of this module.
    predictions : Tensor, optional
        int64 (n,); the rows' own argmax if None.

    Returns
    -------
    Tensor
        (n, C) of the same dtype; each row sums to 1.
    """
    label = labels.unsqueeze(1)
    predicted = (
        probabilities.argmax(1, keepdim=True) if predictions is None else predictions[:, None]
    )
    p_label, p_predicted = probabilities.gather(1, label), probabilities.gather(1, predicted)
    new_label, new_predicted = _replaced(p_label, p_predicted, method)
    rectified = probabilities.scatter(1, label, new_label).scatter(1, predicted, new_predicted)
    if method == "blend":
        rectified = rectified / 2
    return torch.where(label == predicted, probabilities, rectified)


def replaced_logits(
    logits: Tensor,
    labels: Tensor,
    predictions: Tensor,
    method: Method,
    space: Space,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The two logits of wrong rows that rectification replaces: float32 (n,) each.

    logits: float32 (n, C) of rows whose prediction is not the label. temperature: T of the space
    `probability-T`. Put in their places, the two make softmax(row / T) the rectified distribution;
    for a temperature-free one at any T.
    """
    z_label = logits.gather(1, labels[:, None]).squeeze(1).double()
    z_predicted = logits.gather(1, predictions[:, None]).squeeze(1).double()
    if method == "swap":
        return z_predicted.float(), z_label.float()
    if space == "logit":
        new_label, new_predicted = _replaced(z_label, z_predicted, method)
        return new_label.float(), new_predicted.float()
    softened = temperature if space == "probability-T" else 1.0
    # p = exp(z/T - offset): the offset turns probabilities back into logits of the same row. The
    # maximum comes off before the division, which would cost a row far from 0 its last digits.
    largest = logits.amax(1, keepdim=True)
    offset = torch.logsumexp((logits - largest) / softened, dim=1).double()
    offset = offset + largest.squeeze(1).double() / softened
    p_label = (z_label / softened - offset).exp()
    p_predicted = (z_predicted / softened - offset).exp()
    new_label, new_predicted = _replaced(p_label, p_predicted, method)
    return (
        ((new_label.log() + offset) * softened).float(),
        ((new_predicted.log() + offset) * softened).float(),
    )


def _replaced(label: Tensor, predicted: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """The new entries of label and predicted class; for `blend` up to the factor 1/2 of the row."""
    if method == "swap":
        return predicted, label
    if method == "blend":
        return label + 1, predicted
    pair = label + predicted
    # On raw logits the pair's sum may be -1; probabilities are never near it.
    below = torch.where((pair + 1).abs() < 1e-7, torch.full_like(pair, 1e-7), pair + 1)
    return pair * (label + 1) / below, pair * predicted / below
