"""From a configuration and a number of ranks to the layout.

`parallel.tp: auto` and `parallel.pp: auto` follow one rule: the smallest tp × pp whose memory fits, because the model is
cut no further than it must be and communicates least; between equals the larger tp, which stays within a node and has no
bubble. Rejected: a model of the step time, which would need the speed of every link.
"""

from collections.abc import Iterator

import torch

from engine.config import Config, microbatches
from engine.errors import ConfigError
from engine.parallel.layout import Layout
from engine.plan.memory import GIB, estimate_fullest
from engine.plan.stages import parts

_USABLE = 0.9  # of a device's memory; fragmentation and libraries take the rest


def choose_layout(
    config: Config, world_size: int, local_size: int, capacity: int, dtype: torch.dtype, device_type: str
) -> tuple[Layout, str]:
    """The layout of `world_size` ranks, and why it is this one.

    Args:
        local_size: ranks of a node; `auto` keeps tensor parallelism within it.
        capacity: bytes of memory that a rank has.

    Raises:
        ConfigError: what the configuration asks for cannot work with so many ranks.
    """
    tp, pp = config.parallel.tp, config.parallel.pp
    if tp != "auto" and pp != "auto":
        layout = layout_for(config, world_size, tp, pp)
        microbatches(config, layout.dp)
        return layout, "as configured"
    candidates = list(_candidates(config, world_size, local_size))
    if not candidates:
        smallest = layout_for(config, world_size, 1 if tp == "auto" else tp, 1 if pp == "auto" else pp)
        microbatches(config, smallest.dp)
        raise ConfigError(
            f"parallel.tp = {tp} and parallel.pp = {pp}: no layout of {world_size} ranks suits batch.global = "
            f"{config.batch.global_}"
        )
    needs = {layout: estimate_fullest(config, layout, dtype, device_type).total for layout in candidates}
    limit = int(capacity * _USABLE)
    fitting = [layout for layout in candidates if needs[layout] <= limit]
    if not fitting:
        layout = min(candidates, key=lambda layout: needs[layout])
        return layout, f"auto: no layout fits in {_USABLE:.0%} of {capacity / GIB:.0f} GiB, this one comes nearest"
    layout = fitting[0]
    return layout, (
        f"auto: the smallest tp × pp whose fullest rank ({needs[layout] / GIB:.1f} GiB) fits in {_USABLE:.0%} of "
        f"{capacity / GIB:.0f} GiB"
    )


def _candidates(config: Config, world_size: int, local_size: int) -> Iterator[Layout]:
    """Layouts that `auto` may choose, the least cut first."""
    tp, pp = config.parallel.tp, config.parallel.pp
    sizes = [
        (t, p)
        for t in (range(1, local_size + 1) if tp == "auto" else [tp])
        for p in (range(1, config.model.num_layers + 1) if pp == "auto" else [pp])
    ]
    for t, p in sorted(sizes, key=lambda size: (size[0] * size[1], size[1])):
        try:
            layout = layout_for(config, world_size, t, p)
            microbatches(config, layout.dp)
        except ConfigError:
            continue
        yield layout


def layout_for(config: Config, world_size: int, tp: int, pp: int) -> Layout:
    """The grid of `world_size` ranks with `tp` and `pp` given; data parallelism takes the rest.

    Raises:
        ConfigError: with everything that stands against it, and what would work.
    """
    problems = list(_problems(config, world_size, tp, pp))
    if problems:
        raise ConfigError("\n  ".join(problems))
    return Layout(pp=pp, dp=world_size // (tp * pp), tp=tp)


def _problems(config: Config, world_size: int, tp: int, pp: int) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    if world_size % (tp * pp):
        counts = [n * tp * pp for n in (world_size // (tp * pp), world_size // (tp * pp) + 1) if n]
        yield (
            f"{world_size} ranks are not a multiple of parallel.tp × parallel.pp = {tp} × {pp}; "
            f"start {' or '.join(map(str, counts))} ranks, or change parallel.tp or parallel.pp"
        )
    if reason := tp_problem(config, tp):
        sizes = ", ".join(str(n) for n in range(1, model.num_heads + 1) if tp_problem(config, n) is None)
        yield f"{reason}; parallel.tp can be {sizes}"
    if parallel.virtual_stages > 1 and pp == 1:
        yield (
            f"parallel.virtual_stages = {parallel.virtual_stages} needs a pipeline, and parallel.pp = 1; raise the second "
            "or set parallel.virtual_stages = 1 and parallel.schedule = 1f1b"
        )
    try:
        parts(config, pp)
    except ConfigError as error:
        yield str(error)


def tp_problem(config: Config, tp: int) -> str | None:
    """Why the layers cannot be cut for `tp` ranks; None if they can."""
    model = config.model
    tokens = config.batch.micro * config.data.seq_length
    for name, value in (
        ("model.num_heads", model.num_heads),
        ("model.intermediate_size", model.intermediate_size),
        ("batch.micro × data.seq_length", tokens),
    ):
        if value % tp:
            return f"parallel.tp = {tp} does not divide {name} = {value}"
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        return f"parallel.tp = {tp} neither divides model.num_kv_heads = {model.num_kv_heads} nor is a multiple of it"
    return None
