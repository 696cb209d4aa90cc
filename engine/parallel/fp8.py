"""FP8 recipes of the parallel linear layers: the scales of their matmuls, and the amax history.

Three recipes. "tensorwise": one scale per tensor, computed from its current amax. "delayed": one scale per tensor,
computed from the amax history of earlier steps (Transformer Engine's default), so that quantization does not wait for a
maximum; weights, which change once per step, and the first step, which has no history, use the current amax.
"blockwise": one scale per 1 × 128 elements of activations and gradients and per 128 × 128 of weights, powers of two
(DeepSeek-V3, arXiv 2412.19437). Activations and weights are E4M3; gradients are E5M2, with "blockwise" E4M3.

Tensor-parallel ranks use the same scale for every tensor (amax is max-reduced over the group), so results do not depend
on the tp size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.config.schema import Fp8MatmulImpl, Fp8Recipe, PrecisionConfig
from engine.ops import native
from engine.ops.fp8 import transpose
from engine.ops.quantize import (
    BLOCK_1X128,
    BLOCK_128X128,
    MIN_AMAX,
    TENSORWISE,
    AmaxOutput,
    Fp8Output,
    GradHandover,
    QuantizedTensor,
    quantize,
    update_amax,
)
from engine.parallel.collectives import all_max, gathered
from engine.parallel.layout import TensorParallel, World
from engine.parallel.table import LocalParameter

_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WEIGHT_DTYPE = _E4M3
_INPUT, _GRAD = slice(0, 1), slice(1, 2)  # of what there is for each layer


class AmaxSlots:
    """Hands out fp32 [1] tensors that are zero, for current maxima: one launch zeroes a thousand of them, some four
    microbatches of 32 layers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._unused: Iterator[Tensor] = iter(())

    def take(self) -> Tensor:
        """Return a slot that nothing else uses."""
        slot = next(self._unused, None)
        if slot is None:
            self._unused = iter(torch.zeros(1024, device=self._device).split(1))
            slot = next(self._unused)
        return slot


@dataclass
class Fp8Quantizer:
    """Quantizes the operands of one linear layer's FP8 matmuls, and keeps their scales.

    Attributes:
        weight: the local weight [out, in] in the model's dtype; not read if `gathered` is given.
        tp: the tensor-parallel group.
        scales, scale_invs, amax: of input and gradient, fp32 [2]; the scales that "delayed" uses in this step, their
            reciprocals, and the amax of this step so far.
        slots: where the current amax of other tensors is taken.
        impl: the implementation of the matmuls.
        use_history: True once "delayed" takes its scales from the history; False in its first step, which has none.
        gathered: the weight in FP8, if that is what the data-parallel ranks gather; see `Fp8Weights`.
        weight_cache: the quantized weight, row-major and transposed, until the weight changes.
    """

    recipe: Fp8Recipe
    weight: Tensor
    tp: TensorParallel
    scales: Tensor
    scale_invs: Tensor
    amax: Tensor
    slots: AmaxSlots
    impl: Fp8MatmulImpl = "auto"
    use_history: bool = False
    gathered: QuantizedTensor | None = None
    weight_cache: tuple[QuantizedTensor, QuantizedTensor] | None = None

    def quantize_input(
        self, x: Tensor, amax: Tensor | None = None, *, transposed: bool = False
    ) -> tuple[QuantizedTensor, QuantizedTensor | None]:
        """Quantize `x`, this rank's tokens or features of the input.

        Args:
            amax: its current amax, fp32 [1], if the op that computed it has taken it.
            transposed: whether to write the transpose, too. With scales per block there is none: whichever op quantizes
                an input, the transpose is that of the FP8 values.
        """
        transposed = transposed and self.recipe != "blockwise"
        row_major, other = self._quantize(x, _INPUT, _E4M3, amax, reduce_amax=True, transposed=transposed)
        return row_major, other if transposed else None

    def input_spec(self, x: Tensor, features: int) -> Fp8Output | AmaxOutput | None:
        """Output spec for the op that computes this layer's input [t, features] from `x`: FP8 if the scale is known in
        advance, else with its amax; None if there is no kernel.
        """
        spec = self._spec(x, _INPUT)
        return spec if not isinstance(spec, Fp8Output) or spec.supports(x, features) else None

    def grad_spec(self, x: Tensor) -> Fp8Output | AmaxOutput | None:
        """Output spec for the op whose backward computes the gradient of this layer's output, on the device and in the
        dtype of `x`; as `input_spec`.
        """
        return self._spec(x, _GRAD) if torch.is_grad_enabled() else None

    def _spec(self, x: Tensor, which: slice) -> Fp8Output | AmaxOutput | None:
        if torch.compiler.is_compiling() or not native.runs(x):
            return None
        if self.recipe == "blockwise":
            return Fp8Output(BLOCK_1X128)
        if not self.use_history:
            return AmaxOutput(self.slots.take())
        return Fp8Output(TENSORWISE, self.scales[which], self.scale_invs[which], self.amax[which])

    def quantize_grad_output(
        self, grad: Tensor, *, reduce_amax: bool, handover: GradHandover | None = None
    ) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Quantize the gradient of the output [t, out], and its transpose.

        Args:
            reduce_amax: whether its features are sharded over the tp ranks.
            handover: what the op that computed it has done of this.
        """
        quantized, amax = (None, None) if handover is None else handover.take(grad)
        if quantized is not None:
            return quantized
        dtype = _E4M3 if self.recipe == "blockwise" else _E5M2
        return self._quantize(grad.contiguous(), _GRAD, dtype, amax, reduce_amax=reduce_amax, transposed=True)

    def quantized_weight(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Return the FP8 weight [out, in], row-major and transposed, quantized once per `Fp8State.weights_changed`."""
        if self.weight_cache is None:
            self.weight_cache = self._quantize_weight()
        return self.weight_cache

    def _quantize_weight(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        if self.gathered is not None:
            return self.gathered, transpose(self.gathered)
        weight = self.weight.detach()
        if self.recipe == "blockwise":
            return _both(quantize(weight, WEIGHT_DTYPE, BLOCK_128X128, transposed=True, power_of_two=True))
        amax = self._current_amax(weight, None, reduce=True)
        return _both(quantize(weight, WEIGHT_DTYPE, TENSORWISE, transposed=True, amax=amax))

    def _quantize(
        self,
        x: Tensor,
        which: slice,
        dtype: torch.dtype,
        amax: Tensor | None,
        *,
        reduce_amax: bool,
        transposed: bool = False,
    ) -> tuple[QuantizedTensor, QuantizedTensor]:
        if self.recipe == "blockwise":
            return _both(quantize(x, dtype, BLOCK_1X128, transposed=transposed, power_of_two=True))
        in_step = self.amax[which]
        if self.use_history:
            scale, inv = self.scales[which], self.scale_invs[which]
            return _both(
                quantize(x, dtype, TENSORWISE, transposed=transposed, scale=scale, scale_inv=inv, amax=in_step)
            )
        amax = self._current_amax(x, amax, reduce=reduce_amax)
        if self.recipe == "delayed":
            torch.maximum(in_step, amax, out=in_step)
        return _both(quantize(x, dtype, TENSORWISE, transposed=transposed, amax=amax))

    def _current_amax(self, x: Tensor, amax: Tensor | None, *, reduce: bool) -> Tensor:
        """The amax of `x`, which is `amax` if that is given, over the tp ranks if `reduce`."""
        if amax is None:
            update_amax(amax := self.slots.take(), x)
        if reduce and self.tp.group is not None:
            all_max(amax, self.tp.group).wait()
        return amax


def runs_in_fp8(parameter: LocalParameter, precision: PrecisionConfig, num_layers: int) -> bool:
    """Whether a parameter is the weight of an FP8 matmul.

    True for the linear layers of all blocks except the first and last ones that stay in bf16; never for embedding and
    output head.
    """
    return parameter.layer in fp8_layers(precision, num_layers) and len(parameter.shape) == 2


def fp8_layers(precision: PrecisionConfig, num_layers: int) -> range:
    """The layers of a model whose matmuls are in FP8; none in other precisions."""
    if precision.mode != "fp8":
        return range(0)
    return range(precision.bf16_first_layers, num_layers - precision.bf16_last_layers)


class Fp8State:
    """FP8 state of all linear layers of this rank: their quantizers and, for "delayed", the amax history.

    Attributes:
        quantizers: keyed by the path of the layer's weight.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        recipe: Fp8Recipe,
        world: World,
        *,
        amax_history: int,
        impl: Fp8MatmulImpl = "auto",
        gathered: Mapping[str, QuantizedTensor] = MappingProxyType({}),
    ) -> None:
        """Create the quantizers of `weights`.

        Args:
            weights: keyed by path.
            amax_history: steps in the history of "delayed".
            impl: the implementation of the matmuls.
            gathered: those of the weights that ranks gather in FP8.
        """
        self.recipe, self.world = recipe, world
        count, device = len(weights), world.device
        self._history = torch.zeros(count, 2, amax_history, device=device)  # newest first
        self._amax = torch.zeros(count, 2, device=device)
        self._scales = torch.ones(count, 2, device=device)
        self._scale_invs = torch.ones(count, 2, device=device)
        self._largest = torch.tensor([torch.finfo(_E4M3).max, torch.finfo(_E5M2).max], device=device)
        self._has_history = False
        of_layers = zip(self._scales, self._scale_invs, self._amax, strict=True)
        slots = AmaxSlots(device)
        self.quantizers = {
            path: Fp8Quantizer(recipe, weight, world.tp, *of_layer, slots, impl, gathered=gathered.get(path))
            for (path, weight), of_layer in zip(weights.items(), of_layers, strict=True)
        }

    def weights_changed(self) -> None:
        """Drop the cached FP8 weights; call after each optimizer step, before the next forward."""
        for quantizer in self.quantizers.values():
            quantizer.weight_cache = None

    def begin_step(self) -> None:
        """Compute the scales of this step from the amax history; the very first step uses the current amax."""
        if self.recipe != "delayed":
            return
        self._amax.zero_()
        top = self._history.amax(2)
        self._scales.copy_(torch.where(top > 0, self._largest / top.clamp(min=MIN_AMAX), 1.0))
        torch.reciprocal(self._scales, out=self._scale_invs)
        for quantizer in self.quantizers.values():
            quantizer.use_history = self._has_history

    def end_step(self) -> None:
        """Append the amax of this step, max-reduced over the tp and dp groups, to the history."""
        if self.recipe != "delayed":
            return
        for group in (self.world.tp.group, self.world.dp_group):
            if group is not None:
                all_max(self._amax, group).wait()
        newest = torch.where(self._amax.isfinite(), self._amax, 0.0)
        self._history = torch.cat((newest[..., None], self._history[..., :-1]), -1)
        self._has_history = True

    def rehearse(self, use: Callable[[], None]) -> None:
        """Call `use` once for each source of scales that steps of this run have: the current amax, the amax history.

        `use` may quantize: afterwards amax and scales are as before, and no quantized weight is cached.
        """
        amax, sources = self._amax.clone(), [quantizer.use_history for quantizer in self.quantizers.values()]
        self.weights_changed()
        for use_history in sorted({self._has_history, True}) if self.recipe == "delayed" else [False]:
            for quantizer in self.quantizers.values():
                quantizer.use_history = use_history
            use()
        self._amax.copy_(amax)
        for quantizer, use_history in zip(self.quantizers.values(), sources, strict=True):
            quantizer.use_history = use_history
        self.weights_changed()

    def histories(self) -> dict[str, Tensor]:
        """The amax history to save: fp32 [2, amax_history] per layer, newest first, input before gradient."""
        return dict(zip(self.quantizers, self._history, strict=True)) if self.recipe == "delayed" else {}

    def restored(self) -> None:
        """Mark the amax history as valid; call after loading it from a checkpoint."""
        self._has_history = True


def gather_rows(x: QuantizedTensor, group: ProcessGroup) -> QuantizedTensor:
    """All-gather the tokens of all ranks, in half the bytes of bf16: [t/tp, in] -> [t, in]."""
    values = gathered(x.values.view(torch.uint8), group).view(x.values.dtype)
    if x.scaling != BLOCK_1X128:
        return QuantizedTensor(values, x.scale_inv, x.scaling)
    return QuantizedTensor(values, gathered(x.scale_inv.t(), group).t().contiguous(), x.scaling)


def _both(results: tuple[QuantizedTensor | None, QuantizedTensor | None]) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Replace a missing transposed result by the row-major one, so that callers always unpack a pair."""
    first, second = results
    assert first is not None
    return first, second if second is not None else first
