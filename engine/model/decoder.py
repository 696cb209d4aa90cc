"""The decoder: one class for every family, driven by `ModelConfig`, and for every part of a pipeline.

Activations are [t, h]: all tokens of a microbatch, sequence after sequence. Only attention knows where a sequence
ends, so nothing else has a batch dimension, and sequence parallelism is a split of dim 0.

Shapes: t = s·b tokens, h hidden, f feed-forward, n heads, d head size, v vocabulary; /tp sharded.
"""

from collections.abc import Iterator

import torch
from torch import nn

from engine.config.schema import ModelConfig, OpsConfig, ParallelConfig
from engine.model.attention import Attend, Attention, Stream, attend_within
from engine.model.layers import ActivationLinear, Embedding, Head, NormLinear, Output, ParallelLinear, Parameters
from engine.model.parameters import whole_model
from engine.ops.attention_choice import AttentionImpls
from engine.ops.rope import RopeFrequencies, rope_frequencies, tables_at
from engine.parallel.layout import NO_TP, TensorParallel
from engine.parallel.pipeline.partition import Part
from engine.parallel.recompute import checkpoint


class FeedForward(nn.Module):
    """Norm and feed-forward layer: SwiGLU or GeGLU with fused gate and up, or GELU.

    With `selective_recompute` the outputs of norm and activation function are not kept for the backward pass.
    """

    def __init__(
        self,
        model: ModelConfig,
        parameters: Parameters,
        layer: int,
        tp: TensorParallel,
        ops: OpsConfig,
        *,
        selective_recompute: bool,
    ) -> None:
        super().__init__()
        block, path = f"layers.{layer}", f"layers.{layer}.mlp"
        self.up = NormLinear(
            parameters, f"{block}.mlp_norm", f"{path}.up", model, tp, ops, selective_recompute=selective_recompute
        )
        self.down = ActivationLinear(parameters, f"{path}.down", model, tp, selective_recompute=selective_recompute)
        self.finish = Output(parameters, f"{block}.mlp_post_norm", model, ops)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> Stream:
        """Return (mlp(s), s) for s = x + residual; see `Stream`."""
        handover = self.down.grad_handover(self.up.linear, x)
        up, total = self.up(x, residual, handover)  # [t, 2f/tp] or [t, f/tp]
        return self.finish(self.down(up, handover)), total


class Block(nn.Module):
    """Attention and feed-forward with their norms, each added to the residual stream [t/tp, h] by what follows."""

    def __init__(
        self,
        model: ModelConfig,
        parameters: Parameters,
        layer: int,
        tp: TensorParallel,
        ops: OpsConfig,
        *,
        selective_recompute: bool = False,
    ) -> None:
        super().__init__()
        self.attention = Attention(model, parameters, layer, tp, ops, selective_recompute=selective_recompute)
        self.mlp = FeedForward(model, parameters, layer, tp, ops, selective_recompute=selective_recompute)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> Stream:
        x, residual = self.attention(x, residual, cos, sin, attend)
        return self.mlp(x, residual)


class Decoder(nn.Module):
    """A transformer decoder, or the part of it that a pipeline stage holds.

    Args:
        parameters: this rank's parameters, gradient sinks and FP8 quantizers.
        part: the layers, and whether embedding and head are included; default: the whole model.
        tp: the tensor-parallel group.
        parallel: which layers are recomputed, and whether they are compiled.
        ops: implementations of operators.
        attention: those of attention, if `ops` leaves them open.
    """

    def __init__(
        self,
        model: ModelConfig,
        parameters: Parameters,
        part: Part | None = None,
        tp: TensorParallel = NO_TP,
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (immutable)
        ops: OpsConfig = OpsConfig(),  # noqa: B008
        attention: AttentionImpls = AttentionImpls(),  # noqa: B008
    ) -> None:
        super().__init__()
        part = part or whole_model(model)
        self.config = model
        self.attention_impls = attention if ops.attention == "auto" else AttentionImpls(*[ops.attention] * 3)
        self.embedding = Embedding(model, parameters, tp) if part.has_embedding else None
        recomputed = part.layers[: parallel.recompute_layers] if parallel.recompute != "none" else range(0)
        selective = parallel.recompute == "selective"
        blocks = [
            Block(model, parameters, layer, tp, ops, selective_recompute=selective and layer in recomputed)
            for layer in part.layers
        ]
        for block in blocks if parallel.compile else ():
            _compile(block, tp)
        self.layer_numbers, self.layers = part.layers, nn.ModuleList(blocks)
        self.num_fully_recomputed = 0 if selective else len(recomputed)
        self.head = Head(model, parameters, tp, ops) if part.has_head else None
        self._rope: list[RopeFrequencies] = []

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, attend: Attend, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states, before the final norm.

        Args:
            x: [t] int64 tokens where this part embeds them, else hidden states [t/tp, h].
            positions: [t] int64, each token's place in its document.
            attend: how the tokens attend; see `attention.py`.
            noise: [t/tp, h], added to the embeddings.

        Returns:
            [t/tp, h] in the parameters' dtype.
        """
        return _sum(*self._stream(x, positions, attend, noise))

    def _stream(self, x: torch.Tensor, positions: torch.Tensor, attend: Attend, noise: torch.Tensor | None) -> Stream:
        config = self.config
        tables = [tables_at(positions, frequencies) for frequencies in self._rope_frequencies(positions.device)]
        if self.embedding is not None:
            x = self.embedding(x)
            x = x if noise is None else x + noise.to(x.dtype)
        residual = None
        for index, (number, layer) in enumerate(zip(self.layer_numbers, self.layers, strict=True)):
            cos, sin = tables[-1] if config.window(number) else tables[0]
            if index < self.num_fully_recomputed and torch.is_grad_enabled():
                x, residual = checkpoint(layer, _sum(x, residual), None, cos, sin, attend)  # which keeps one tensor
            else:
                x, residual = layer(x, residual, cos, sin, attend)
        return x, residual

    def _rope_frequencies(self, device: torch.device) -> list[RopeFrequencies]:
        """Of layers that attend to all, and of those with a window, if they have others; kept for the next call."""
        config, size = self.config, self.config.rotary_dim
        if not self._rope or self._rope[0].values.device != device:
            whole = rope_frequencies(size, config.rope_theta, config.rope_scaling, config.max_position, device)
            local = config.rope_local_theta
            self._rope = [whole] if local is None else [whole, rope_frequencies(size, local, None, 0, device)]
        return self._rope

    def loss(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        cu_seqlens: tuple[int, ...],
        z_loss: float = 0.0,
        noise: torch.Tensor | None = None,
        target_indices: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """`scale` times the cross-entropy in nats, summed over the unmasked tokens; an fp32 scalar. `x`, `noise`: see
        `forward`; `target_indices`: see `Head`.
        """
        assert self.head is not None, "only the part with the head has a loss"
        hidden, residual = self._stream(x, positions, self.attend_within(cu_seqlens), noise)
        loss: torch.Tensor = self.head(hidden, residual, labels, loss_mask, z_loss, target_indices, scale)
        return loss

    def attend_within(self, cu_seqlens: tuple[int, ...]) -> Attend:
        """Return the attention of a batch: causal within each document, with the sliding window of each layer."""
        return attend_within(cu_seqlens, self.config, self.attention_impls)

    def units(self) -> Iterator[nn.Module]:
        """The modules that hold the parameters, in the order in which they run."""
        yield from (unit for unit in (self.embedding, *self.layers, self.head) if unit is not None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[t, v/tp] for hidden states [t, h] that `forward` returned: this rank's share of the vocabulary."""
        assert self.head is not None, "only the part with the head has logits"
        return self.head.logits(hidden)


def _sum(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return x if residual is None else x + residual


def _compile(block: Block, tp: TensorParallel) -> None:
    """torch.compile a block, except its linear layers and the norms of queries and keys if they communicate (the
    compiler would bake their state in as constants) and attention (it would recompile for every new `cu_seqlens`).
    """
    block.attention.attend = torch.compiler.disable(block.attention.attend)  # type: ignore[method-assign]
    if tp.size > 1:
        block.attention.normalize = torch.compiler.disable(block.attention.normalize)  # type: ignore[method-assign]
    for layer in block.modules():
        if tp.size > 1 and isinstance(layer, ParallelLinear):
            layer.forward = torch.compiler.disable(layer.forward)
    block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
