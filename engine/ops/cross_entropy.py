"""Output projection and cross-entropy in one: the [t, v] logits are never held."""

import torch
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over unmasked tokens of −log softmax(hidden · weightᵀ)[label], in fp32.

    `hidden` [t, h], `weight` [v, h], `labels` int64 [t] (anything below 0 is allowed where masked),
    `loss_mask` fp32 [t], 0 where the token does not count.
    """
    logits = (hidden @ weight.T).float()
    labels = labels.clamp(min=0)
    losses = torch.logsumexp(logits, -1) - logits.gather(1, labels[:, None])[:, 0]
    return (losses * loss_mask).sum()
