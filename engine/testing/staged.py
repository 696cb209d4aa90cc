"""A process group for tests that sends every tensor through the host, for ranks that share a GPU.

A call copies its input to the host, gloo moves or sums the copy, and `wait` copies the result back. NCCL takes part in
nothing, so that any number of ranks runs real kernels on real values on one card. Tensors of the CPU are copied as
well: tests without a GPU run the same code, and a result that nobody waits for never arrives. Not shown by it: streams,
overlap, and the order in which NCCL's kernels wait for each other. Alternative considered: gloo's own support of CUDA
tensors, which has neither sends nor receives nor single-tensor gathers.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STAGED = "staged"
"""The name of the backend."""


def register_staged() -> None:
    """Make the backend "staged" known to this process; safe to call again."""
    if STAGED not in dist.Backend.backend_list:
        dist.Backend.register_backend(STAGED, StagedGroup, devices=["cpu", "cuda"])


class StagedGroup(dist.ProcessGroup):
    """The calls that the engine makes to a backend other than gloo; any other call is an error of PyTorch.

    Of the signatures of a call it has the one that `torch.distributed` uses; mypy asks for all of them.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    def getBackendName(self) -> str:  # noqa: N802 - PyTorch's name
        return STAGED

    def allreduce(self, tensors: Sequence[Tensor], options: Any) -> dist.Work:  # type: ignore[override]
        (tensor,) = tensors
        host = _on_host(tensor)
        return StagedWork(self._reduce(host, options), tensor, host)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        sent, received = _on_host(input), torch.empty(output.shape, dtype=output.dtype)
        parts = _bytes(received).chunk(self.size())
        return StagedWork(self._gloo.allgather([list(parts)], [_bytes(sent)]), output, received)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        host = _on_host(input)
        return StagedWork(self._reduce(host, opts), output, host.chunk(self.size())[self.rank()])

    def send(self, tensors: Sequence[Tensor], target: int, tag: int) -> dist.Work:
        host = _on_host(tensors[0])
        return StagedWork(self._gloo.send([_bytes(host)], target, tag), None, host)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> dist.Work:
        (tensor,) = tensors
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        return StagedWork(self._gloo.recv([_bytes(host)], source, tag), tensor, host)

    def barrier(self, opts: Any) -> dist.Work:  # type: ignore[override]
        return self._gloo.barrier()

    def _reduce(self, host: Tensor, options: Any) -> dist.Work:
        reduction = dist.AllreduceOptions()
        reduction.reduceOp = options.reduceOp
        return self._gloo.allreduce([host], reduction)

    # The names of torch 2.11 and 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]


class StagedWork(dist.Work):
    """A call in progress on the host's copies; `wait` also brings the result to its tensor, once."""

    def __init__(self, work: dist.Work, tensor: Tensor | None, host: Tensor) -> None:
        super().__init__()
        self._work, self._tensor, self._host = work, tensor, host
        self._waited = False

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if not self._waited:  # gloo would wait for another message
            self._work.wait()
            if self._tensor is not None:
                with torch.no_grad():
                    self._tensor.copy_(self._host)
            self._waited = True
        return True

    def is_completed(self) -> bool:
        return self._waited or self._work.is_completed()


def _on_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the host, complete when this returns."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _bytes(host: Tensor) -> Tensor:
    """View the memory of a contiguous tensor as bytes, so that gloo moves any dtype."""
    return host.view(-1).view(torch.uint8)
