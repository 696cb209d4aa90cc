"""Which parameters a decoder has, and which part of each a rank holds: the only place that knows both our module paths
and the Hugging Face names.

Column-parallel weights (q, k, v; gate and up) are cut by rows, row-parallel ones (attention output, down) by columns,
embedding and head by vocabulary; every tensor-parallel rank holds the norms and the biases behind row-parallel layers.
The vocabulary need not divide: ranks then differ by one row, so nothing is padded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.config.schema import ModelConfig
from engine.parallel.layout import NO_TP, TensorParallel
from engine.parallel.pipeline.partition import Part
from engine.parallel.table import LocalParameter, LogicalTensor, ParameterTable, Rectangle, Replicas


def whole_model(model: ModelConfig) -> Part:
    """All of a decoder as one part."""
    return Part(range(model.num_layers), has_embedding=True, has_head=True)


def parameter_table(
    model: ModelConfig, parts: Sequence[Part] | None = None, tp: TensorParallel = NO_TP
) -> ParameterTable:
    """The table of what one rank holds of a decoder, in the order of the forward pass. Pure: allocates nothing.

    Args:
        parts: the parts of the model on this rank; by default all of it.
        tp: this rank's place among those that share each layer; its group is not used.
    """
    builder = _Builder(model, tp)
    return ParameterTable(tuple(p for part in parts or [whole_model(model)] for p in builder.part(part)))


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global shape by Hugging Face name, in model order."""
    return {tensor.name: tensor.shape for tensor in parameter_table(model).logical()}


def kv_share(model: ModelConfig, tp: TensorParallel) -> tuple[int, int]:
    """(first, count) of this rank's key and value heads; with fewer heads than ranks, neighbours hold the same one."""
    if tp.size <= model.num_kv_heads:
        return tp.share(model.num_kv_heads)
    return tp.rank * model.num_kv_heads // tp.size, 1


def tp_problem(model: ModelConfig, tp: int, **also: int) -> str:
    """Why `tp` ranks cannot share the layers, as behind `parallel.tp = N`; empty where they can. `also` is cut too."""
    sizes = {"model.num_heads": model.num_heads, "model.intermediate_size": model.intermediate_size, **also}
    if indivisible := [f"{name} = {value}" for name, value in sizes.items() if value % tp]:
        return f"does not divide {' and '.join(indivisible)}"
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        return f"neither divides model.num_kv_heads = {model.num_kv_heads} nor is a multiple of it"
    return f"is more than model.vocab_size = {model.vocab_size}" if tp > model.vocab_size else ""


def kv_replicas(model: ModelConfig, tp_size: int) -> int:
    """How many tensor-parallel ranks hold the same key and value head."""
    return max(1, tp_size // model.num_kv_heads)


@dataclass(frozen=True)
class _Builder:
    model: ModelConfig
    tp: TensorParallel

    def part(self, part: Part) -> Iterator[LocalParameter]:
        model = self.model
        shares_ends = model.tie_embeddings and part.has_embedding != part.has_head
        tied: Replicas | None = "tied_embedding" if shares_ends else None
        table = ("model.embed_tokens.weight", model.vocab_size)
        if part.has_embedding:
            counts_in_flops = model.tie_embeddings
            yield self._vocabulary("embedding.weight", *table, counts_in_flops=counts_in_flops, replicas=tied)
        for index in part.layers:
            yield from self._layer(f"layers.{index}", f"model.layers.{index}")
        if part.has_head:
            yield from self._norm(model.norm, "norm", "model.norm", model.hidden_size)
            if shares_ends:
                yield self._vocabulary("embedding.weight", *table, counts_in_flops=True, replicas=tied, owned=False)
            elif not model.tie_embeddings:
                yield self._vocabulary("head.weight", "lm_head.weight", model.vocab_size, counts_in_flops=True)

    def _layer(self, path: str, name: str) -> Iterator[LocalParameter]:
        model = self.model
        hidden, ffn, head = model.hidden_size, model.intermediate_size, model.head_dim
        residual_std = model.init_std / math.sqrt(2 * model.num_layers)  # GPT-2: keeps the residual stream's variance
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        gated = model.activation == "swiglu"
        up, down = (("gate_proj", "up_proj"), "down_proj") if gated else (("c_fc",), "c_proj")
        heads = model.num_heads * head
        q = (heads, *self.tp.share(heads), None)
        first, count = kv_share(model, self.tp)
        replicas: Replicas | None = "kv" if kv_replicas(model, self.tp.size) > 1 else None
        kv = (model.num_kv_heads * head, first * head, count * head, replicas)

        yield from self._norm(model.norm, f"{path}.attention_norm", f"{name}.input_layernorm", hidden)
        qkv = [(f"{attention}.q_proj", *q), (f"{attention}.k_proj", *kv), (f"{attention}.v_proj", *kv)]
        yield from self._column(f"{path}.attention.qkv", qkv, bias=model.qkv_bias)
        if model.qk_norm:
            yield from self._norm("rms", f"{path}.attention.q_norm", f"{attention}.q_norm", head)
            yield from self._norm("rms", f"{path}.attention.k_norm", f"{attention}.k_norm", head)
        yield from self._row(f"{path}.attention.output", f"{attention}.o_proj", heads, residual_std)

        yield from self._norm(model.norm, f"{path}.mlp_norm", f"{name}.post_attention_layernorm", hidden)
        ups = [(f"{mlp}.{part}", ffn, *self.tp.share(ffn), None) for part in up]
        yield from self._column(f"{path}.mlp.up", ups, bias=model.output_bias)
        yield from self._row(f"{path}.mlp.down", f"{mlp}.{down}", ffn, residual_std)

    def _vocabulary(
        self,
        path: str,
        name: str,
        rows: int,
        *,
        counts_in_flops: bool,
        replicas: Replicas | None = None,
        owned: bool = True,
    ) -> LocalParameter:
        start, extent = self.tp.share(rows)
        hidden = self.model.hidden_size
        rectangle = Rectangle((start, 0), (extent, hidden))
        std = self.model.init_std
        tensor = LogicalTensor(name, (rows, hidden), rectangle, True, counts_in_flops, 0.0, std, replicas, owned)
        return LocalParameter(path, (tensor,))

    def _column(
        self, path: str, pieces: Sequence[tuple[str, int, int, int, Replicas | None]], *, bias: bool
    ) -> Iterator[LocalParameter]:
        """Pieces are (name, rows of the whole, first row here, rows here, replicas)."""
        inputs, std = self.model.hidden_size, self.model.init_std
        yield LocalParameter(
            f"{path}.weight",
            tuple(
                self._tensor(f"{name}.weight", (rows, inputs), (start, 0), (extent, inputs), std, replicas)
                for name, rows, start, extent, replicas in pieces
            ),
        )
        if bias:
            yield LocalParameter(
                f"{path}.bias",
                tuple(
                    self._vector(f"{name}.bias", rows, start, extent, replicas)
                    for name, rows, start, extent, replicas in pieces
                ),
            )

    def _row(self, path: str, name: str, inputs: int, std: float) -> Iterator[LocalParameter]:
        start, extent = self.tp.share(inputs)
        rows = self.model.hidden_size
        weight = self._tensor(f"{name}.weight", (rows, inputs), (0, start), (rows, extent), std)
        yield LocalParameter(f"{path}.weight", (weight,))
        if self.model.output_bias:
            yield LocalParameter(f"{path}.bias", (self._replicated(f"{name}.bias", rows, 0.0),))

    def _norm(self, kind: str, path: str, name: str, size: int) -> Iterator[LocalParameter]:
        yield LocalParameter(f"{path}.weight", (self._replicated(f"{name}.weight", size, 1.0),))
        if kind == "layer":
            yield LocalParameter(f"{path}.bias", (self._replicated(f"{name}.bias", size, 0.0),))

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        start: tuple[int, ...],
        extent: tuple[int, ...],
        std: float,
        replicas: Replicas | None = None,
    ) -> LogicalTensor:
        return LogicalTensor(
            name, shape, Rectangle(start, extent), True, True, 0.0, std, replicas, self._owns(replicas)
        )

    def _vector(self, name: str, size: int, start: int, extent: int, replicas: Replicas | None) -> LogicalTensor:
        rectangle = Rectangle((start,), (extent,))
        return LogicalTensor(name, (size,), rectangle, False, False, 0.0, 0.0, replicas, self._owns(replicas))

    def _replicated(self, name: str, size: int, value: float) -> LogicalTensor:
        replicas: Replicas | None = "tp" if self.tp.size > 1 else None
        rectangle = Rectangle((0,), (size,))
        return LogicalTensor(name, (size,), rectangle, False, False, value, 0.0, replicas, self._owns(replicas))

    def _owns(self, replicas: Replicas | None) -> bool:
        sharing = {None: 1, "tp": self.tp.size, "kv": kv_replicas(self.model, self.tp.size)}
        return self.tp.rank % sharing[replicas] == 0
