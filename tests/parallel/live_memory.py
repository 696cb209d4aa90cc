"""Counts the memory of tensors that are alive: not what ought to be kept, but what is.

Every storage that an operation makes is followed by a weak reference. Rejected: `saved_tensors_hooks`, of which only
the innermost is called, and which see nothing that a custom function keeps otherwise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within, tensors that are made are followed; those that were there before do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.before: dict[int, StorageWeakRef] = {}  # a weak reference keeps an address from being used again
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.made:
                self.before[storage._cdata] = StorageWeakRef(storage)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self.before and storage._cdata not in self.made:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        """Of all storages made so far that are still alive."""
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        return sum(size for _, size in self.made.values())


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
