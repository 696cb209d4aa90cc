"""AdamW on flat tensors, in place (Loshchilov and Hutter, arXiv 1711.05101).

The kernel also writes the rounded parameter that the model computes with, in the same pass over memory. PyTorch's fused
AdamW supports only fp32 moments: without the kernel, bf16 moments are converted to fp32 in pieces.
"""

import torch
from torch import Tensor

from engine.ops import native

_PIECE = 1 << 24  # elements of bf16 moments converted at a time; the two fp32 copies take 128 MiB


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounded: Tensor | None = None,
) -> None:
    """Update `param`, `exp_avg` and `exp_avg_sq` in place.

    All tensors are flat and of one size; `param` and `grad` are fp32, the moments fp32 or bf16. If `rounded`
    is given, the new `param` is written to it in its dtype.

    `step` (fp32, one element) is the number of this update, from 1; it is not modified. The gradient is divided by
    `grad_scale` (fp32, one element) and may be overwritten. If `found_inf` (fp32, one element) is not 0, nothing is
    updated. The host reads none of them.
    """
    if native.runs(param):
        settings = (lr, *betas, eps, weight_decay)
        torch.ops.triaxis.adamw_(param, grad, exp_avg, exp_avg_sq, rounded, step, grad_scale, found_inf, *settings)
        return
    size = max(1, param.numel()) if exp_avg.dtype == torch.float32 else _PIECE
    tensors = [x.split(size) for x in (param, grad, exp_avg, exp_avg_sq)]
    for param_part, grad_part, *moments in zip(*tensors, strict=True):
        widened = [moment.float() for moment in moments]  # no copy if already fp32
        torch._fused_adamw_(
            [param_part],
            [grad_part],
            widened[:1],
            widened[1:],
            [],
            [step],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        for moment, wide in zip(moments, widened, strict=True):
            if moment is not wide:
                moment.copy_(wide)
    if rounded is not None:
        rounded.copy_(param)


def adamw_step_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`adamw_step` in plain PyTorch, without `rounded`; the gradient is not overwritten."""
    keep = torch.zeros_like(step) if found_inf is None else found_inf
    grad = grad if grad_scale is None else grad / grad_scale
    new_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    new_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad * grad
    update = (new_avg / (1 - betas[0] ** step)) / ((new_avg_sq / (1 - betas[1] ** step)).sqrt() + eps)
    for old, new in (
        (param, param * (1 - lr * weight_decay) - lr * update),
        (exp_avg, new_avg),
        (exp_avg_sq, new_avg_sq),
    ):
        old.copy_(torch.where(keep != 0, old, new))
