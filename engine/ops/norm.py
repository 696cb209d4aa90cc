"""RMSNorm and LayerNorm over the last dimension. Statistics are always fp32; eps sits inside the square root."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension. `x` [t, h] (any leading dims), `weight` [h]."""
    x32 = x.float() if x.dtype.itemsize < 4 else x
    normalised = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normalised * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x − mean) / sqrt(variance + eps) · weight + bias, over the last dimension."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
