"""What each pipeline stage of a layout holds."""

from engine.config.schema import Config
from engine.model.parameters import parameter_table
from engine.parallel.layout import Layout, TensorParallel
from engine.parallel.pipeline.partition import Part, partition
from engine.parallel.table import ParameterTable


def parts(config: Config, pp: int) -> list[Part]:
    """The parts of the model in order; part k is on stage k mod pp."""
    parallel = config.parallel
    num_parts = pp * parallel.virtual_stages
    return partition(config.model.num_layers, num_parts, head_cost(config), parallel.layers_per_stage)


def stage_parts(config: Config, layout: Layout, stage: int) -> list[Part]:
    """The parts that one pipeline stage holds, one for each of its chunks."""
    return parts(config, layout.pp)[stage :: layout.pp]


def stage_table(config: Config, layout: Layout, rank: int) -> ParameterTable:
    """The table of what `rank` holds."""
    at = layout.coordinates(rank)
    return parameter_table(config.model, stage_parts(config, layout, at.pp), TensorParallel(at.tp, layout.tp))


def head_cost(config: Config) -> float:
    """FLOPs of the head per token, in layers."""
    model = config.model
    one_layer = model.model_copy(update={"num_layers": 1})
    multiplying = parameter_table(one_layer).num_parameters_in_flops - model.vocab_size * model.hidden_size
    attention = config.data.seq_length * model.num_heads * model.head_dim
    return model.vocab_size * model.hidden_size / (multiplying + attention)
