"""Activation memory of a layer, a part of the model, and a pipeline stage.

The method is that of Korthikanti et al. 2022 (arXiv 2205.05198), applied to this engine's layers: each term is a tensor
that an operation saves for its backward pass. Alternative considered: running the model on meta tensors, which is exact
but too slow, as `auto` evaluates many layouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.config.schema import BatchConfig, DataConfig, ModelConfig, ParallelConfig, PrecisionConfig
from engine.model.parameters import kv_share
from engine.ops.quantize import BLOCK_SIZE
from engine.parallel.fp8 import fp8_layers
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
        norms: norms of a layer: of inputs ("pre"), of outputs ("post"), or of both.
        mask: elements per token of the [s, s] attention mask of a layer with a sliding window.
        scores: attention scores per token that plain PyTorch computes for a softcap, in fp32.
        window_layers: layers with a sliding window.
        attended: elements per token of the attention outputs.
        vocabulary: vocabulary entries on this rank.
        softcapped: whether the logits have a softcap.
        fp8_layers: layers whose matmuls are in FP8.
        fp8_itemsize: bytes per element of an activation in FP8, with its share of a scale.
    """

    tokens: int
    tp: int
    itemsize: int
    hidden: int
    q: float
    kv: float
    up: float
    ffn: float
    norms: str
    mask: float
    scores: float
    window_layers: frozenset[int]
    attended: float
    vocabulary: int
    softcapped: bool
    fp8_layers: range
    fp8_itemsize: float

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        batch: BatchConfig,
        data: DataConfig,
        precision: PrecisionConfig,
        tp: int,
        itemsize: int,
    ) -> "ActivationSizes":
        """Compute the sizes for `tp` tensor-parallel ranks and elements of `itemsize` bytes."""
        q, ffn = model.num_heads / tp * model.head_dim, model.intermediate_size / tp
        return cls(
            tokens=batch.micro * data.seq_length,
            tp=tp,
            itemsize=itemsize,
            hidden=model.hidden_size,
            q=q,
            kv=kv_share(model, TensorParallel(0, tp))[1] * model.head_dim,
            up=2 * ffn if model.activation != "gelu" else ffn,
            ffn=ffn,
            norms=model.norm_placement,
            mask=_mask(model, batch, data),
            scores=0 if model.attention_softcap is None else model.num_heads / tp * data.seq_length,
            window_layers=frozenset(layer for layer in range(model.num_layers) if model.window(layer)),
            attended=2 * q if data.document_mask else q,  # outputs of single documents, then concatenated
            vocabulary=-(-model.vocab_size // tp),
            softcapped=model.logits_softcap is not None,
            fp8_layers=fp8_layers(precision, model.num_layers),
            fp8_itemsize=1 + 4 / BLOCK_SIZE if precision.recipe == "blockwise" else 1,
        )

    def layer(self, recompute: str, *, in_fp8: bool = False, has_window: bool = True) -> float:
        """Return the elements per token that a layer saves; one in FP8 counts by its bytes.

        An FP8 layer saves its own copies of the inputs of its matmuls, which recompute does not discard unless it is
        `full`: `selective` discards what bf16 matmuls would save of norms and of the activation function.
        """
        residual = self.hidden / self.tp  # the input of each norm; its output has the same size
        norm_inputs = (4 if self.norms == "both" else 2) * residual
        qkv = self.q + 2 * self.kv
        copies = (2 * residual + self.q + self.ffn) * self.fp8_itemsize / self.itemsize
        if recompute == "full":
            return residual
        if recompute == "selective":
            streams = 2 * residual if self.norms == "post" else 0  # which matmuls read, instead of outputs of norms
            return norm_inputs + qkv + self.up + (copies if in_fp8 else self.q + streams)
        rotated = self.q + self.kv
        inputs = copies if in_fp8 else 2 * residual + self.ffn  # attention saves its output in either case
        mask = self.mask if has_window else 0
        attended = self.attended if self.scores == 0 else 0 if in_fp8 else self.q  # a softcap's output is not kept
        return norm_inputs + qkv + rotated + mask + attended + self.up + inputs

    def kept(self, part: Part, parallel: ParallelConfig) -> int:
        """Return the bytes that `part` saves for the microbatch between its forward and backward pass."""
        recomputed = part.layers[: parallel.recompute_layers]
        elements = sum(
            self.layer(
                parallel.recompute if layer in recomputed else "none",
                in_fp8=layer in self.fp8_layers,
                has_window=layer in self.window_layers,
            )
            for layer in part.layers
        )
        if not part.has_head:
            return int(self.tokens * elements) * self.itemsize
        # the input of the final norm, and the gradient of its output, which the loss computes in the forward pass
        elements += self.hidden / self.tp + self.hidden
        return int(self.tokens * elements) * self.itemsize

    def waiting(self, part: Part) -> int:
        """Return the bytes that `part` saves for the weight gradients: input and output gradient of each matmul, those
        of [t, h] with all tokens.
        """
        elements = 4 * self.hidden + (self.q + 2 * self.kv) + self.q + self.up + self.ffn
        sizes = [self.fp8_itemsize if layer in self.fp8_layers else self.itemsize for layer in part.layers]
        return int(self.tokens * elements * sum(sizes))


def _mask(model: ModelConfig, batch: BatchConfig, data: DataConfig) -> float:
    """Elements per token of a layer's [s, s] mask, which is kept only for a sliding window shorter than s, and not with
    a softcap.
    """
    window = model.sliding_window
    if window is None or window >= data.seq_length or model.attention_softcap is not None:
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
