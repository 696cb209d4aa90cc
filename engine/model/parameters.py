"""Which parameters a decoder has: the only place that knows both our module paths and the Hugging Face names."""

import math
from collections.abc import Iterator

from engine.config import ModelConfig
from engine.parallel.table import LocalParameter, LogicalTensor, ParameterTable, whole


def parameter_table(model: ModelConfig) -> ParameterTable:
    """The table of a decoder, in the order of the forward pass. Pure: allocates nothing."""
    return ParameterTable(tuple(_parameters(model)))


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global shape by Hugging Face name, in model order."""
    return {tensor.name: tensor.shape for tensor in parameter_table(model).logical()}


def _parameters(model: ModelConfig) -> Iterator[LocalParameter]:
    hidden, std = model.hidden_size, model.init_std
    embedding = whole("model.embed_tokens.weight", model.vocab_size, hidden, multiplies=model.tie_embeddings, std=std)
    yield LocalParameter("embedding.weight", (embedding,))
    for index in range(model.num_layers):
        yield from _layer(model, f"layers.{index}", f"model.layers.{index}")
    yield from _norm(model.norm, "norm", "model.norm", hidden)
    if not model.tie_embeddings:
        yield LocalParameter("head.weight", (whole("lm_head.weight", model.vocab_size, hidden, std=std),))


def _layer(model: ModelConfig, path: str, name: str) -> Iterator[LocalParameter]:
    hidden, ffn, head = model.hidden_size, model.intermediate_size, model.head_dim
    residual_std = model.init_std / math.sqrt(2 * model.num_layers)  # GPT-2: keeps the residual stream's variance
    q, kv = model.num_heads * head, model.num_kv_heads * head
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    up = ("gate_proj", "up_proj") if model.activation == "swiglu" else ("c_fc",)
    down = "down_proj" if model.activation == "swiglu" else "c_proj"

    yield from _norm(model.norm, f"{path}.attention_norm", f"{name}.input_layernorm", hidden)
    qkv = [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)]
    yield from _linear(f"{path}.attention.qkv", qkv, hidden, model.init_std, bias=model.qkv_bias)
    if model.qk_norm:
        yield from _norm("rms", f"{path}.attention.q_norm", f"{attention}.q_norm", head)
        yield from _norm("rms", f"{path}.attention.k_norm", f"{attention}.k_norm", head)
    output = [(f"{attention}.o_proj", hidden)]
    yield from _linear(f"{path}.attention.output", output, q, residual_std, bias=model.output_bias)

    yield from _norm(model.norm, f"{path}.mlp_norm", f"{name}.post_attention_layernorm", hidden)
    up_parts = [(f"{mlp}.{part}", ffn) for part in up]
    yield from _linear(f"{path}.mlp.up", up_parts, hidden, model.init_std, bias=model.output_bias)
    yield from _linear(f"{path}.mlp.down", [(f"{mlp}.{down}", hidden)], ffn, residual_std, bias=model.output_bias)


def _linear(
    path: str, parts: list[tuple[str, int]], inputs: int, std: float, *, bias: bool
) -> Iterator[LocalParameter]:
    weights = tuple(whole(f"{name}.weight", rows, inputs, std=std) for name, rows in parts)
    yield LocalParameter(f"{path}.weight", weights)
    if bias:
        yield LocalParameter(f"{path}.bias", tuple(_vector(f"{name}.bias", rows, 0.0) for name, rows in parts))


def _norm(kind: str, path: str, name: str, size: int) -> Iterator[LocalParameter]:
    yield LocalParameter(f"{path}.weight", (_vector(f"{name}.weight", size, 1.0),))
    if kind == "layer":
        yield LocalParameter(f"{path}.bias", (_vector(f"{name}.bias", size, 0.0),))


def _vector(name: str, size: int, value: float) -> LogicalTensor:
    return whole(name, size, decays=False, multiplies=False, mean=value)
