"""FP8 recipes of the parallel linear layers: the scales of their matmuls, and the amax history behind them.

Three recipes. "tensorwise": one scale a tensor, from its current amax. "delayed": one scale a tensor, from the amax
history of earlier steps (Transformer Engine's default), so that quantization need not wait for a maximum.
"blockwise": scales for 1 × 128 elements of activations and gradients and 128 × 128 of weights, powers of two
(DeepSeek-V3, arXiv 2412.19437). Activations and weights are E4M3; gradients E5M2, under "blockwise" E4M3.

Ranks that share a layer agree on the scale of every tensor, so a layer's numbers do not depend on how it is cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.config.schema import Fp8MatmulImpl, Fp8Recipe, PrecisionConfig
from engine.ops.quantize import BLOCK_1X128, BLOCK_128X128, TENSORWISE, Fp8Output, QuantizedTensor, quantize
from engine.parallel.collectives import all_gather, all_max
from engine.parallel.layout import TensorParallel, World
from engine.parallel.table import LocalParameter

_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_INPUT, _GRAD = 0, 1


@dataclass
class Fp8Layer:
    """The scales of one linear layer that multiplies in FP8.

    Attributes:
        tp: with whom the layer is shared.
        scales, amax: of input and gradient, fp32 [2]; the scales that "delayed" uses in this step, and the amax of this
            step so far.
        impl: the implementation of the matmuls.
        delayed: the scales are those of "delayed".
        kept: the quantized weight, row-major and transposed, until the weight changes.
    """

    recipe: Fp8Recipe
    weight: Tensor
    tp: TensorParallel
    scales: Tensor
    amax: Tensor
    impl: Fp8MatmulImpl = "auto"
    delayed: bool = False
    kept: tuple[QuantizedTensor, QuantizedTensor] | None = None

    def input(self, x: Tensor, *, sharded: bool) -> QuantizedTensor:
        """`x` [t, in] quantized along its rows; `sharded`: the features of x are this rank's share."""
        return self._quantize(x, _INPUT, _E4M3, sharded)[0]

    def output_spec(self, x: Tensor, features: int) -> Fp8Output | None:
        """FP8 output spec for the op that computes this layer's input [t, features] from `x`, or None if it cannot be
        fused: the scale is not known before, or there is no kernel."""
        if torch.compiler.is_compiling():
            return None
        if self.recipe == "blockwise":
            spec = Fp8Output(BLOCK_1X128, power_of_two=True)
        elif self.delayed:
            spec = Fp8Output(TENSORWISE, self.scales[_INPUT : _INPUT + 1], self.amax[_INPUT : _INPUT + 1])
        else:
            return None
        return spec if spec.supports(x, features) else None

    def grad(self, grad: Tensor, *, sharded: bool) -> tuple[QuantizedTensor, QuantizedTensor]:
        """The gradient of the output, [t, out], along its rows and transposed."""
        dtype = _E4M3 if self.recipe == "blockwise" else _E5M2
        return self._quantize(grad, _GRAD, dtype, sharded, transposed=True)

    def quantized_weight(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        """The weight [out, in], row-major and transposed; quantized once until `Fp8State.weights_changed`."""
        if self.kept is None:
            weight = self.weight.detach()
            if self.recipe == "blockwise":
                both = quantize(weight, _E4M3, BLOCK_128X128, transposed=True, power_of_two=True)
            else:
                scale = self._current_scale(weight, _E4M3, True)
                both = quantize(weight, _E4M3, TENSORWISE, transposed=True, scale=scale)
            self.kept = _both(both)
        return self.kept

    def _quantize(
        self, x: Tensor, which: int, dtype: torch.dtype, sharded: bool, *, transposed: bool = False
    ) -> tuple[QuantizedTensor, QuantizedTensor]:
        if self.recipe == "blockwise":
            return _both(quantize(x, dtype, BLOCK_1X128, transposed=transposed, power_of_two=True))
        amax = self.amax[which : which + 1] if self.recipe == "delayed" else None
        scale = self.scales[which : which + 1] if self.delayed else self._current_scale(x, dtype, sharded)
        return _both(quantize(x, dtype, TENSORWISE, transposed=transposed, scale=scale, amax=amax))

    def _current_scale(self, x: Tensor, dtype: torch.dtype, sharded: bool) -> Tensor:
        amax = x.abs().amax().float().view(1)
        if sharded and self.tp.group is not None:
            all_max(amax, self.tp.group).wait()
        return _scale_from_amax(amax, dtype)


def runs_in_fp8(parameter: LocalParameter, precision: PrecisionConfig, num_layers: int) -> bool:
    """Whether a parameter is the weight of an FP8 matmul.

    The linear layers of all blocks are, but of those that stay in bf16. Embedding and head never are.
    """
    if precision.mode != "fp8" or parameter.layer is None or len(parameter.shape) != 2:
        return False
    return precision.bf16_first_layers <= parameter.layer < num_layers - precision.bf16_last_layers


class Fp8State:
    """All linear layers of this rank that multiply in FP8.

    Attributes:
        by_path: the layers, under the paths of their weights.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        recipe: Fp8Recipe,
        world: World,
        *,
        amax_history: int,
        impl: Fp8MatmulImpl = "auto",
    ) -> None:
        self.recipe, self.world = recipe, world
        count, device = len(weights), world.device
        self._history = torch.zeros(count, 2, amax_history, device=device)  # newest first
        self._amax = torch.zeros(count, 2, device=device)
        self._scales = torch.ones(count, 2, device=device)
        self._largest = torch.tensor([torch.finfo(_E4M3).max, torch.finfo(_E5M2).max], device=device)
        self._has_history = False
        self.by_path = {
            path: Fp8Layer(recipe, weight, world.tp, self._scales[index], self._amax[index], impl)
            for index, (path, weight) in enumerate(weights.items())
        }

    def weights_changed(self) -> None:
        """Forget the quantized weights; call before the first forward pass behind an update."""
        for layer in self.by_path.values():
            layer.kept = None

    def begin_step(self) -> None:
        """Compute the scales of this step from the amax history; the very first step uses the current amax."""
        if self.recipe != "delayed":
            return
        self._amax.zero_()
        top = self._history.amax(2)
        self._scales.copy_(torch.where(top > 0, self._largest / top, 1.0))
        for layer in self.by_path.values():
            layer.delayed = self._has_history

    def end_step(self) -> None:
        """Append the amax of this step, over all ranks that share a layer or the batch, to the history."""
        if self.recipe != "delayed":
            return
        for group in (self.world.tp.group, self.world.dp_group):
            if group is not None:
                all_max(self._amax, group).wait()
        newest = torch.where(self._amax.isfinite(), self._amax, 0.0)
        self._history = torch.cat((newest[..., None], self._history[..., :-1]), -1)
        self._has_history = True

    def histories(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: fp32 [2, amax_history] for each layer, newest first, input before gradient."""
        return dict(zip(self.by_path, self._history, strict=True)) if self.recipe == "delayed" else {}

    def restored(self) -> None:
        """The tensors of `histories` have been filled from a checkpoint."""
        self._has_history = True


def own_rows(x: QuantizedTensor, tp: TensorParallel) -> QuantizedTensor:
    """This rank's tokens of `x` [t, in]."""
    rows = slice(tp.rank * (size := x.values.shape[0] // tp.size), (tp.rank + 1) * size)
    scale_inv = x.scale_inv[:, rows].contiguous() if x.scaling == BLOCK_1X128 else x.scale_inv
    return QuantizedTensor(x.values[rows].clone(), scale_inv, x.scaling)


def gather_rows(x: QuantizedTensor, group: ProcessGroup) -> QuantizedTensor:
    """All tokens from every rank's part, in half the bytes of bf16."""
    values = _gathered(x.values.view(torch.uint8), group).view(x.values.dtype)
    if x.scaling != BLOCK_1X128:
        return QuantizedTensor(values, x.scale_inv, x.scaling)
    return QuantizedTensor(values, _gathered(x.scale_inv.t().contiguous(), group).t().contiguous(), x.scaling)


def _gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    all_gather(out, x, group).wait()
    return out


def _scale_from_amax(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """max(dtype) / amax: what a tensor is multiplied by before the cast to FP8; 1 where `amax` is 0."""
    largest = torch.full_like(amax, torch.finfo(dtype).max)
    return torch.where(amax > 0, largest / amax, 1.0)


def _both(results: tuple[QuantizedTensor | None, QuantizedTensor | None]) -> tuple[QuantizedTensor, QuantizedTensor]:
    """For callers that know which they asked for; the other is the same again."""
    first, second = results
    assert first is not None
    return first, second if second is not None else first
