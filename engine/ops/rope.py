"""Rotary positions in the half-rotation convention of Hugging Face Llama: element i pairs with i + d/2.

Source: Su et al., RoFormer (arXiv 2104.09864); the Llama-3 frequency scaling as published with Llama 3.1.
"""

import math

import torch
from torch import Tensor

from engine.config import RopeScaling


def rope_tables(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at `positions` [t]: two fp32 tensors [t, head_dim/2]."""
    angles = positions.float()[:, None] * _frequencies(head_dim, theta, scaling, positions.device)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [t, n, d] by the angles of `cos`, `sin` [t, d/2] (fp32); computed in fp32, returned in x's dtype."""
    first, second = x.float().chunk(2, -1) if x.dtype.itemsize < 4 else x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    # Wavelengths up to original/high keep their frequency, those above original/low are slowed down by
    # `factor`, and between the two the change is gradual.
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)
