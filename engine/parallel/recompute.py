"""Activations that are computed again in the backward pass instead of being kept.

`again` forgets everything between the input and the output of a function. `forgotten` forgets a single tensor that is
cheap to make again from what is kept anyway, like the output of a norm, which the layers behind it would keep.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def again(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments), of which only the arguments are kept; the backward calls it a second time."""
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def forgotten(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
    """Within this context, operations that would keep `tensor` for their backward keep `make` instead."""
    identity = (tensor.data_ptr(), tensor.shape, tensor.stride())

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        return make if (kept.data_ptr(), kept.shape, kept.stride()) == identity else kept

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
