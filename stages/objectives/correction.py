"""The orthogonal loss correction: what a loss would be with a better teacher, to first order.

"Knowledge Distillation as Semiparametric Inference", Dao, Kamath, Syrgkanis, Mackey, ICLR 2021,
arXiv 2104.09732. A student's loss L(p) depends on the teacher's estimate p of the class
probabilities. The correction moves it along its derivative by the residual of the label,

    L(p) + gamma <dL/dp, onehot(y) - p>,        p = softmax(z_t),

so that an error of p enters the expected loss only in second order. With p written as logits the
direction is

    a_c = 1[c = y] / max(p_c, alpha) - 1        as <dL/dp, onehot(y) - p> = <dL/dz_t, a>

and alpha bounds it where the teacher gives the label next to nothing. This needs the derivative of
a loss in the teacher's logits and nothing else: it holds for every loss, no target with negative
entries is formed, and no logarithm of one is taken. Of KD at temperature T it is, with
w = softmax(z_t / T),

    T^2 sum_c (w_c + w_c (a_c - <w, a>) gamma / T) (log w_c - log softmax(z_s / T)_c)

which has the gradient of the authors' `KDOrthoLoss` (their `eps` is alpha, default .01); in value
it also has the derivative of the teacher's own entropy, where no student is.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.objectives.losses.rows import TeacherRows, changed, known, one_hot

BOUND, STRENGTH = 0.1, 1.0
"""alpha and gamma where nothing is said."""


def direction(rows: Tensor, labels: Tensor, alpha: float = BOUND) -> Tensor:
    """Along which a teacher's logits move: float32 (B, C).

    rows: float (B, C), the teacher's logits at temperature 1. labels: int64 (B,).
    """
    log_p = F.log_softmax(rows.float(), dim=1).gather(1, labels[:, None])
    pull = 1 / log_p.exp().clamp(min=alpha)  # (B, 1)
    return pull * one_hot(labels, rows.shape[1]) - 1


def corrected(
    loss: Callable[[TeacherRows], Tensor],
    teacher: TeacherRows,
    labels: Tensor,
    alpha: float = BOUND,
    gamma: float = STRENGTH,
) -> Tensor:
    """A loss with the correction of this module, in the shape that it has without.

    loss: of the teacher's rows; (B,), or () where it couples rows. teacher: float (B, C), or rows
    that depend on the temperature, known at 1: where part of them is known, the label's logit is,
    and all others move alike, so that the correction is exact in what is kept. labels: int64 (B,).
    """
    moves = direction(known(teacher, 1.0), labels, alpha)
    with torch.enable_grad():
        far = moves.new_zeros(len(moves), 1).requires_grad_()  # how far each row has moved
        value = loss(changed(teacher, lambda rows: torch.addcmul(rows, far, moves)))
        (effect,) = torch.autograd.grad(value.sum(), far, create_graph=True)
    return value + gamma * (effect.squeeze(1) if value.dim() else effect.sum())
