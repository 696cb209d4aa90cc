from collections import defaultdict

import pytest
import torch

from engine.checkpoint.rectangles import covers_exactly
from engine.config.schema import ModelConfig
from engine.model.families import PRESETS
from engine.model.parameters import kv_replicas, kv_share, logical_shapes, parameter_table
from engine.parallel.layout import NO_TP, Coordinates, Layout, TensorParallel
from engine.parallel.pipeline.partition import partition
from engine.parallel.table import LogicalTensor, ParameterTable, initialize
from engine.testing.models import new_parameters, tiny_config

# Some sizes do not divide the vocabulary, some are more than the key and value heads.
TP_SIZES = {
    "llama2-7b": (1, 4, 32),
    "llama3-8b": (2, 8, 16),
    "llama3.1-8b": (4,),
    "mistral-7b": (8, 32),
    "qwen2.5-7b": (2, 4, 28),
    "qwen3-8b": (8, 32),
    "starcoder2-7b": (4, 12, 36),
}


def cases() -> list[tuple[str, int, int, int]]:
    """(preset, tp, pp, parts of each stage)"""
    cuts = [(1, 1), (2, 1), (2, 2), (4, 1)]
    tiny = [(name, tp, *cut) for name in PRESETS if name not in TP_SIZES for tp in (1, 2, 4) for cut in cuts]
    return tiny + [(name, tp, 4, 2) for name, sizes in TP_SIZES.items() for tp in sizes]


def tables(model: ModelConfig, layout: Layout, virtual_stages: int) -> dict[Coordinates, ParameterTable]:
    """What every rank of `layout` holds."""
    parts = partition(model.num_layers, layout.pp * virtual_stages, head_cost=0.0)
    found = {}
    for at in map(layout.coordinates, range(layout.world_size)):
        found[at] = parameter_table(model, parts[at.pp :: layout.pp], TensorParallel(at.tp, layout.tp))
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_element_has_one_owner_and_replicas_agree(case):
    preset, tp, pp, virtual_stages = case
    model = ModelConfig(**PRESETS[preset])
    layout = Layout(pp=pp, tp=tp)
    owned: dict[str, list[LogicalTensor]] = defaultdict(list)
    together: dict[tuple, list[LogicalTensor]] = defaultdict(list)
    for at, table in tables(model, layout, virtual_stages).items():
        for tensor in table.logical():
            replicas = kv_replicas(model, tp)
            sharers = {None: at, "tp": at.pp, "kv": (at.pp, at.tp // replicas), "tied_embedding": at.tp}[
                tensor.replicas
            ]
            together[tensor.name, sharers].append(tensor)
            if tensor.owned:
                owned[tensor.name].append(tensor)
    shapes = logical_shapes(model)
    assert owned.keys() == shapes.keys()
    for name, tensors in owned.items():
        assert {tensor.shape for tensor in tensors} == {shapes[name]}
        assert covers_exactly(shapes[name], [tensor.rectangle for tensor in tensors]) is None, name
    for (name, _), tensors in together.items():
        count = {None: 1, "tp": tp, "kv": kv_replicas(model, tp), "tied_embedding": 2}[tensors[0].replicas]
        assert len(tensors) == count, name
        assert len({tensor.rectangle for tensor in tensors}) == 1, name
        assert sum(tensor.owned for tensor in tensors) == 1, name


@pytest.mark.parametrize(("preset", "tp"), [(name, tp) for name, sizes in TP_SIZES.items() for tp in sizes])
def test_query_heads_are_with_their_key_and_value_heads(preset, tp):
    """Attention pairs query head j of a rank with its key and value head j / (queries / keys)."""
    model = ModelConfig(**PRESETS[preset])
    queries = model.num_heads // tp
    for rank in range(tp):
        place = TensorParallel(rank, tp)
        first, count = kv_share(model, place)
        table = parameter_table(model, tp=place)
        (qkv,) = (p for p in table.parameters if p.path == "layers.0.attention.qkv.weight")
        q, k, v = (tensor.rectangle for tensor in qkv.tensors)
        assert (q.start[0], q.extent[0]) == (rank * queries * model.head_dim, queries * model.head_dim)
        assert (k.start[0], k.extent[0]) == (first * model.head_dim, count * model.head_dim)
        assert v == k
        for j in range(queries):
            of_the_whole = (rank * queries + j) * model.num_kv_heads // model.num_heads
            assert first + j * count // queries == of_the_whole


@pytest.mark.parametrize("preset", ["tiny-qwen2", "tiny-qwen3", "tiny-starcoder2"])
@pytest.mark.parametrize(("tp", "pp", "virtual_stages"), [(2, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 1)])
def test_parts_start_with_the_values_of_the_whole(preset, tp, pp, virtual_stages):
    model = tiny_config(preset)
    whole = new_parameters(model, seed=3)
    by_name = {
        tensor.name: values
        for parameter in parameter_table(model).parameters
        for tensor, values in parameter.split(whole[parameter.path].detach())
    }
    for table in tables(model, Layout(pp=pp, tp=tp), virtual_stages).values():
        for parameter in table.parameters:
            values = torch.empty(parameter.shape)
            initialize(parameter, values, 3)
            for tensor, part in parameter.split(values):
                box = zip(tensor.rectangle.start, tensor.rectangle.extent, strict=True)
                expected = by_name[tensor.name][tuple(slice(start, start + extent) for start, extent in box)]
                assert torch.equal(part, expected), tensor.name


def test_the_parameters_come_in_the_order_of_the_forward_pass():
    model = tiny_config("tiny-starcoder2", num_layers=2, tie_embeddings=False)
    paths = [parameter.path for parameter in parameter_table(model).parameters]
    modules = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
    block = ["attention_norm", "attention.qkv", "attention.output", "mlp_norm", "mlp.up", "mlp.down"]
    layers = [f"layers.{layer}.{name}" for layer in range(2) for name in block]
    assert modules == ["embedding", *layers, "norm", "head"]


def test_a_tied_embedding_is_held_by_both_ends_and_by_one_where_they_meet():
    model = tiny_config("tiny-starcoder2")
    at_ends = [table.parameters for table in tables(model, Layout(pp=2), 1).values()]
    tied = [[p for p in parameters if p.path == "embedding.weight"] for parameters in at_ends]
    assert [[(t.replicas, t.owned) for p in found for t in p.tensors] for found in tied] == [
        [("tied_embedding", True)],
        [("tied_embedding", False)],
    ]
    (alone,) = (t for t in parameter_table(model, tp=NO_TP).logical() if t.name == "model.embed_tokens.weight")
    assert (alone.replicas, alone.owned, alone.counts_in_flops) == (None, True, True)
