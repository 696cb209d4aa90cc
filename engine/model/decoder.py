"""The decoder: one class for every family, driven by `ModelConfig`.

Activations are [t, h]: all tokens of a microbatch, sequence after sequence. Only attention knows where a sequence
ends, so nothing else has a batch dimension, and sequence parallelism is a split of dim 0.

Shapes: t = s·b tokens, h hidden, f feed-forward, n heads, d head size, v vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.model.attention import Attend, Attention, attend_within
from engine.model.layers import Linear, Norm, Parameters
from engine.ops.cross_entropy import linear_cross_entropy
from engine.ops.rope import rope_tables
from engine.ops.swiglu import swiglu


class FeedForward(nn.Module):
    """SwiGLU with fused gate and up, or a GELU layer."""

    def __init__(self, model: ModelConfig, parameters: Parameters, path: str) -> None:
        super().__init__()
        self.gated = model.activation == "swiglu"
        self.up = Linear(parameters, f"{path}.up")
        self.down = Linear(parameters, f"{path}.down")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)  # [t, 2f] or [t, f]
        return self.down(swiglu(up) if self.gated else F.gelu(up, approximate="tanh"))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, model: ModelConfig, parameters: Parameters, layer: int) -> None:
        super().__init__()
        path = f"layers.{layer}"
        self.attention_norm = Norm(parameters, f"{path}.attention_norm", model.norm_eps)
        self.attention = Attention(model, parameters, f"{path}.attention", layer)
        self.mlp_norm = Norm(parameters, f"{path}.mlp_norm", model.norm_eps)
        self.mlp = FeedForward(model, parameters, f"{path}.mlp")

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, model: ModelConfig, parameters: Parameters) -> None:
        super().__init__()
        self.config = model
        self.embedding = parameters["embedding.weight"]
        self.layers = nn.ModuleList(Block(model, parameters, layer) for layer in range(model.num_layers))
        self.norm = Norm(parameters, "norm", model.norm_eps)
        self.head = self.embedding if model.tie_embeddings else parameters["head.weight"]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: [t] int64.
            positions: [t] int64, each token's place in its document.
            attend: how the tokens attend; see `attention.py`.

        Returns:
            [t, h] in the parameters' dtype.
        """
        config = self.config
        cos, sin = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = F.embedding(tokens, self.embedding)  # [t, h]
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.norm(x)

    def loss(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        cu_seqlens: tuple[int, ...],
    ) -> torch.Tensor:
        """Cross-entropy in nats, summed over the unmasked tokens; a fp32 scalar. All tensors are [t]."""
        hidden = self(tokens, positions, attend_within(cu_seqlens, self.config.sliding_window))
        return linear_cross_entropy(hidden, self.head, labels, loss_mask)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[t, v] for hidden states [t, h]."""
        return F.linear(hidden, self.head)
