"""SwiGLU: silu(gate) · up (Shazeer, arXiv 2002.05202), gate and up side by side in one tensor."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """`gate_up` [t, 2f], gate first: [t, f]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
