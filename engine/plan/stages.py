"""Parts of the model on each pipeline stage of a layout."""

from engine.config.schema import ModelConfig, ParallelConfig
from engine.model.parameters import parameter_table
from engine.parallel.pipeline.partition import Part, partition


def model_parts(model: ModelConfig, parallel: ParallelConfig, seq_length: int, pp: int) -> list[Part]:
    """Partition the model for `pp` stages, in model order; part k is on stage k mod pp.

    Raises:
        ConfigError: the layers cannot be partitioned as configured.
    """
    num_parts = pp * parallel.virtual_stages
    return partition(model.num_layers, num_parts, head_cost(model, seq_length), parallel.layers_per_stage)


def stage_parts(model: ModelConfig, parallel: ParallelConfig, seq_length: int, pp: int, stage: int) -> list[Part]:
    """Return the parts of the model on stage `stage` of `pp`, one per chunk."""
    return model_parts(model, parallel, seq_length, pp)[stage::pp]


def head_cost(model: ModelConfig, seq_length: int) -> float:
    """Return the FLOPs of the output head per token, in units of one layer."""
    one_layer = model.model_copy(update={"num_layers": 1})
    head = model.vocab_size * model.hidden_size
    attention = seq_length * model.num_heads * model.head_dim
    return head / (parameter_table(one_layer).num_parameters_in_flops - head + attention)
