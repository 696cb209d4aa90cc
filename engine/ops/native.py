"""The compiled operators, `torch.ops.triaxis`: whether they are there, and what shapes they return.

Loaded once, when this module is imported; a package without them takes its plain PyTorch paths.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent.parent / "_csrc.so"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs(x: Tensor) -> bool:
    """The rule of every operator with a kernel: `x` is on a GPU, of a dtype of the kernels, and csrc has CUDA."""
    return x.is_cuda and x.dtype in _DTYPES and has_kernels()


def has_kernels() -> bool:
    """Whether csrc was built with CUDA."""
    return _HAS_KERNELS


def why_no_kernels() -> str:
    """In words, where `has_kernels` says no."""
    return WHY_NOT or "csrc was built without CUDA"


def _norm_forward(x, residual, weight, bias, eps, centered):  # type: ignore[no-untyped-def]
    rows = x.shape[0]
    statistics = x.new_empty(rows, dtype=torch.float32)
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, statistics if centered else statistics.new_empty(0), statistics.clone()


def _fp8(like, rows, columns, scaling):  # type: ignore[no-untyped-def]
    blocks = (-(-columns // 128), rows) if scaling == "block_1x128" else (0,)
    return like.new_empty(rows, columns, dtype=torch.float8_e4m3fn), like.new_empty(blocks, dtype=torch.float32)


def _norm_forward_fp8(x, residual, weight, bias, eps, centered, scaling, *rest):  # type: ignore[no-untyped-def]
    _, *beside = _norm_forward(x, residual, weight, bias, eps, centered)
    return *_fp8(x, x.shape[0], x.shape[1], scaling), *beside


def _norm_backward(grad_y, grad_sum, x, weight, mean, rstd, centered):  # type: ignore[no-untyped-def]
    columns = grad_y.shape[1]
    floats = grad_y.new_empty(columns, dtype=torch.float32)
    return grad_y.new_empty(grad_y.shape), floats, floats.new_empty(columns if centered else 0)


def _rope_qk(qkv, cos, sin, kv_heads):  # type: ignore[no-untyped-def]
    tokens, heads, size = qkv.shape
    return qkv.new_empty(tokens, heads - 2 * kv_heads, size), qkv.new_empty(tokens, kv_heads, size)


def _rope_qk_backward(grad_q, grad_k, grad_v, cos, sin):  # type: ignore[no-untyped-def]
    tokens, heads, size = grad_q.shape
    return grad_q.new_empty(tokens, heads + 2 * grad_k.shape[1], size)


def _statistics(logits, labels, first_label):  # type: ignore[no-untyped-def]
    z = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return z, z.clone()


def _quantize(x, dtype, scaling, row_major, transposed, scale, amax, power_of_two):  # type: ignore[no-untyped-def]
    rows, columns = x.shape

    def scales(wanted: bool, outer: int, inner: int) -> Tensor:
        blocks = -(-inner // 128)
        if not wanted or scaling == "tensorwise":
            return x.new_empty(0, dtype=torch.float32)
        shape = (blocks, outer) if scaling == "block_1x128" else (-(-outer // 128), -(-blocks // 4) * 4)
        return x.new_empty(shape, dtype=torch.float32)

    return (
        x.new_empty((rows, columns) if row_major else 0, dtype=dtype),
        x.new_empty((columns, rows) if transposed else 0, dtype=dtype),
        scales(row_major, rows, columns),
        scales(transposed, columns, rows),
    )


_SHAPES: dict[str, Callable[..., Any]] = {
    "norm_forward": _norm_forward,
    "norm_forward_fp8": _norm_forward_fp8,
    "norm_backward": _norm_backward,
    "swiglu_forward": lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    "swiglu_forward_fp8": lambda x, scaling, *rest: _fp8(x, x.shape[0], x.shape[1] // 2, scaling),
    "swiglu_backward": lambda grad_out, gate_up: gate_up.new_empty(gate_up.shape),
    "rope": lambda x, cos, sin, back: x.new_empty(x.shape),
    "rope_qk": _rope_qk,
    "rope_qk_backward": _rope_qk_backward,
    "cross_entropy_statistics": _statistics,
    "cross_entropy_gradient_": lambda *args: None,
    "adamw_": lambda *args: None,
    "square_sum": lambda x: x.new_empty(()),
    "quantize": _quantize,
    "fp8_matmul": lambda a, b, *rest: a.new_empty(a.shape[0], b.shape[0], dtype=rest[-2]),
    "fp8_matmul_add_": lambda *args: None,
    "fp8_matmul_sm90": lambda a, b, *rest: a.new_empty(a.shape[0], b.shape[0], dtype=rest[-1]),
    "fp8_matmul_sm90_add_": lambda *args: None,
}


def _load() -> str:
    """Empty, or why there are no compiled operators."""
    if not LIBRARY.exists():
        return "csrc was not built"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:  # built for another machine, or for another torch
        return f"{LIBRARY} cannot be loaded: {error}"
    known = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "triaxis::" in name}
    if missing := _SHAPES.keys() - known:
        return f"{LIBRARY} is of another version of this package (without {min(missing)}); install the package again"
    return ""


WHY_NOT = _load()
# asked once: the compiler could not see through the question
_HAS_KERNELS = not WHY_NOT and torch._C._dispatch_has_kernel_for_dispatch_key("triaxis::norm_forward", "CUDA")
if not WHY_NOT:
    for _name, _shapes in _SHAPES.items():
        torch.library.register_fake(f"triaxis::{_name}", _shapes)
