"""From upstream gradients of the statistics to the seven scalars that a row's gradient is made of.

Every loss of the statistics has a gradient of one form (docs/mathematics.md):

    dloss/dz_j = p_j (prob + prob_log_prob log p_j + prob_square p_j)
               + b_j (target + target_prob p_j) + logit z_j + constant

which is why the kernels know no loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .statistics import SUMMARY, StatGrads


class RowCoefficients(NamedTuple):
    """The seven scalars, [rows] each, in the order of `Coefficients` in csrc/row_math.h."""

    prob: Tensor  #: a
    prob_log_prob: Tensor  #: e
    prob_square: Tensor  #: q
    target: Tensor  #: t
    target_prob: Tensor  #: r
    logit: Tensor  #: rho
    constant: Tensor  #: s


def row_coefficients(summary: Tensor, grads: StatGrads, vocab_size: int) -> Tensor:
    """Coefficients [7, rows] from a summary [SUMMARY, rows] and the upstream gradients of its statistics."""
    s = dict(zip(SUMMARY, summary))
    zero = torch.zeros_like(s["max"])
    prob, prob_log_prob, prob_square, target, target_prob, logit, constant = (zero,) * 7
    if grads.lse is not None:
        prob = prob + grads.lse
    if grads.entropy is not None:
        prob = prob - grads.entropy * s["entropy"]
        prob_log_prob = -grads.entropy
    if grads.collision is not None:
        prob = prob - 2 * grads.collision * s["collision"]
        prob_square = 2 * grads.collision
    if grads.target_prob is not None:
        prob = prob - grads.target_prob * s["target_prob"]
        target_prob = grads.target_prob
    if grads.target_logit is not None:
        target = target + grads.target_logit
    if grads.target_log_prob is not None:
        prob = prob - grads.target_log_prob * s["target_mass"]
        target = target + grads.target_log_prob
    if grads.mean_log_prob is not None:
        prob = prob - grads.mean_log_prob
        constant = constant + grads.mean_log_prob / vocab_size
    if grads.logit_sum is not None:
        constant = constant + grads.logit_sum
    if grads.logit_square_sum is not None:
        logit = 2 * grads.logit_square_sum
    return torch.stack(
        RowCoefficients(prob, prob_log_prob, prob_square, target, target_prob, logit, constant)
    )
