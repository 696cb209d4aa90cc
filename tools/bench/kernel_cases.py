"""Benchmark cases for the rows of kernel_table.py: our kernel, the reference that checks it, and the alternatives.

Every case allocates several sets of buffers, as a single set that fits into the L2 cache would measure the L2 cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.adamw import adamw_step_reference
from engine.ops.choice import installed
from engine.ops.fp8 import dequantize, transpose_reference
from engine.ops.norm import layer_norm, rms_norm
from engine.ops.quantize import QuantizedTensor, Scaling, amax_reference, quantize, quantize_reference
from engine.ops.rope import apply_rope_reference, rope_tables
from engine.ops.swiglu import swiglu_reference
from tools.bench.kernel_table import ADAMW_STATE_BYTES, FFN, HEADS, HIDDEN, PARAMETERS, TOKENS, VOCABULARY, Row

DEVICE = "cuda"
EPS, SETS = 1e-5, 4
PIECE = 2**28  # elements per tensor of the tensor lists that PyTorch takes
BF16, ROUNDING = torch.bfloat16, 4e-3  # tolerance (relative L2 error) of results rounded to bf16
_SETTINGS = (1e-4, 0.9, 0.95, 1e-8, 0.1)

Call = Callable[[], Any]
Maker = Callable[..., Call]
"""Makes the timed call from the tensors of a buffer set."""


@dataclass
class Case:
    """Benchmark of a row. `calls` and each of `others` have one call per buffer set.

    Attributes:
        check: raises if the result is wrong.
        others: alternatives by name, created when they are measured.
        refresh: restores, outside of the timing, the buffers that the calls overwrite.
        share: fraction of the row's work per call, if the whole does not fit into this GPU's memory.
    """

    calls: list[Call]
    check: Call
    others: dict[str, Callable[[], list[Call]]] = field(default_factory=dict)
    refresh: Call | None = None
    share: float = 1.0


def _random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def _case(
    ours: Maker,
    plain: Callable[..., Any],
    buffers: Callable[[], tuple[Tensor, ...]],
    *,
    gradients: int = 0,
    others: dict[str, Callable[..., Any] | None] | None = None,
    meaning: Callable[[Any], Any] = lambda results: results,
) -> Case:
    """Create a case from the PyTorch function `plain`: in fp32 the reference; eager and compiled, alternatives.
    If `gradients` > 0, the first tensors of a set are gradients of the results, and the gradients of the other tensors
    are computed. `meaning` maps results to the tensors that are compared with the reference.
    """
    made = [buffers() for _ in range(SETS)]
    wrap = partial(_differentiated, gradients) if gradients else _called
    functions = {"torch": plain, "torch.compile": torch.compile(plain, dynamic=False), **(others or {})}

    def check() -> None:
        wide = [x.float() if x.is_floating_point() else x for x in made[0]]
        require_close(meaning(ours(*made[0])()), meaning(wrap(plain)(*wide)()), ROUNDING)

    return Case(
        [ours(*tensors) for tensors in made],
        check,
        {
            name: lambda function=function: [wrap(function)(*tensors) for tensors in made]  # type: ignore[misc]
            for name, function in functions.items()
            if function is not None
        },
    )


def _called(function: Callable[..., Any]) -> Maker:
    return lambda *tensors: partial(function, *tensors)


def _differentiated(count: int, function: Callable[..., Any]) -> Maker:
    def maker(*tensors: Tensor) -> Call:
        leaves = [x.detach().requires_grad_() for x in tensors[count:]]
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        return lambda: torch.autograd.grad(results, leaves, tensors[:count], retain_graph=True)

    return maker


def require_close(got: Any, expected: Any, limit: float) -> None:
    """Compare tensors.

    Raises:
        ValueError: a tensor of `got` differs from the one in `expected` by more than `limit`, in relative L2.
    """
    for number, (a, b) in enumerate(zip(_tensors(got), _tensors(expected), strict=False)):
        error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if a.shape != b.shape or not error <= limit:  # what is not a number is wrong
            raise ValueError(f"wrong: result {number} is off by {error:.1e} of its norm, more than {limit:.0e}")


def _tensors(values: Any) -> list[Tensor]:
    """Return the non-empty tensors, in order."""
    flat = [values] if isinstance(values, Tensor) else [x for x in values if isinstance(x, Tensor)]
    return [x for x in flat if x.numel()]


def _optional(module: str, name: str) -> Any:
    """Return a function of another package, or None if that is not installed."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return None


def _norm(centered: bool, *, residual: bool = False, impl: str = "torch") -> Callable[..., Any]:
    """Norm of (x, [residual,] weight [, bias]); with a residual, also the sum."""

    def function(x: Tensor, *rest: Tensor) -> Any:
        total = x + rest[0] if residual else x
        weight, *bias = rest[1:] if residual else rest
        if impl == "torch":
            y = F.layer_norm(total, (HIDDEN,), weight, bias[0], EPS) if centered else F.rms_norm(
                total, (HIDDEN,), weight, EPS)  # fmt: skip
        elif centered:
            y = layer_norm(total, weight, bias[0], EPS, impl=impl)  # type: ignore[arg-type]
        else:
            y = rms_norm(total, weight, EPS, impl=impl)  # type: ignore[arg-type]
        return (y, total) if residual else y

    return function


def _other_norms(centered: bool, **options: Any) -> dict[str, Callable[..., Any] | None]:
    found: dict[str, Callable[..., Any] | None] = {
        name: _norm(centered, impl=impl, **options)
        for impl, name in (("apex", "apex"), ("te", "Transformer Engine"))
        if installed(impl)
    }
    flash = _optional("flash_attn.ops.triton.layer_norm", "layer_norm_fn" if centered else "rms_norm_fn")
    if flash is not None and not options:
        found["flash-attn"] = lambda x, weight, *bias: flash(x, weight, bias[0] if bias else None, eps=EPS)
    elif flash is not None:
        found["flash-attn"] = lambda x, other, weight: flash(x, weight, None, residual=other, eps=EPS, prenorm=True)
    return found


def _weights(centered: bool) -> tuple[Tensor, ...]:
    return tuple(_random(HIDDEN) for _ in range(2 if centered else 1))


def _norm_forward(residual: bool, centered: bool) -> Case:
    weights = _weights(centered)

    def ours(x: Tensor, *rest: Tensor) -> Call:
        other, weight, bias = rest[0] if residual else None, weights[0], weights[1] if centered else None
        return partial(torch.ops.triaxis.norm_forward, x, other, weight, bias, EPS, centered)

    options: dict[str, Any] = {"residual": True} if residual else {}
    return _case(
        ours,
        _norm(centered, **options),
        lambda: (*(_random(TOKENS, HIDDEN) for _ in range(2 if residual else 1)), *weights),
        others=_other_norms(centered, **options),
    )


def _norm_backward(residual: bool, centered: bool) -> Case:
    """With a residual, the gradient of the sum is an input and is added: for PyTorch, the input is also a result."""
    weights, count = _weights(centered), 2 if residual else 1

    def ours(*tensors: Tensor) -> Call:
        grad, grad_sum, x = tensors[0], tensors[1] if residual else None, tensors[count]
        bias = weights[1] if centered else None
        _, _, mean, rstd = torch.ops.triaxis.norm_forward(x, None, weights[0], bias, EPS, centered)
        given = (grad, grad_sum, x, weights[0], mean, rstd, centered)
        return partial(torch.ops.triaxis.norm_backward, *given)

    def passed_on(norm: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda x, *rest: (norm(x, *rest), x.view_as(x))) if residual else norm

    return _case(
        ours,
        passed_on(_norm(centered)),
        lambda: (*(_random(TOKENS, HIDDEN) for _ in range(count + 1)), *weights),
        gradients=count,
        others={name: passed_on(norm) for name, norm in _other_norms(centered).items() if norm is not None},
    )


def _norm_with_amax() -> Case:
    """The norm, and the largest |y|, which without it is one more read of y."""
    norm = _norm(False)

    def ours(x: Tensor, weight: Tensor) -> Call:
        amax = torch.zeros(1, device=DEVICE)

        def call() -> tuple[Tensor, Tensor]:
            return torch.ops.triaxis.norm_forward(x, None, weight, None, EPS, False, amax)[0], amax

        return call

    def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = norm(x, weight)
        return y, y.abs().amax().float().view(1)

    return _case(ours, plain, lambda: (_random(TOKENS, HIDDEN), *_weights(False)))


def _norm_to_fp8() -> Case:
    """Quantize the rounded output, as two separate kernels would."""
    norm, given = _norm(False), (torch.float8_e4m3fn, "block_1x128", True, False, None, None, True)

    def ours(x: Tensor, weight: Tensor) -> Call:
        options = (None, weight, None, EPS, False, "block_1x128", None, None)
        return partial(torch.ops.triaxis.norm_forward_fp8, x, *options)

    def plain(x: Tensor, weight: Tensor) -> Any:
        values, _, scale_inv, _ = quantize_reference(norm(x, weight).to(BF16), *given)  # type: ignore[arg-type]
        return values, scale_inv

    def meaning(results: tuple[Tensor, ...]) -> Tensor:
        return dequantize(QuantizedTensor(results[0], results[1], "block_1x128"))

    return _case(ours, plain, lambda: (_random(TOKENS, HIDDEN), *_weights(False)), meaning=meaning)


def _quantize(scaling: str, *, from_amax: bool = False) -> Case:
    """One scale is given, or computed `from_amax`, or there is one for each block."""
    amax = torch.full((1,), 7.0, device=DEVICE) if from_amax else None
    scale = torch.full((1,), 64.0, device=DEVICE) if scaling == "tensorwise" and not from_amax else None
    given = (torch.float8_e4m3fn, scaling, True, True, scale, amax, scaling == "block_1x128")

    def meaning(results: tuple[Tensor, ...]) -> list[Tensor]:
        values, scales = results[:2], results[2:]
        if scaling == "tensorwise":
            scales = (results[2] if scale is None else scale.reciprocal(),) * 2
        return [dequantize(QuantizedTensor(*x, scaling)) for x in zip(values, scales, strict=True)]  # type: ignore[arg-type]

    return _case(
        lambda x: partial(torch.ops.triaxis.quantize, x, *given),
        lambda x: quantize_reference(x, *given),  # type: ignore[arg-type]
        lambda: (_random(TOKENS, HIDDEN),),
        meaning=meaning,
    )


def _amax() -> Case:
    def of(function: Callable[[Tensor, Tensor], None], x: Tensor) -> Call:
        amax = torch.zeros(1, device=DEVICE)

        def call() -> Tensor:
            function(amax, x)
            return amax

        return call

    def plain(x: Tensor) -> Tensor:
        amax_reference(amax := x.new_zeros(1, dtype=torch.float32), x)
        return amax

    return _case(partial(of, torch.ops.triaxis.amax_), plain, lambda: (_random(TOKENS, HIDDEN),))


def _transpose_fp8(scaling: Scaling) -> Case:
    made = [_quantized(_random(TOKENS, HIDDEN), scaling) for _ in range(SETS)]

    def calls(function: Callable[..., Any]) -> list[Call]:
        return [partial(function, x.values, x.scale_inv, scaling) for x in made]

    def check() -> None:
        ours, plain = (calls(f)[0]() for f in (torch.ops.triaxis.transpose_fp8, transpose_reference))
        require_close(ours[0].float(), plain[0].float(), 0.0)
        if scaling != "tensorwise":
            require_close(ours[1], plain[1], 0.0)

    others = {"torch": transpose_reference, "torch.compile": torch.compile(transpose_reference, dynamic=False)}
    return Case(
        calls(torch.ops.triaxis.transpose_fp8),
        check,
        {name: lambda function=function: calls(function) for name, function in others.items()},  # type: ignore[misc]
    )


def _swiglu_forward() -> Case:
    return _case(_called(torch.ops.triaxis.swiglu_forward), swiglu_reference, lambda: (_random(TOKENS, 2 * FFN),))


def _swiglu_backward() -> Case:
    return _case(
        _called(torch.ops.triaxis.swiglu_backward),
        swiglu_reference,
        lambda: (_random(TOKENS, FFN), _random(TOKENS, 2 * FFN)),
        gradients=1,
    )


def _rope() -> Case:
    size = HIDDEN // HEADS
    cos, sin = rope_tables(torch.arange(TOKENS, device=DEVICE), size, 10_000.0)
    flash = _optional("flash_attn.layers.rotary", "apply_rotary_emb")

    def plain(qkv: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.chunk(3, 1)
        return apply_rope_reference(q, cos, sin), apply_rope_reference(k, cos, sin)

    def by_flash(qkv: Tensor) -> Any:
        return flash(qkv[None, :, : 2 * HEADS], cos.to(BF16), sin.to(BF16))

    return _case(
        lambda qkv: partial(torch.ops.triaxis.rope_qk, qkv, cos, sin, HEADS),
        plain,
        lambda: (_random(TOKENS, 3 * HEADS, size),),
        others={"flash-attn": by_flash if flash is not None else None},
    )


def _swiglu_backward_to_fp8(scaling: Scaling) -> Case:
    def plain(grad: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, 1)
        s = gate.sigmoid()
        return torch.cat((grad * up * s * (1 + gate * (1 - s)), grad * gate * s), 1)

    buffers = lambda: (_random(TOKENS, FFN), _random(TOKENS, 2 * FFN))  # noqa: E731
    return _gradient_to_fp8(torch.ops.triaxis.swiglu_backward_fp8, plain, buffers, scaling)


def _rope_backward_to_fp8() -> Case:
    size = HIDDEN // HEADS
    tables = rope_tables(torch.arange(TOKENS, device=DEVICE), size, 10_000.0)

    def ours(q: Tensor, k: Tensor, v: Tensor, *output: Any) -> Any:
        return torch.ops.triaxis.rope_qk_backward_fp8(q, k, v, *tables, *output)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = tables
        return torch.cat((apply_rope_reference(q, cos, -sin), apply_rope_reference(k, cos, -sin), v), 1).flatten(1)

    return _gradient_to_fp8(ours, plain, lambda: tuple(_random(TOKENS, HEADS, size) for _ in range(3)), "tensorwise")


def _gradient_to_fp8(
    ours: Callable[..., Any],
    plain: Callable[..., Tensor],
    buffers: Callable[[], tuple[Tensor, ...]],
    scaling: Scaling,
) -> Case:
    """A gradient that is rounded, then quantized, row-major and transposed, as by two separate kernels."""
    scale = torch.full((1,), 64.0, device=DEVICE) if scaling == "tensorwise" else None
    dtype = torch.float8_e5m2 if scaling == "tensorwise" else torch.float8_e4m3fn

    def quantized(*tensors: Tensor) -> Any:
        return quantize_reference(plain(*tensors).to(BF16), dtype, scaling, True, True, scale, None, True)

    def meaning(results: tuple[Tensor, ...]) -> list[Tensor]:
        scales = results[2:] if scale is None else (scale.reciprocal(),) * 2
        return [dequantize(QuantizedTensor(*x, scaling)) for x in zip(results[:2], scales, strict=True)]

    return _case(lambda *x: partial(ours, *x, scaling, scale, None), quantized, buffers, meaning=meaning)


def _cross_entropy() -> Case:
    logits = 4 * _random(TOKENS, VOCABULARY)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device=DEVICE)
    ones, copies = torch.ones(TOKENS, device=DEVICE), [logits.clone() for _ in range(SETS)]
    flash = _optional("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        z, at_label = torch.ops.triaxis.cross_entropy_statistics(x, labels, 0)
        torch.ops.triaxis.cross_entropy_gradient_(x, labels, z, ones, 0, 0.0)
        return z - at_label, x

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), labels, reduction="none")

    def trained(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        losses = function(leaf)
        return losses.detach(), torch.autograd.grad(losses, leaf, ones)[0]

    def refresh() -> None:
        for copy in copies:
            copy.copy_(logits)

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "torch": plain,
        "torch, bf16": lambda x: F.cross_entropy(x, labels, reduction="none").float(),
        "torch.compile": torch.compile(plain, dynamic=False),
    }
    if flash is not None:
        functions["flash-attn"] = lambda x: flash(x, labels, inplace_backward=True)[0]
    return Case(
        [partial(ours, copy) for copy in copies],
        lambda: require_close(ours(logits.clone()), trained(plain, logits.float()), ROUNDING),
        {
            name: lambda function=function: [partial(trained, function, copy) for copy in copies]  # type: ignore[misc]
            for name, function in functions.items()
        },
        refresh,
    )


def _adamw() -> Case:
    """Use as many parameters as fit; check only the ends and the middle, where an index would overflow."""
    count = min(PARAMETERS, int(torch.cuda.mem_get_info()[0] * 0.9) // ADAMW_STATE_BYTES)
    master, grad, average = (torch.empty(count, device=DEVICE).normal_() for _ in range(3))
    square = torch.empty(count, device=DEVICE).uniform_()
    param, step = torch.empty(count, dtype=BF16, device=DEVICE), torch.ones(1, device=DEVICE)
    state = (master, grad, average, square)
    learning_rate, beta1, beta2, eps, decay = _SETTINGS

    def ours() -> None:
        torch.ops.triaxis.adamw_(*state, param, step, None, None, *_SETTINGS)

    def check() -> None:
        ends = [slice(0, 4096), slice(count // 2, count // 2 + 4096), slice(count - 4096, count)]
        before = [[x[end].clone() for x in state] for end in ends]
        ours()
        for end, (x, *others) in zip(ends, before, strict=True):
            adamw_step_reference(x, others[0], others[1], others[2], step, learning_rate, (beta1, beta2), eps, decay)
            require_close([tensor[end] for tensor in state], [x, *others], 1e-5)
            require_close(param[end], x, ROUNDING)

    def by_torch() -> None:
        pieces = [list(x.split(PIECE)) for x in state]
        settings = {"lr": learning_rate, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay}
        steps = [step] * len(pieces[0])
        torch._fused_adamw_(*pieces, [], steps, amsgrad=False, maximize=False, **settings)  # type: ignore[call-overload]
        torch._foreach_copy_(list(param.split(PIECE)), pieces[0])

    return Case([ours], check, {"torch, fused": lambda: [by_torch]}, share=count / PARAMETERS)


def _gradient_norm() -> Case:
    grad = torch.empty(PARAMETERS, device=DEVICE).normal_()
    pieces = grad.split(PIECE)

    def expected() -> Tensor:
        return torch.stack([piece.double().square().sum() for piece in pieces]).sum()

    return Case(
        [partial(torch.ops.triaxis.square_sum, [grad])],
        lambda: require_close(torch.ops.triaxis.square_sum([grad]), expected(), 1e-5),
        {
            "torch": lambda: [partial(torch.linalg.vector_norm, grad)],
            "torch, foreach": lambda: [lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(pieces)))],
        },
    )


def _quantized(x: Tensor, scaling: str) -> QuantizedTensor:
    amax = x.abs().amax().float().view(1) if scaling == "tensorwise" else None
    result, _ = quantize(x, torch.float8_e4m3fn, scaling, amax=amax, power_of_two=True)  # type: ignore[arg-type]
    assert result is not None
    return result


def _operands(
    m: int, n: int, k: int, scalings: tuple[str, str]
) -> list[tuple[Tensor, Tensor, QuantizedTensor, QuantizedTensor]]:
    """Create both operands of each set, in bf16 and quantized."""
    made = [(_random(m, k), _random(n, k)) for _ in range(SETS)]
    return [(a, b, _quantized(a, scalings[0]), _quantized(b, scalings[1])) for a, b in made]


def _given(a: QuantizedTensor, b: QuantizedTensor) -> tuple[Any, ...]:
    return a.values, b.values, a.scale_inv, b.scale_inv, a.scaling, b.scaling


def _matmul(scaling: str, impl: str, width: int) -> Case:
    """x·Wᵀ for x [t, h] and W [width, h]: one scale per tensor, or per block of 1×128 and 128×128."""
    tensorwise = scaling == "tensorwise"
    made = _operands(
        TOKENS, width, HIDDEN, ("tensorwise", "tensorwise") if tensorwise else ("block_1x128", "block_128x128")
    )

    def cublaslt(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
        return torch.ops.triaxis.fp8_matmul(*_given(a, b), BF16, tensorwise)

    def sm90(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
        return torch.ops.triaxis.fp8_matmul_sm90(*_given(a, b), BF16)

    def by_torch(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
        scales = {"scale_a": a.scale_inv, "scale_b": b.scale_inv}
        return torch._scaled_mm(a.values, b.values.t(), **scales, out_dtype=BF16, use_fast_accum=True)

    ours = sm90 if impl == "triaxis" else cublaslt
    others: dict[str, Callable[[], list[Call]]] = {
        "bf16 matmul": lambda: [partial(torch.mm, x, weight.t()) for x, weight, _, _ in made]
    }
    if tensorwise:
        others["torch._scaled_mm"] = lambda: [partial(by_torch, a, b) for _, _, a, b in made]
    elif impl == "triaxis":
        others["cuBLASLt"] = lambda: [partial(cublaslt, a, b) for _, _, a, b in made]
    a, b = made[0][2:]
    expected = dequantize(a) @ dequantize(b).t()
    limit = 1e-2 if tensorwise else 3e-3  # fast accumulation; else 2e-3, and the rounding to bf16
    return Case(
        [partial(ours, a, b) for _, _, a, b in made], lambda: require_close(ours(a, b), expected, limit), others
    )


def _weight_gradient(impl: str, width: int) -> Case:
    """dyᵀ·x for dy [t, width] and x [t, h], both quantized in blocks along the tokens, added to an fp32 gradient."""
    made = _operands(width, HIDDEN, TOKENS, ("block_1x128", "block_1x128"))
    outs = [torch.zeros(width, HIDDEN, device=DEVICE) for _ in range(SETS)]

    def cublaslt(out: Tensor, a: QuantizedTensor, b: QuantizedTensor) -> None:
        torch.ops.triaxis.fp8_matmul_add_(out, *_given(a, b))

    def sm90(out: Tensor, a: QuantizedTensor, b: QuantizedTensor) -> None:
        torch.ops.triaxis.fp8_matmul_sm90_add_(out, *_given(a, b))

    def calls(function: Callable[..., None]) -> list[Call]:
        return [partial(function, out, a, b) for out, (_, _, a, b) in zip(outs, made, strict=True)]

    def check() -> None:
        a, b = made[0][2:]
        start = torch.randn_like(outs[0])
        (sm90 if impl == "triaxis" else cublaslt)(out := start.clone(), a, b)
        require_close(out - start, dequantize(a) @ dequantize(b).t(), 2e-3)

    others: dict[str, Callable[[], list[Call]]] = {
        "bf16 matmul": lambda: [partial(torch.mm, grad, x.t()) for grad, x, _, _ in made]
    }
    if impl == "triaxis":
        others["cuBLASLt"] = lambda: calls(cublaslt)
    return Case(calls(sm90 if impl == "triaxis" else cublaslt), check, others)


def case_of(row: Row) -> Case:
    """Create the case of a row, with its buffers on the current GPU."""
    name, width = row.name, int(row.shape.split("×")[1].split()[0]) if "GEMM" in row.name else 0
    makers: dict[str, Callable[[], Case]] = {
        "RMSNorm forward": partial(_norm_forward, False, False),
        "residual add + RMSNorm": partial(_norm_forward, True, False),
        "RMSNorm backward + residual": partial(_norm_backward, True, False),
        "LayerNorm forward": partial(_norm_forward, False, True),
        "LayerNorm backward": partial(_norm_backward, False, True),
        "RMSNorm forward with amax": _norm_with_amax,
        "RMSNorm to E4M3 1×128": _norm_to_fp8,
        "quantize row + column, 1×128": partial(_quantize, "block_1x128"),
        "quantize row + column, one scale": partial(_quantize, "tensorwise"),
        "quantize row + column, scale from amax": partial(_quantize, "tensorwise", from_amax=True),
        "amax": _amax,
        "transpose E4M3, 1×128": partial(_transpose_fp8, "block_1x128"),
        "transpose E4M3, one scale": partial(_transpose_fp8, "tensorwise"),
        "SwiGLU forward": _swiglu_forward,
        "SwiGLU backward": _swiglu_backward,
        "SwiGLU backward to E5M2, row + column": partial(_swiglu_backward_to_fp8, "tensorwise"),
        "SwiGLU backward to E4M3 1×128, row + column": partial(_swiglu_backward_to_fp8, "block_1x128"),
        "RoPE backward to E5M2, row + column": _rope_backward_to_fp8,
        "RoPE on q and k": _rope,
        "cross-entropy forward + backward": _cross_entropy,
        "AdamW": _adamw,
        "gradient norm": _gradient_norm,
        "FP8 GEMM tensorwise": partial(_matmul, "tensorwise", "cublaslt", width),
        "FP8 GEMM blockwise": partial(_matmul, "block_128x128", "cublaslt", width),
        "FP8 GEMM blockwise, custom kernel": partial(_matmul, "block_128x128", "triaxis", width),
        "FP8 GEMM blockwise, weight gradient": partial(_weight_gradient, "cublaslt", width),
        "FP8 GEMM blockwise, weight gradient, custom kernel": partial(_weight_gradient, "triaxis", width),
    }
    return makers[name]()
