"""The table of parameters: every trainable tensor, described once.

A local parameter (`layers.7.attention.qkv.weight`) is one or more *logical tensors* laid one after another along
their first dimension; a logical tensor has the Hugging Face name, the global shape and the rectangle of it that this
rank holds. Initialization, gradient buckets, checkpoints, export, the memory estimate and the parameter count all
read this table, and the modules take their parameters from it, so nothing else knows how a model is cut.
Alternative considered: deriving names from modules (`state_dict`), which ties files to the layout that wrote them.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Rectangle:
    """A box of a tensor: offsets and sizes per dimension."""

    start: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.extent)


Replicas = Literal["tp", "kv", "tied_embedding"]


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor as Hugging Face names it.

    Attributes:
        name: its Hugging Face name.
        shape: of the whole tensor.
        rectangle: the part that this rank holds.
        weight_decay: whether the optimizer decays it.
        counts_in_flops: every token is multiplied by it, which is what model FLOPs count.
        mean, std: of its initial values, which are normal.
        replicas: which other ranks hold the same rectangle, each with a part of its gradient: "tp" (all
            tensor-parallel ranks), "kv" (those that share key and value heads), "tied_embedding" (the first and the
            last pipeline stage), or None.
        owned: this rank is the one among the replicas that counts it in norms and writes it into checkpoints.
    """

    name: str
    shape: tuple[int, ...]
    rectangle: Rectangle
    weight_decay: bool
    counts_in_flops: bool
    mean: float
    std: float
    replicas: Replicas | None = None
    owned: bool = True


@dataclass(frozen=True)
class LocalParameter:
    """A trainable tensor of this rank: logical tensors one after another along dim 0.

    Attributes:
        path: its name on this rank, after the layer that reads it: `layers.7.attention.qkv.weight`.
        layer: global number of the block that it belongs to; None for embedding, final norm and head.
    """

    path: str
    tensors: tuple[LogicalTensor, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.tensors[0].rectangle.extent
        return (sum(tensor.rectangle.extent[0] for tensor in self.tensors), *first[1:])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def weight_decay(self) -> bool:
        return self.tensors[0].weight_decay

    def split(self, values: torch.Tensor) -> Iterator[tuple[LogicalTensor, torch.Tensor]]:
        """Each logical tensor with its part of `values` (of this parameter's shape), a view."""
        rows = [tensor.rectangle.extent[0] for tensor in self.tensors]
        return zip(self.tensors, values.split(rows), strict=True)


@dataclass(frozen=True)
class ParameterTable:
    """All parameters of one rank, in the order of the forward pass."""

    parameters: tuple[LocalParameter, ...]

    def logical(self) -> Iterator[LogicalTensor]:
        for parameter in self.parameters:
            yield from parameter.tensors

    @property
    def num_parameters(self) -> int:
        """Of all logical tensors, wherever their parts are."""
        return sum(math.prod(tensor.shape) for tensor in self.logical())

    @property
    def num_parameters_in_flops(self) -> int:
        """Those of `num_parameters` that multiply every token."""
        return sum(math.prod(tensor.shape) for tensor in self.logical() if tensor.counts_in_flops)

    @property
    def local_size(self) -> int:
        return sum(parameter.size for parameter in self.parameters)


@torch.no_grad()
def initialize(parameter: LocalParameter, out: torch.Tensor, seed: int) -> None:
    """Write the initial values of `parameter` into `out` (its local shape, any dtype and device).

    Element i of a logical tensor is a hash of (seed, name, i), so every layout starts from the same model and a rank
    computes only what it holds. Hash: splitmix64 (Steele et al. 2014); normal values by Box–Muller in double precision.
    """
    for tensor, part in parameter.split(out):
        _fill(tensor, part, seed)


def _fill(tensor: LogicalTensor, out: torch.Tensor, seed: int) -> None:
    if tensor.std == 0.0:
        out.fill_(tensor.mean)
        return
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{tensor.name}".encode(), digest_size=8).digest(), "little")
    rows = max(1, _CHUNK // max(1, math.prod(tensor.rectangle.extent[1:])))
    for first in range(0, tensor.rectangle.extent[0], rows):
        part = out[first : first + rows]
        start = (tensor.rectangle.start[0] + first, *tensor.rectangle.start[1:])
        index = _linear_index(tensor.shape, start, tuple(part.shape), out.device)
        part.copy_(tensor.mean + tensor.std * _hashed_normal(index, key))


def _linear_index(
    shape: tuple[int, ...], start: tuple[int, ...], extent: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Row-major positions, in a tensor of `shape`, of the elements of a rectangle. int64, of shape `extent`."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, first, count in zip(shape, start, extent, strict=True):
        index = index.unsqueeze(-1) * size + torch.arange(first, first + count, device=device)
    return index


def _hashed_normal(index: torch.Tensor, key: int) -> torch.Tensor:
    """A standard normal value for each int64 index; float64."""
    x = index * _signed(_GOLDEN) + _signed(key)
    for shift, factor in _MIX:
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    x = x ^ _shift_right(x, 31)
    uniform = (_shift_right(x, 32).double() + 0.5) * 2.0**-32  # in (0, 1)
    angle = (x & 0xFFFFFFFF).double() * (2.0 * math.pi * 2.0**-32)
    return torch.sqrt(-2.0 * torch.log(uniform)) * torch.cos(angle)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64 seen as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit `value`."""
    return value - (1 << 64) if value >= 1 << 63 else value
