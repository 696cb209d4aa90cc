"""The parameters of a decoder, and the part of each that a rank holds: the only place that knows both our paths and the
Hugging Face names.

Column-parallel weights (q, k, v; gate and up) are sharded by rows, row-parallel ones (attention output, down) by
columns, embedding and head by vocabulary; every tensor-parallel rank holds the norms and the biases of row-parallel
layers. The vocabulary need not divide: ranks then differ by one row, so nothing is padded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from engine.config.schema import ModelConfig
from engine.model.families import family_of
from engine.parallel.layout import NO_TP, TensorParallel
from engine.parallel.pipeline.partition import Part
from engine.parallel.table import LocalParameter, LogicalTensor, ParameterTable, Rectangle, Replicas

# Hugging Face names of the norms of a layer, by `norm_placement`
_NORM_NAMES = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}


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
    """(first, count) of this rank's key and value heads; with fewer heads than ranks, neighbors hold the same one."""
    if tp.size <= model.num_kv_heads:
        return tp.share(model.num_kv_heads)
    return tp.rank * model.num_kv_heads // tp.size, 1


def tp_problem(model: ModelConfig, tp: int, **also: int) -> str:
    """Return why the layers cannot be sharded over `tp` ranks, to follow `parallel.tp = N`, or an empty string. `also`:
    further sizes that tp must divide.
    """
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
class Slice:
    """The part [start, start + extent) of a dimension of size `total` that this rank holds."""

    total: int
    start: int
    extent: int


@dataclass(frozen=True)
class _Builder:
    """Yields the parameters of one rank, in the order of the forward pass."""

    model: ModelConfig
    tp: TensorParallel

    def part(self, part: Part) -> Iterator[LocalParameter]:
        model = self.model
        both_ends = model.tie_embeddings and part.has_embedding != part.has_head  # each end of the pipeline has a copy
        tied: Replicas | None = "tied_embedding" if both_ends else None
        if part.has_embedding:
            yield self._embedding(replicas=tied)
        for index in part.layers:
            yield from (replace(parameter, layer=index) for parameter in self._block(index))
        if part.has_head:
            yield from self._norm(model.norm, "norm", "model.norm", model.hidden_size)
            if both_ends:
                yield self._embedding(replicas=tied, owned=False)
            elif not model.tie_embeddings:
                yield self._vocabulary("head.weight", "lm_head.weight", counts_in_flops=True)

    def _block(self, index: int) -> Iterator[LocalParameter]:
        model, path, name = self.model, f"layers.{index}", f"model.layers.{index}"
        hidden, head_dim = model.hidden_size, model.head_dim
        residual_std = model.init_std / math.sqrt(2 * model.num_layers)  # GPT-2: keeps the residual stream's variance
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        family = family_of(model.family)
        heads, ffn = self._share(model.num_heads * head_dim), self._share(model.intermediate_size)
        first, count = kv_share(model, self.tp)
        kv_heads = Slice(model.num_kv_heads * head_dim, first * head_dim, count * head_dim)
        kv: Replicas | None = "kv" if kv_replicas(model, self.tp.size) > 1 else None

        norms = _NORM_NAMES[model.norm_placement]

        def norm(kind: str) -> Iterator[LocalParameter]:
            if kind in norms:
                yield from self._norm(model.norm, f"{path}.{kind}", f"{name}.{norms[kind]}", hidden)

        yield from norm("attention_norm")
        qkv = [
            (f"{attention}.q_proj", heads, None),
            (f"{attention}.k_proj", kv_heads, kv),
            (f"{attention}.v_proj", kv_heads, kv),
        ]
        yield from self._column(f"{path}.attention.qkv", qkv, bias=model.qkv_bias)
        if model.qk_norm:
            for part, share, replicas in (("q_norm", heads, None), ("k_norm", kv_heads, kv)):
                norm_name = f"{attention}.{part}.weight"
                if model.qk_norm_span == "head":
                    weight = self._replicated(norm_name, _whole(head_dim), mean=self._norm_mean)
                else:
                    weight = self._tensor(norm_name, (share,), mean=self._norm_mean, replicas=replicas)
                yield LocalParameter(f"{path}.attention.{part}.weight", (weight,))
        yield from self._row(
            f"{path}.attention.output", f"{attention}.o_proj", heads, residual_std, bias=model.output_bias
        )
        yield from norm("attention_post_norm")

        yield from norm("mlp_norm")
        ups = [(f"{mlp}.{up}", ffn, None) for up in family.up_names]
        yield from self._column(f"{path}.mlp.up", ups, bias=bool(model.mlp_bias))
        yield from self._row(
            f"{path}.mlp.down", f"{mlp}.{family.down_name}", ffn, residual_std, bias=bool(model.mlp_bias)
        )
        yield from norm("mlp_post_norm")

    def _embedding(self, *, replicas: Replicas | None, owned: bool = True) -> LocalParameter:
        """Every token is multiplied by it where it is the head too."""
        return self._vocabulary(
            "embedding.weight",
            "model.embed_tokens.weight",
            counts_in_flops=self.model.tie_embeddings,
            replicas=replicas,
            owned=owned,
        )

    def _vocabulary(
        self,
        path: str,
        name: str,
        *,
        counts_in_flops: bool,
        replicas: Replicas | None = None,
        owned: bool = True,
    ) -> LocalParameter:
        dims = (self._share(self.model.vocab_size), _whole(self.model.hidden_size))
        tensor = self._tensor(name, dims, std=self.model.init_std, replicas=replicas)
        return LocalParameter(path, (replace(tensor, counts_in_flops=counts_in_flops, owned=owned),))

    def _column(
        self, path: str, pieces: Sequence[tuple[str, Slice, Replicas | None]], *, bias: bool
    ) -> Iterator[LocalParameter]:
        """Pieces are (name, rows, ranks that hold the same rows), one after another in one matrix."""
        inputs, std = _whole(self.model.hidden_size), self.model.init_std
        weights = (
            self._tensor(f"{name}.weight", (rows, inputs), std=std, replicas=replicas)
            for name, rows, replicas in pieces
        )
        yield LocalParameter(f"{path}.weight", tuple(weights))
        if bias:
            biases = (self._tensor(f"{name}.bias", (rows,), replicas=replicas) for name, rows, replicas in pieces)
            yield LocalParameter(f"{path}.bias", tuple(biases))

    def _row(self, path: str, name: str, inputs: Slice, std: float, *, bias: bool) -> Iterator[LocalParameter]:
        hidden = _whole(self.model.hidden_size)
        yield LocalParameter(f"{path}.weight", (self._tensor(f"{name}.weight", (hidden, inputs), std=std),))
        if bias:
            yield LocalParameter(f"{path}.bias", (self._replicated(f"{name}.bias", hidden),))

    def _norm(self, kind: str, path: str, name: str, size: int) -> Iterator[LocalParameter]:
        weight = self._replicated(f"{name}.weight", _whole(size), mean=self._norm_mean)
        yield LocalParameter(f"{path}.weight", (weight,))
        if kind == "layer":
            yield LocalParameter(f"{path}.bias", (self._replicated(f"{name}.bias", _whole(size)),))

    @property
    def _norm_mean(self) -> float:
        """Initial weight of a norm, which multiplies by 1."""
        return 0.0 if self.model.zero_centered_norm else 1.0

    def _replicated(self, name: str, size: Slice, mean: float = 0.0) -> LogicalTensor:
        """A vector that every tensor-parallel rank holds."""
        return self._tensor(name, (size,), mean=mean, replicas="tp" if self.tp.size > 1 else None)

    def _tensor(
        self,
        name: str,
        dims: tuple[Slice, ...],
        *,
        mean: float = 0.0,
        std: float = 0.0,
        replicas: Replicas | None = None,
    ) -> LogicalTensor:
        """Matrices decay and multiply every token; vectors do neither."""
        return LogicalTensor(
            name=name,
            shape=tuple(dim.total for dim in dims),
            rectangle=Rectangle(tuple(dim.start for dim in dims), tuple(dim.extent for dim in dims)),
            weight_decay=len(dims) == 2,
            counts_in_flops=len(dims) == 2,
            mean=mean,
            std=std,
            replicas=replicas,
            owned=self._owns(replicas),
        )

    def _share(self, total: int) -> Slice:
        return Slice(total, *self.tp.share(total))

    def _owns(self, replicas: Replicas | None) -> bool:
        """This rank is the first of those that hold the same; the ends of a pipeline are told apart by the caller."""
        sharing = {"tp": self.tp.size, "kv": kv_replicas(self.model, self.tp.size)}
        return replicas not in sharing or self.tp.rank % sharing[replicas] == 0


def _whole(size: int) -> Slice:
    return Slice(size, 0, size)
