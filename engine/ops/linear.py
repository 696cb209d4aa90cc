"""Matrix products with a weight: y = x·Wᵀ + b."""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [t, in] times `weight` [out, in] transposed, plus `bias` [out]: [t, out]."""
    return F.linear(x, weight, bias)
