"""FP8 recipes of the parallel linear layers: the scales of their matmuls, and the amax history behind them.

Three recipes. "tensorwise": one scale a tensor, from its current amax. "delayed": one scale a tensor, from the amax
history of earlier steps (Transformer Engine's default), so that quantization need not wait for a maximum.
"blockwise": scales for 1 × 128 elements of activations and gradients and 128 × 128 of weights, powers of two
(DeepSeek-V3, arXiv 2412.19437). Activations and weights are E4M3; gradients E5M2, under "blockwise" E4M3.

Ranks that share a layer agree on the scale of every tensor, so a layer's numbers do not depend on how it is cut.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.config.schema import Config
from engine.errors import ConfigError
from engine.ops import native
from engine.ops.fp8 import Fp8MatmulImpl
from engine.ops.quantize import BLOCK_1X128, BLOCK_128X128, TENSORWISE, Fp8Output, QuantizedTensor, quantize
from engine.parallel.collectives import all_gather, all_max
from engine.parallel.gradients import TrainedParameter
from engine.parallel.layout import TensorParallel, World

Recipe = Literal["delayed", "tensorwise", "blockwise"]
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_INPUT, _GRAD = 0, 1


@dataclass
class Fp8Layer:
    """The scales of one linear layer.

    Attributes:
        tp: with whom the layer is shared.
        scales, amax: of input and gradient, fp32 [2]; the scales that "delayed" uses in this step, and the amax of this
            step so far.
        impl: the implementation of the matmuls.
        delayed: the scales are those of "delayed".
        kept: the quantized weight, row-major and transposed, until the weight changes.
    """

    recipe: Recipe
    weight: TrainedParameter
    tp: TensorParallel
    scales: Tensor
    amax: Tensor
    impl: Fp8MatmulImpl = "auto"
    delayed: bool = False
    kept: tuple[QuantizedTensor, QuantizedTensor] | None = None

    def input(self, x: Tensor, *, sharded: bool) -> QuantizedTensor:
        """`x` [t, in] quantized along its rows; `sharded`: the features of x are this rank's share."""
        return self._quantize(x, _INPUT, _E4M3, sharded)[0]

    def output(self) -> Fp8Output | None:
        """How whatever makes the layer's input quantizes it in one go; None where a maximum has to be found first."""
        if self.recipe == "blockwise":
            return Fp8Output(BLOCK_1X128, power_of_two=True)
        if not self.delayed:
            return None
        return Fp8Output(TENSORWISE, self.scales[_INPUT : _INPUT + 1], self.amax[_INPUT : _INPUT + 1])

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


def multiplies_in_fp8(config: Config, path: str, shape: tuple[int, ...]) -> bool:
    """Whether the parameter at `path` of the table is the weight of an FP8 matmul.

    The linear layers of all blocks are, but of those that stay in bf16. Embedding and head never are.
    """
    precision = config.precision
    if precision.mode != "fp8" or len(shape) != 2 or not path.startswith("layers."):
        return False
    layer = int(path.split(".")[1])
    return precision.bf16_first_layers <= layer < config.model.num_layers - precision.bf16_last_layers


def require_device(config: Config, device: torch.device) -> None:
    """Raises: ConfigError: the GPU has no FP8 matmuls of this recipe. A CPU emulates all of them."""
    precision = config.precision
    if precision.mode != "fp8" or device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    has = f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}"
    if found < (8, 9):
        raise ConfigError(f"precision.mode = fp8 needs a GPU of compute capability 8.9 or newer, and {has}; use bf16")
    if precision.recipe == "blockwise" and found != (9, 0):
        raise ConfigError(f"precision.recipe = blockwise needs compute capability 9.0, and {has}; use tensorwise")
    impl = config.ops.fp8_matmul
    if native.WHY_NOT and (precision.recipe == "blockwise" or impl in ("cublaslt", "triaxis")):
        raise ConfigError(
            f"precision.recipe = {precision.recipe} with ops.fp8_matmul = {impl} needs csrc: {native.WHY_NOT}"
        )
    if impl == ("torch" if precision.recipe == "blockwise" else "triaxis"):
        has = "one scale a tensor" if impl == "torch" else "scales of blocks"
        raise ConfigError(f"ops.fp8_matmul = {impl} has {has}, not precision.recipe = {precision.recipe}; use cublaslt")


class Fp8State:
    """All linear layers of this rank that multiply in FP8.

    Attributes:
        by_path: the layers, under the paths of their weights.
    """

    def __init__(
        self,
        parameters: dict[str, TrainedParameter],
        recipe: Recipe,
        world: World,
        *,
        amax_history: int,
        impl: Fp8MatmulImpl = "auto",
    ) -> None:
        self.recipe, self.world = recipe, world
        count, device = len(parameters), world.device
        self._history = torch.zeros(count, 2, amax_history, device=device)  # newest first
        self._amax = torch.zeros(count, 2, device=device)
        self._scales = torch.ones(count, 2, device=device)
        self._largest = torch.tensor([torch.finfo(_E4M3).max, torch.finfo(_E5M2).max], device=device)
        self._has_history = False
        self.by_path: dict[str, Fp8Layer] = {}
        for index, (path, weight) in enumerate(parameters.items()):
            layer = Fp8Layer(recipe, weight, world.tp, self._scales[index], self._amax[index], impl)
            self.by_path[path] = weight.fp8 = layer

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


def fused_output(weight: Tensor, x: Tensor, columns: int) -> Fp8Output | None:
    """How to quantize an input of `columns` features for the layer of `weight` in the pass that makes it from `x`; None
    where the layer is not in FP8, its scale not known before, or a kernel not there."""
    layer = getattr(weight, "fp8", None)
    if layer is None or torch.compiler.is_compiling():
        return None
    output: Fp8Output | None = layer.output()
    return output if output is not None and output.supports(x, columns) else None


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
