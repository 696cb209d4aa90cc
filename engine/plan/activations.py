"""Activation memory of a layer, a part of the model, and a pipeline stage.

The method is that of Korthikanti et al. 2022 (arXiv 2205.05198), applied to this engine's layers: each term is a tensor
that an operation saves for its backward pass. Alternative considered: running the model on meta tensors, which is exact
but too slow, as `auto` evaluates many layouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.config.schema import BatchConfig, DataConfig, ModelConfig, ParallelConfig
from engine.model.parameters import kv_share
from engine.parallel.layout import TensorParallel
from engine.parallel.pipeline.partition import Part
from engine.parallel.pipeline.schedules import ActionKind, build_schedule


@dataclass(frozen=True)
class ActivationSizes:
    """Sizes of the activations of one microbatch on one tensor-parallel rank.

    Attributes:
        tokens: tokens of the microbatch.
        tp: tensor-parallel size.
        itemsize: bytes per element.
        hidden: hidden size of the model.
        q: width of this rank's queries.
        kv: width of this rank's keys, and of its values.
        up: width of this rank's feed-forward layer before the activation function.
        ffn: width of this rank's feed-forward layer after the activation function.
        mask: elements per token of a layer's [s, s] attention mask.
        attended: elements per token of the attention outputs.
        vocabulary: vocabulary entries on this rank.
    """

    tokens: int
    tp: int
    itemsize: int
    hidden: int
    q: float
    kv: float
    up: float
    ffn: float
    mask: float
    attended: float
    vocabulary: int

    @classmethod
    def of(cls, model: ModelConfig, batch: BatchConfig, data: DataConfig, tp: int, itemsize: int) -> "ActivationSizes":
        """Compute the sizes for `tp` tensor-parallel ranks and elements of `itemsize` bytes."""
        q, ffn = model.num_heads / tp * model.head_dim, model.intermediate_size / tp
        return cls(
            tokens=batch.micro * data.seq_length,
            tp=tp,
            itemsize=itemsize,
            hidden=model.hidden_size,
            q=q,
            kv=kv_share(model, TensorParallel(0, tp))[1] * model.head_dim,
            up=2 * ffn if model.activation == "swiglu" else ffn,
            ffn=ffn,
            mask=_mask(model, batch, data),
            attended=2 * q if data.document_mask else q,  # outputs of single documents, then concatenated
            vocabulary=-(-model.vocab_size // tp),
        )

    def layer(self, recompute: str) -> float:
        """Return the elements per token that a layer saves."""
        residual = self.hidden / self.tp  # the input of each norm; its output has the same size
        qkv = self.q + 2 * self.kv
        if recompute == "full":
            return residual
        if recompute == "selective":
            return 2 * residual + qkv + self.q + self.up
        rotated = self.q + self.kv
        return 4 * residual + qkv + rotated + self.mask + self.attended + self.up + self.ffn

    def kept(self, part: Part, parallel: ParallelConfig) -> int:
        """Return the bytes that `part` saves for the microbatch between its forward and backward pass."""
        recomputed = 0 if parallel.recompute == "none" else len(part.layers[: parallel.recompute_layers])
        elements = recomputed * self.layer(parallel.recompute)
        elements += (len(part.layers) - recomputed) * self.layer("none")
        if not part.has_head:
            return int(self.tokens * elements) * self.itemsize
        # the input of the final norm; the loss computes its gradients in the forward pass: fp32 [t, h] and [v/tp, h]
        elements += self.hidden / self.tp
        return int(self.tokens * elements) * self.itemsize + 4 * self.hidden * (self.tokens + self.vocabulary)

    def waiting(self, part: Part) -> int:
        """Return the bytes that `part` saves for the weight gradients: input and output gradient of each matmul, those
        of [t, h] with all tokens.
        """
        elements = 4 * self.hidden + (self.q + 2 * self.kv) + self.q + self.up + self.ffn
        return int(self.tokens * len(part.layers) * elements) * self.itemsize


def _mask(model: ModelConfig, batch: BatchConfig, data: DataConfig) -> float:
    """Elements per token of a layer's [s, s] mask, which is needed only for a sliding window shorter than s."""
    if model.sliding_window is None or model.sliding_window >= data.seq_length:
        return 0
    return data.seq_length if data.document_mask else data.seq_length / batch.micro


def peak_bytes(
    sizes: ActivationSizes, parts: Sequence[Part], parallel: ParallelConfig, pp: int, stage: int, num_microbatches: int
) -> int:
    """Return the activation bytes of stage `stage` of `pp` at the schedule's activation peak.

    A forward pass saves activations for its backward pass. If the backward is split, its first half replaces them by
    the operands of the weight gradients, which are kept until the second half.

    Args:
        parts: the parts of the model on this stage, one per chunk.
        num_microbatches: microbatches per step on this rank.
    """
    if parallel.schedule != "gpipe":
        num_microbatches = min(
            num_microbatches, 4 * pp
        )  # the peak does not grow further, and many are slow to simulate
    actions = build_schedule(parallel.schedule, pp, num_microbatches, parallel.virtual_stages).actions[stage]
    kept = [sizes.kept(part, parallel) for part in parts]
    waiting = [sizes.waiting(part) for part in parts]
    change = {
        ActionKind.FORWARD: kept,
        ActionKind.BACKWARD: [-size for size in kept],
        ActionKind.BACKWARD_INPUT: [after - before for after, before in zip(waiting, kept, strict=True)],
        ActionKind.BACKWARD_WEIGHT: [-size for size in waiting],
    }
    return max(accumulate(change[action.kind][action.chunk] for action in actions))
