"""Activation recompute: activations computed a second time in the backward pass instead of being kept.

`checkpoint` drops everything between the input and the output of a function. `discard_and_recompute` drops a single
tensor that is cheap to compute again from what is kept anyway, like the output of a norm, which the next layer would
keep.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor

_T = TypeVar("_T")


def checkpoint(function: Callable[..., _T], *arguments: Any) -> _T:
    """function(*arguments), of which only the arguments are kept; the backward calls it a second time."""
    result: _T = torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def discard_and_recompute(tensor: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[None]:
    """Within this context, operations that would keep `tensor` for their backward keep `compute` instead."""
    identity = (tensor.data_ptr(), tensor.shape, tensor.stride())

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        return compute if (kept.data_ptr(), kept.shape, kept.stride()) == identity else kept

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
