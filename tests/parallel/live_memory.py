"""Counts tensors that are alive: not what ought to be kept, but what is.

Storages are followed by weak references. `LiveMemory` sees every operation, and with it what custom functions keep in
their own ways and what is recomputed; `saved_tensors_hooks`, of which only the innermost is called, tell `LiveCalls`
which call of a function has kept what.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
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


def settled(memory: LiveMemory) -> int:
    """Bytes alive once gloo's threads have let go of what they were the last to hold."""
    if dist.is_initialized():
        dist.barrier()
    readings = []
    for _ in range(10):
        readings.append(memory.bytes())
        time.sleep(0.01)
    return min(readings)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class LiveCalls:
    """Follows what each call of some functions keeps for its backward.

    Attributes:
        most: calls so far of which something was alive at once.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        """
        Args:
            others: tensors that are there anyway, such as parameters and inputs.
        """
        self.others = {tensor.untyped_storage().data_ptr() for tensor in others}
        self.calls: list[list[StorageWeakRef]] = []
        self.most = 0

    def follow(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            kept: list[StorageWeakRef] = []

            def pack(tensor: Tensor) -> Tensor:
                if tensor.untyped_storage().data_ptr() not in self.others:
                    kept.append(StorageWeakRef(tensor.untyped_storage()))
                return tensor.detach()

            with saved_tensors_hooks(pack, lambda tensor: tensor):
                out = function(*arguments)
            assert kept
            self.calls.append(kept)
            self.most = max(self.most, self.alive())
            return out

        return run

    def alive(self) -> int:
        return sum(any(not storage.expired() for storage in kept) for kept in self.calls)
