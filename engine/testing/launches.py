"""Kernel launches of a training step, counted without a GPU.

The engine's own step runs on the meta device, whose tensors have shapes but no memory, while Python is told that they
are on a GPU: the engine takes the paths that it takes there. A dispatch mode sees every operator and looks up how many
kernels, fills and copies it launches. An operator that is not in the table is an error, so that none is missed.
Alternative considered: fake tensors (autograd asks for a guard of their device, which PyTorch for CPUs does not have).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.schema import Config
from engine.errors import TriaxisError
from engine.ops import native
from engine.parallel.layout import Layout, World
from engine.testing.runs import random_batches
from engine.testing.tape import caller
from engine.train.inputs import model_dtype
from engine.train.step import build_model, train_step

_GPU = torch.device("cuda", 0)
_META = torch.device("meta")
_MIN_SPLIT = 2**17  # elements from which PyTorch splits a reduction to one number over blocks
_MATMUL = 2  # the kernel, and a fill of the counter that gives its persistent blocks their tiles

Launches = Counter[tuple[str, str]]
"""Launches by operator and by the place in the engine that called it; autograd's own are called by `backward`."""


def step_launches(config: Config) -> Launches:
    """Count what a training step of `config` launches on one GPU: kernels, fills, and copies.

    It is the second step that counts: in the first one, "delayed" has no amax history.

    Raises:
        TriaxisError: csrc is not built, or an operator is not in the table.
    """
    if native.WHY_NOT:
        raise TriaxisError(f"launches are counted with the operators of csrc: {native.WHY_NOT}")
    with presented_as_gpu(), LaunchCounter() as counter:
        world = World(Layout(), rank=0, local_rank=0, local_size=1, device=_GPU)
        model, optimizer = build_model(config, world, model_dtype(config.precision.mode, "cuda"), seed=None)
        batches = random_batches(config)
        tokens = config.batch.global_ * config.data.seq_length
        for step in (1, 2):
            counter.launches.clear()
            train_step(model, optimizer, batches, step=step, lr=1e-3, tokens=tokens)
    return counter.launches


def launches_of(name: str, result: Any, arguments: tuple[Any, ...]) -> int:
    """Look up the launches of one call of the operator `name`, e.g. "aten::add".

    Raises:
        TriaxisError: the operator is not in the table.
    """
    if isinstance(result, Tensor) and result.numel() == 0:
        return 0
    if _ONE.fullmatch(name):
        return 1
    if name not in _LAUNCHES:
        raise TriaxisError(f"{name}: unknown number of launches; add the operator to the table in {__name__}")
    count = _LAUNCHES[name]
    return count if isinstance(count, int) else count(result, *arguments)


class LaunchCounter(TorchDispatchMode):
    """Counts the launches of operators on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Launches = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping the compiler out would cost more than all operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _in_operator():
            result = _SHAPES.get(func, func)(*args, **(kwargs or {}))
        name = func._schema.name
        launches_none = func.is_view or "empty" in name or name in _NONE
        if not launches_none and (_on_meta(result) or _on_meta(args)):
            self.launches[name, caller()] += launches_of(name, result, args)
        return result


@contextmanager
def presented_as_gpu() -> Iterator[None]:
    """In this context Python sees meta tensors as tensors on a GPU, and creates those for a GPU on the meta device."""
    real: Any = torch._C.TensorBase

    def device(x: Tensor) -> torch.device:
        found: torch.device = real.device.__get__(x)
        return _GPU if found.type == "meta" and not _InOperator.depth else found

    def address(x: Tensor) -> int:
        """Different for each storage, and as aligned as memory of a GPU is."""
        return (x.untyped_storage()._cdata << 8) + int(x.storage_offset()) * x.element_size()

    with ExitStack() as stack:
        put = lambda where, name, value: stack.enter_context(mock.patch.object(where, name, value))  # noqa: E731
        put(Tensor, "device", property(device))
        put(Tensor, "is_cuda", property(lambda x: device(x).type == "cuda"))
        put(Tensor, "data_ptr", address)
        put(native, "_HAS_KERNELS", True)
        stack.enter_context(_OnMeta())
        yield


class _OnMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _cudnn_attention(*args, **(kwargs or {}))
        named = {name: _moved(value) for name, value in (kwargs or {}).items()}
        return func(*(_moved(value) for value in args), **named)


def _moved(value: Any) -> Any:
    return _META if isinstance(value, torch.device) and value.type == "cuda" else value


def _cudnn_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """The attention that GPUs take; it knows grouped heads."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attend(q, k, v, mask, torch.is_grad_enabled(), 0.0, is_causal, scale=scale)[0]


class _InOperator:
    """Whether the meta kernel of an operator runs, which has to see the device that tensors have."""

    depth = 0


@contextmanager
def _in_operator() -> Iterator[None]:
    _InOperator.depth += 1
    try:
        yield
    finally:
        _InOperator.depth -= 1


def _on_meta(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_on_meta(item) for item in value)
    return isinstance(value, Tensor) and value.is_meta


_aten = torch.ops.aten
# operator -> its result, where the meta device has no kernel for it or gives it another layout than cuDNN does
_SHAPES: dict[Any, Callable[..., Any]] = {
    _aten.addmm.dtype_out: lambda *args, out, **factors: out,
    _aten._scaled_dot_product_cudnn_attention.default: lambda q, *args: (
        torch.empty_like(q),
        *_aten._scaled_dot_product_cudnn_attention(q, *args)[1:],
    ),
    _aten._scaled_dot_product_cudnn_attention_backward.default: lambda grad, *qkv_and_more, **scale: tuple(
        torch.empty_like(x) for x in qkv_and_more[:3]
    ),
}

# operators that launch nothing, besides views and allocations
_NONE = frozenset(("aten::_unsafe_view", "aten::detach", "aten::alias", "aten::lift_fresh"))

_ONE = re.compile(
    "aten::(abs|add_?|arange|bitwise_(and|not)|clamp|clone|copy_|cos|div|embedding|eq|exp|fill_|full(_like)?|ge|"
    "gelu(_backward)?|gt|index_select|isfinite|lt|masked_fill|maximum|mul_?|ne|neg|new_(full|ones|zeros)|ones(_like)?|"
    "pow|reciprocal|rsub|scalar_tensor|sin|sqrt|square|sub|_to_copy|where|zero_|zeros(_like)?)"
)


def _reduction(result: Tensor, x: Tensor, *_: Any) -> int:
    """A kernel, and a fill of its semaphores where blocks share a result."""
    return 1 + (result.numel() == 1 and x.numel() >= _MIN_SPLIT)


def _cat(result: Tensor, tensors: list[Tensor], *_: Any) -> int:
    return -(-len(tensors) // 128)  # as many as fit into the arguments of a kernel


def _quantize(result: tuple[Tensor, ...], x: Tensor, dtype: torch.dtype, scaling: str, *_: Any) -> int:
    """A kernel, and zeros for the padding of each `scale_inv` of 128 × 128 blocks."""
    return 1 + (sum(scale_inv.numel() > 0 for scale_inv in result[2:]) if scaling == "block_128x128" else 0)


# operator -> launches, or a function of its result and arguments
_LAUNCHES: dict[str, int | Callable[..., int]] = {
    "aten::mm": _MATMUL,
    "aten::addmm": _MATMUL,
    "aten::_scaled_mm": _MATMUL,
    "aten::sum": _reduction,
    "aten::amax": _reduction,
    "aten::cat": _cat,
    "aten::stack": _cat,
    "aten::embedding_dense_backward": 29,  # zeros, 8 passes of a sort, 10 fills, 8 to find equal tokens, 2 sums
    "aten::_scaled_dot_product_cudnn_attention": 1,
    "aten::_scaled_dot_product_cudnn_attention_backward": 5,  # 3 kernels, 2 fills
    "triaxis::norm_forward": 1,
    "triaxis::norm_forward_fp8": 1,
    "triaxis::norm_backward": 2,  # the parameters' gradients are added up by a second one
    "triaxis::swiglu_forward": 1,
    "triaxis::swiglu_forward_amax": 1,
    "triaxis::swiglu_forward_fp8": 1,
    "triaxis::swiglu_backward": 1,
    "triaxis::swiglu_backward_amax": 1,
    "triaxis::swiglu_backward_fp8": 1,
    "triaxis::rope": 1,
    "triaxis::rope_qk": 1,
    "triaxis::rope_qk_backward": 1,
    "triaxis::rope_qk_backward_amax": 1,
    "triaxis::rope_qk_backward_fp8": 1,
    "triaxis::cross_entropy_statistics": 1,
    "triaxis::cross_entropy_gradient_": 1,
    "triaxis::embedding_backward_": 1,
    "triaxis::adamw_": 1,
    "triaxis::square_sum": 2,  # of up to 240 pieces; the numbers of its blocks are added up by a second one
    "triaxis::amax_": 1,
    "triaxis::quantize": _quantize,
    "triaxis::transpose_fp8": 1,
    "triaxis::fp8_matmul": _MATMUL,
    "triaxis::fp8_matmul_add_": _MATMUL,
}
