"""How many activations a layer, a part of the model and a pipeline stage keep for their backward passes.

Counted as our layers keep them, in the manner of Korthikanti et al. 2022 (arXiv 2205.05198): each term is a tensor that
an operation saves for its backward pass. Alternative considered: running the model on meta tensors, which would be
exact but takes longer than a person waits, as `auto` looks at many layouts.
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
        tokens: of the microbatch.
        tp: ranks that share each layer.
        itemsize: bytes of an element.
        hidden: hidden size of the model.
        q: width of this rank's queries; `kv`: of its keys, and of its values.
        up: width of its feed-forward layer before the activation function; `ffn`: after it.
        mask: elements per token of a layer's [s, s] attention mask.
        attended: elements per token of attention's outputs.
        vocabulary: rows of the vocabulary on this rank.
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
        """For `tp` ranks to a layer and elements of `itemsize` bytes."""
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
            attended=2 * q if data.document_mask else q,  # documents are attended to one by one, then concatenated
            vocabulary=-(-model.vocab_size // tp),
        )

    def layer(self, recompute: str) -> float:
        """Elements per token that a layer keeps."""
        residual = self.hidden / self.tp  # the input of each norm; its output has the same size
        qkv = self.q + 2 * self.kv
        if recompute == "full":
            return residual
        if recompute == "selective":
            return 2 * residual + qkv + self.q + self.up
        rotated = self.q + self.kv
        return 4 * residual + qkv + rotated + self.mask + self.attended + self.up + self.ffn

    def kept(self, part: Part, parallel: ParallelConfig) -> int:
        """Bytes that the microbatch leaves in `part`, from its forward to its backward pass."""
        recomputed = 0 if parallel.recompute == "none" else len(part.layers[: parallel.recompute_layers])
        elements = recomputed * self.layer(parallel.recompute)
        elements += (len(part.layers) - recomputed) * self.layer("none")
        if not part.has_head:
            return int(self.tokens * elements) * self.itemsize
        # the input of the final norm; and the loss computes its gradients at once: fp32 [t, h] and [v/tp, h]
        elements += self.hidden / self.tp
        return int(self.tokens * elements) * self.itemsize + 4 * self.hidden * (self.tokens + self.vocabulary)

    def waiting(self, part: Part) -> int:
        """Bytes of `part` that wait for the weight gradients: input and output gradient of each matmul, those of [t, h]
        for all tokens.
        """
        elements = 4 * self.hidden + (self.q + 2 * self.kv) + self.q + self.up + self.ffn
        return int(self.tokens * len(part.layers) * elements) * self.itemsize


def _mask(model: ModelConfig, batch: BatchConfig, data: DataConfig) -> float:
    """Elements per token of a layer's [s, s] mask; only a window shorter than the sequence of s tokens needs one."""
    if model.sliding_window is None or model.sliding_window >= data.seq_length:
        return 0
    return data.seq_length if data.document_mask else data.seq_length / batch.micro


def peak_bytes(
    sizes: ActivationSizes, parts: Sequence[Part], parallel: ParallelConfig, pp: int, stage: int, num_microbatches: int
) -> int:
    """Bytes that the microbatches in flight on stage `stage` of `pp` keep at the schedule's activation peak.

    A forward pass leaves what its backward will need. Where the backward is split in two, its first half trades that
    for the factors of the weight gradients, which wait for the second half.

    Args:
        parts: what the stage holds, one part for each of its chunks.
        num_microbatches: of a step, on this rank.
    """
    if parallel.schedule != "gpipe":
        num_microbatches = min(num_microbatches, 4 * pp)  # more keep no more, and many take long to simulate
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
