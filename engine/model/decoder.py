"""The decoder: one class for every family, driven by `ModelConfig`, and for every part of a pipeline.

Activations are [t, h]: all tokens of a microbatch, sequence after sequence. Only attention knows where a sequence
ends, so nothing else has a batch dimension, and sequence parallelism is a split of dim 0.

Shapes: t = s·b tokens, h hidden, f feed-forward, n heads, d head size, v vocabulary; /tp on ranks that share a layer.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.schema import ModelConfig, OpsConfig, ParallelConfig
from engine.model.attention import Attend, Attention, attend_within
from engine.model.layers import ColumnLinear, Embedding, Head, Norm, Parameters, RowLinear
from engine.model.parameters import whole_model
from engine.ops.quantize import Fp8Activation
from engine.ops.rope import rope_tables
from engine.ops.swiglu import swiglu, swiglu_to_fp8
from engine.parallel.fp8 import fused_output
from engine.parallel.layout import NO_TP, TensorParallel
from engine.parallel.pipeline.partition import Part
from engine.parallel.recompute import again, forgotten


class FeedForward(nn.Module):
    """SwiGLU with fused gate and up, or a GELU layer. `recompute` forgets the output of the activation function."""

    def __init__(
        self, model: ModelConfig, parameters: Parameters, path: str, tp: TensorParallel, *, recompute: bool
    ) -> None:
        super().__init__()
        self.gated = model.activation == "swiglu"
        self.recompute = recompute
        self.up = ColumnLinear(parameters, f"{path}.up", tp)
        self.down = RowLinear(parameters, f"{path}.down", tp)

    def forward(self, x: torch.Tensor | Fp8Activation) -> torch.Tensor:
        up = self.up(x)  # [t, 2f/tp] or [t, f/tp]
        if self.gated and not self.recompute and (output := fused_output(self.down.weight, up, up.shape[1] // 2)):
            return self.down(swiglu_to_fp8(up, output))
        inner = self._activate(up)
        with forgotten(inner, lambda: self._activate(up)) if self.recompute else nullcontext():
            return self.down(inner)

    def _activate(self, up: torch.Tensor) -> torch.Tensor:
        return swiglu(up) if self.gated else F.gelu(up, approximate="tanh")


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream [t/tp, h].

    With `recompute`, attention itself and the outputs of norms and of the activation function are not kept.
    """

    def __init__(
        self,
        model: ModelConfig,
        parameters: Parameters,
        layer: int,
        tp: TensorParallel,
        ops: OpsConfig,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        path = f"layers.{layer}"
        self.recompute = recompute
        self.attention_norm = Norm(parameters, f"{path}.attention_norm", model.norm_eps, ops)
        self.attention = Attention(model, parameters, f"{path}.attention", layer, tp, recompute=recompute, ops=ops)
        self.mlp_norm = Norm(parameters, f"{path}.mlp_norm", model.norm_eps, ops)
        self.mlp = FeedForward(model, parameters, f"{path}.mlp", tp, recompute=recompute)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        normed = self.attention_norm(x, None if self.recompute else self.attention.qkv)
        with forgotten(normed, lambda: self.attention_norm(x)) if self.recompute else nullcontext():
            attended = self.attention(normed, cos, sin, attend)
        mlp_input, middle = self.mlp_norm.of_sum(attended, x, None if self.recompute else self.mlp.up)
        if isinstance(mlp_input, Fp8Activation) or not self.recompute:
            return middle + self.mlp(mlp_input)
        with forgotten(mlp_input, lambda: self.mlp_norm(middle)):
            return middle + self.mlp(mlp_input)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head; or the part of them that `part` names.

    Args:
        parameters: this rank's tensors by path; see `parameters.py`.
        tp: the ranks that share each layer.
        parallel: which layers are recomputed, and whether they are compiled.
        ops: implementations of operators.
    """

    def __init__(
        self,
        model: ModelConfig,
        parameters: Parameters,
        part: Part | None = None,
        tp: TensorParallel = NO_TP,
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (immutable)
        ops: OpsConfig = OpsConfig(),  # noqa: B008
    ) -> None:
        super().__init__()
        part = part or whole_model(model)
        self.config, self.ops = model, ops
        self.embedding = Embedding(model, parameters, tp) if part.has_embedding else None
        recomputed = part.layers[: parallel.recompute_layers] if parallel.recompute != "none" else range(0)
        selective = parallel.recompute == "selective"
        self.layers = nn.ModuleList(
            Block(model, parameters, layer, tp, ops, recompute=selective and layer in recomputed)
            for layer in part.layers
        )
        self.fully_recomputed = 0 if selective else len(recomputed)
        self.head = Head(model, parameters, tp, ops) if part.has_head else None
        if parallel.compile:
            for block in self.layers:
                _compile(block, tp)

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
        config = self.config
        cos, sin = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        if self.embedding is not None:
            x = self.embedding(x)
            x = x if noise is None else x + noise.to(x.dtype)
        for index, layer in enumerate(self.layers):
            if index < self.fully_recomputed and torch.is_grad_enabled():
                x = again(layer, x, cos, sin, attend)
            else:
                x = layer(x, cos, sin, attend)
        return x

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
    ) -> torch.Tensor:
        """Cross-entropy in nats, summed over the unmasked tokens; an fp32 scalar. `x`, `noise`: see `forward`;
        `target_indices`: see `Head`."""
        assert self.head is not None, "only the part with the head has a loss"
        hidden = self(x, positions, self.attend_within(cu_seqlens), noise)
        loss: torch.Tensor = self.head(hidden, labels, loss_mask, z_loss, target_indices)
        return loss

    def attend_within(self, cu_seqlens: tuple[int, ...]) -> Attend:
        """Attention within the documents of a batch, as this model attends."""
        return attend_within(cu_seqlens, self.config.sliding_window, self.ops.attention)

    def units(self) -> Iterator[nn.Module]:
        """The modules that hold the parameters, in the order in which they run."""
        yield from (unit for unit in (self.embedding, *self.layers, self.head) if unit is not None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[t, v/tp] for hidden states [t, h] that `forward` returned: this rank's share of the vocabulary."""
        assert self.head is not None, "only the part with the head has logits"
        return F.linear(self.head.norm(hidden), self.head.weight)


def _compile(block: nn.Module, tp: TensorParallel) -> None:
    """Compile a block without what communicates, where the compiler would take the state of the moment for a constant,
    and without the attention itself, which it would compile for every cut of a batch into documents."""
    outside: list[tuple[object, str]] = [(block.attention, "attend")]
    if tp.size > 1:
        outside += [(layer, "forward") for layer in block.modules() if isinstance(layer, ColumnLinear)]
    for module, method in outside:
        setattr(module, method, torch.compiler.disable(getattr(module, method)))
    block.forward = torch.compile(block.forward)
