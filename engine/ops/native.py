"""Loading of the compiled operators `torch.ops.triaxis`, and their fake (meta) implementations.

The library is loaded once, when this module is imported. Without it, the engine runs on plain PyTorch.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent.parent / "_csrc.so"
SCHEMA_VERSION = 8  # of what Python calls in the library; `triaxis_schema_version` in csrc/bind/status.cpp
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs(x: Tensor) -> bool:
    """Whether operators use their kernels for `x`: on a GPU, of a supported dtype, and with csrc built with CUDA."""
    return x.is_cuda and x.dtype in _DTYPES and has_kernels()


def has_kernels() -> bool:
    """Whether csrc was built with CUDA."""
    return _HAS_KERNELS


def why_no_kernels() -> str:
    """Return the reason for messages, if `has_kernels` is false."""
    return WHY_NOT or "csrc was built without CUDA"


# Fake implementations: outputs with the shapes and dtypes of the operator of the same name.


def _norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    amax: Tensor | None = None,
) -> tuple[Tensor, ...]:
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, rstd.new_empty(rstd.shape if centered else 0), rstd


def _fp8_output(like: Tensor, rows: int, columns: int, scaling: str) -> tuple[Tensor, Tensor]:
    blocks = (-(-columns // 128), rows) if scaling == "block_1x128" else (0,)
    return like.new_empty(rows, columns, dtype=torch.float8_e4m3fn), like.new_empty(blocks, dtype=torch.float32)


def _norm_forward_fp8(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    scaling: str,
    *output: Any,
) -> tuple[Tensor, ...]:
    _, *statistics = _norm_forward(x, residual, weight, bias, eps, centered)
    return *_fp8_output(x, x.shape[0], x.shape[1], scaling), *statistics


def _swiglu_forward_fp8(
    gate_up: Tensor, scaling: str, scale: Tensor | None, amax: Tensor | None, transposed: bool = False
) -> tuple[Tensor, ...]:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    values, scale_inv = _fp8_output(gate_up, rows, columns, scaling)
    return values, values.new_empty((columns, rows) if transposed else 0), scale_inv


def _norm_backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    centered: bool,
    accumulate: bool = False,
    given_weight: Tensor | None = None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    columns = grad_y.shape[1] if given_weight is None else 0
    grad_weight = grad_y.new_empty(columns, dtype=torch.float32)
    return grad_y.new_empty(grad_y.shape), grad_weight, grad_weight.new_empty(columns if centered else 0)


def _rope_qk(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    tokens, heads, size = qkv.shape
    return qkv.new_empty(tokens, heads - 2 * kv_heads, size), qkv.new_empty(tokens, kv_heads, size)


def _rope_qk_backward(grad_q: Tensor, grad_k: Tensor, *rest: Any) -> Tensor:
    tokens, heads, size = grad_q.shape
    return grad_q.new_empty(tokens, heads + 2 * grad_k.shape[1], size)


def _rope_qk_backward_fp8(grad_q: Tensor, grad_k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fp8_gradient(_rope_qk_backward(grad_q, grad_k).flatten(1), *rest[-3:])


def _fp8_gradient(gradient: Tensor, scaling: str, scale: Tensor | None, amax: Tensor | None) -> tuple[Tensor, ...]:
    dtype = torch.float8_e5m2 if scaling == "tensorwise" else torch.float8_e4m3fn
    return _quantize(gradient, dtype, scaling, True, True, scale)


def _cross_entropy_statistics(logits: Tensor, labels: Tensor, first_label: int) -> tuple[Tensor, Tensor]:
    z = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return z, z.clone()


def _quantize(
    x: Tensor,
    dtype: torch.dtype,
    scaling: str,
    row_major: bool,
    transposed: bool,
    scale: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    rows, columns = x.shape
    from_amax = scaling == "tensorwise" and scale is None

    def scale_inv(requested: bool, rows: int, columns: int) -> Tensor:
        blocks = -(-columns // 128)
        if not requested or scaling == "tensorwise":
            return x.new_empty(0, dtype=torch.float32)
        shape = (blocks, rows) if scaling == "block_1x128" else (-(-rows // 128), -(-blocks // 4) * 4)
        return x.new_empty(shape, dtype=torch.float32)

    return (
        x.new_empty((rows, columns) if row_major else 0, dtype=dtype),
        x.new_empty((columns, rows) if transposed else 0, dtype=dtype),
        x.new_empty(1, dtype=torch.float32) if from_amax else scale_inv(row_major, rows, columns),
        scale_inv(transposed, columns, rows),
    )


def _transpose_fp8(values: Tensor, scale_inv: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    rows, columns = values.shape
    blocks = (0,) if scaling == "tensorwise" else (-(-rows // 128), columns)
    return values.new_empty(columns, rows), values.new_empty(blocks, dtype=torch.float32)


_FAKES: dict[str, Callable[..., Any]] = {
    "norm_forward": _norm_forward,
    "norm_forward_fp8": _norm_forward_fp8,
    "norm_backward": _norm_backward,
    "swiglu_forward": lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    "swiglu_forward_amax": lambda gate_up, amax: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    "swiglu_forward_fp8": _swiglu_forward_fp8,
    "swiglu_backward": lambda grad_out, gate_up: gate_up.new_empty(gate_up.shape),
    "swiglu_backward_amax": lambda grad_out, gate_up, amax: gate_up.new_empty(gate_up.shape),
    "swiglu_backward_fp8": lambda grad_out, gate_up, *output: _fp8_gradient(gate_up, *output),
    "rope": lambda x, cos, sin, back: x.new_empty(x.shape),
    "rope_qk": _rope_qk,
    "rope_qk_backward": _rope_qk_backward,
    "rope_qk_backward_amax": _rope_qk_backward,
    "rope_qk_backward_fp8": _rope_qk_backward_fp8,
    "cross_entropy_statistics": _cross_entropy_statistics,
    "cross_entropy_gradient_": lambda *args: None,
    "embedding_backward_": lambda *args: None,
    "adamw_": lambda *args: None,
    "square_sum": lambda pieces: pieces[0].new_empty(()),
    "amax_": lambda *args: None,
    "quantize": _quantize,
    "transpose_fp8": _transpose_fp8,
    "fp8_matmul": lambda a, b, *rest: a.new_empty(a.shape[0], b.shape[0], dtype=rest[-2]),
    "fp8_matmul_add_": lambda *args: None,
    "fp8_matmul_sm90": lambda a, b, *rest: a.new_empty(a.shape[0], b.shape[0], dtype=rest[-1]),
    "fp8_matmul_sm90_add_": lambda *args: None,
}


def _load() -> str:
    """Load the library; return why it cannot be used, or an empty string."""
    if not LIBRARY.exists():
        return "csrc was not built"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:  # built for another machine, or for another torch
        return f"{LIBRARY} cannot be loaded: {error}"
    library = ctypes.CDLL(str(LIBRARY))
    found = library.triaxis_schema_version() if hasattr(library, "triaxis_schema_version") else 1
    if found != SCHEMA_VERSION:
        return (
            f"{LIBRARY} belongs to another version of this package (operator schemas {found}, expected "
            f"{SCHEMA_VERSION}); reinstall the package"
        )
    return ""


WHY_NOT = _load()
# at import, because torch.compile cannot trace the query
_HAS_KERNELS = not WHY_NOT and torch._C._dispatch_has_kernel_for_dispatch_key("triaxis::norm_forward", "CUDA")
if not WHY_NOT:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"triaxis::{_name}", _fake)
