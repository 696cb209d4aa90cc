"""Which layers are on which pipeline stage.

A model is cut into parts, one after another: one part a stage, or with virtual stages several, dealt out in rounds (part
k is on stage k mod pp). All layers of a model cost the same; what makes parts unequal is the head, which counts as
layers of its own weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """A contiguous part of a decoder.

    Attributes:
        layers: global numbers of its layers; may be empty beside an embedding or a head.
        embeds: turns tokens into hidden states first.
        predicts: ends with the final norm and the head.
    """

    layers: range
    embeds: bool
    predicts: bool


def partition(num_layers: int, num_parts: int, head_cost: float, explicit: Sequence[int] | None = None) -> list[Part]:
    """Cut `num_layers` layers into `num_parts` parts, by cost or as `explicit` says.

    By cost: each layer goes where the least has been laid so far, which is the optimum for equal layers. Between equals
    it goes to the later stage, which keeps fewer microbatches in flight.

    Args:
        head_cost: final norm and head, in layers.

    Raises:
        ConfigError: more parts than layers, or an explicit list that does not fit.
    """
    counts = _by_cost(num_layers, num_parts, head_cost) if explicit is None else list(explicit)
    _require_fit(counts, num_layers, num_parts)
    starts = [sum(counts[:k]) for k in range(num_parts)]
    last = num_parts - 1
    return [Part(range(starts[k], starts[k] + counts[k]), k == 0, k == last) for k in range(num_parts)]


def _by_cost(num_layers: int, num_parts: int, head_cost: float) -> list[int]:
    if num_parts > num_layers:
        raise ConfigError(
            f"parallel.pp × parallel.virtual_stages = {num_parts} parts, but the model has model.num_layers = "
            f"{num_layers} layers; use at most {num_layers} parts, or give stages without layers yourself in "
            "parallel.layers_per_stage"
        )
    counts, costs = [0] * num_parts, [0.0] * num_parts
    costs[-1] = head_cost
    for _ in range(num_layers):
        cheapest = min(range(num_parts), key=lambda k: (costs[k], -k))
        counts[cheapest] += 1
        costs[cheapest] += 1
    return counts


def _require_fit(counts: Sequence[int], num_layers: int, num_parts: int) -> None:
    given = f"parallel.layers_per_stage = {list(counts)}"
    if len(counts) != num_parts:
        raise ConfigError(
            f"{given} has {len(counts)} numbers; parallel.pp × parallel.virtual_stages = {num_parts} are expected"
        )
    if sum(counts) != num_layers:
        raise ConfigError(f"{given} adds up to {sum(counts)}; the model has model.num_layers = {num_layers}")
    if 0 in counts[1:-1]:
        raise ConfigError(f"{given}: only the first part (embedding) and the last (head) can be without layers")
