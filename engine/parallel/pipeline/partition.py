"""Which layers are on which pipeline stage.

A model is cut into parts, one after another: one part a stage, or with virtual stages several, dealt out in rounds
(part k is on stage k mod pp). All layers of a model cost the same; what makes parts unequal is the head, which counts
as layers of its own weight. The embedding looks up rows and costs next to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from engine.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """A contiguous part of a decoder.

    Attributes:
        layers: global numbers of its layers; may be empty in a part with the embedding or the head.
        has_embedding: it starts with the embedding.
        has_head: it ends with the final norm and the head.
    """

    layers: range
    has_embedding: bool
    has_head: bool


def partition(num_layers: int, num_parts: int, head_cost: float, explicit: Sequence[int] | None = None) -> list[Part]:
    """Cut `num_layers` layers into `num_parts` parts, by cost or as `explicit` says.

    By cost: each layer goes where the least has been laid so far, which is the optimum for equal layers. Between equals
    it goes to the later stage, which keeps fewer microbatches in flight.

    Args:
        head_cost: final norm and head, in layers.

    Raises:
        ConfigError: more parts than layers and no explicit list, or one that does not fit.
    """
    if explicit is None:
        counts = _by_cost(num_layers, num_parts, head_cost)
    else:
        counts = list(explicit)
        _require_fit(counts, num_layers, num_parts)
    starts = [sum(counts[:k]) for k in range(num_parts)]
    last = num_parts - 1
    return [Part(range(starts[k], starts[k] + counts[k]), k == 0, k == last) for k in range(num_parts)]


def _by_cost(num_layers: int, num_parts: int, head_cost: float) -> list[int]:
    if num_parts > num_layers:
        raise ConfigError(
            f"parallel.pp × parallel.virtual_stages = {num_parts} parts are more than model.num_layers = {num_layers}; "
            f"make it at most {num_layers}, or name stages without layers yourself in parallel.layers_per_stage"
        )
    counts = [0] * num_parts
    costs = [(head_cost if k == num_parts - 1 else 0.0, -k) for k in range(num_parts)]
    heapify(costs)
    for _ in range(num_layers):
        cost, negated = costs[0]
        counts[-negated] += 1
        heapreplace(costs, (cost + 1, negated))
    return counts


def _require_fit(counts: Sequence[int], num_layers: int, num_parts: int) -> None:
    wrong = []
    if len(counts) != num_parts:
        wrong.append(f"has {len(counts)} numbers, and parallel.pp × parallel.virtual_stages = {num_parts}")
    if sum(counts) != num_layers:
        wrong.append(f"adds up to {sum(counts)}, and model.num_layers = {num_layers}")
    if 0 in counts[1:-1]:
        wrong.append("has a part without layers that is neither the first (embedding) nor the last (head)")
    if wrong:
        raise ConfigError(
            f"parallel.layers_per_stage = {list(counts)} {'; it '.join(wrong)}; null divides the layers by cost"
        )
