"""Choice of the layout of a run from its configuration and its ranks.

`parallel.tp: auto` and `parallel.pp: auto` choose the smallest tp × pp whose fullest rank fits in 90 % of its memory;
of two equally small, the one with the larger tp; tp divides the ranks of a node. The model is thus sharded no further
than necessary, first over the fast links within a node, and data parallelism, which communicates once per step, uses
all other ranks (Narayanan et al. 2021, arXiv 2104.04473, takeaways 1 and 2). If one of them is explicit, only the other
is chosen.
Alternatives considered: a model of the step time, which would need the speed of every link; and choosing
`parallel.recompute` too, but trading time for memory is left to the user (if nothing fits, the error says whether
recomputing would help).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

from engine.config.derived import microbatches
from engine.config.schema import Config, ModelConfig
from engine.errors import ConfigError, OutOfMemoryError
from engine.model.parameters import tp_problem
from engine.parallel.layout import Layout
from engine.plan.memory import GIB, USABLE, ClusterSpec, estimate, estimate_fullest
from engine.plan.stages import model_parts

_NODE = 8  # ranks of a full node, when a remedy adds ranks to a single node with fewer


def choose_layout(config: Config, ranks: ClusterSpec) -> tuple[Layout, str]:
    """Return the layout of `ranks` and the reason for it. It may not fit in their memory: see `require_fit`.

    Raises:
        ConfigError: no allowed layout works; lists the problems and what would work.
    """
    layouts = _possible(config, ranks)
    sizes = {"tp": config.parallel.tp, "pp": config.parallel.pp}
    automatic = [axis for axis, size in sizes.items() if size == "auto"]
    if not automatic:
        return layouts[0], "as configured" + _crossing(layouts[0], ranks)
    limit = f"{USABLE:.0%} of {ranks.capacity / GIB:.1f} GiB"
    if fitting := _first_fitting(config, layouts, ranks):
        layout, needed = fitting
        reason = f"the smallest tp × pp whose fullest rank, {needed / GIB:.1f} GiB, fits in {limit}"
    else:
        layout = min(layouts, key=lambda layout: _needed(config, layout, ranks))
        needed = _needed(config, layout, ranks)
        reason = f"none fits in {limit}; this one needs least, {needed / GIB:.1f} GiB"
        if needed <= ranks.capacity:
            safer = "; ".join(_remedies(config, ranks))
            reason += ", and may run out" + (f". Safer: {safer}" if safer else "")
    return layout, f"{' and '.join(automatic)} auto: {reason}{_crossing(layout, ranks)}"


def require_fit(config: Config, layout: Layout, ranks: ClusterSpec) -> None:
    """Check that the run fits in memory, before anything is allocated.

    Raises:
        OutOfMemoryError: it does not fit; lists the estimate and what would fit.
    """
    needed = estimate_fullest(config, layout, ranks.dtype, ranks.device_type)
    if needed.total <= ranks.capacity:
        return
    has = "a GPU has" if ranks.device_type == "cuda" else f"each of {ranks.per_node} rank(s) on this machine has"
    problem = f"{_grid(layout)} needs {needed} on its fullest stage, and {has} {ranks.capacity / GIB:.1f} GiB"
    remedies = list(_remedies(config, ranks))
    if ranks.device_type == "cpu":
        remedies.append("model.preset = tiny, to try the engine on a small machine")
    elif not remedies:
        remedies.append("a smaller model; neither recomputing nor 16 times the ranks does")
    raise OutOfMemoryError("\n  ".join([f"{problem}. What would fit:", *remedies]))


def _grid(layout: Layout) -> str:
    return f"tp {layout.tp} × pp {layout.pp} × dp {layout.dp}"


def _possible(config: Config, ranks: ClusterSpec) -> list[Layout]:
    """List the layouts that the configuration allows, in order of tp × pp."""
    tp, pp = config.parallel.tp, config.parallel.pp
    tps = _divisors(ranks.per_node) if tp == "auto" else [tp]
    pps = [n for n in _divisors(ranks.count) if n <= config.model.num_layers] if pp == "auto" else [pp]
    sizes = sorted(product(tps, pps), key=lambda size: (size[0] * size[1], size[1]))
    problems = {size: list(layout_problems(config, ranks.count, *size)) for size in sizes}
    layouts = [Layout(pp=p, dp=ranks.count // (t * p), tp=t) for (t, p), found in problems.items() if not found]
    if layouts:
        return layouts
    (t, p), nearest = min(problems.items(), key=lambda item: len(item[1]))
    tried = f"no layout of {ranks.count} rank(s) works; the nearest, tp {t} × pp {p}, fails because\n  "
    raise ConfigError((tried if "auto" in (tp, pp) else "") + "\n  ".join(nearest))


def _divisors(n: int) -> list[int]:
    return [size for size in range(1, n + 1) if n % size == 0]


def layout_problems(config: Config, world_size: int, tp: int, pp: int) -> Iterator[str]:
    """Yield the problems of a layout, each with what would work."""
    parallel = config.parallel
    if rest := world_size % (tp * pp):
        counts = [n for n in (world_size - rest, world_size - rest + tp * pp) if n]
        yield (
            f"{world_size} rank(s) are not a multiple of parallel.tp × parallel.pp = {tp} × {pp}; "
            f"start {' or '.join(map(str, counts))} ranks, or change parallel.tp or parallel.pp"
        )
    else:
        yield from _problem(lambda: microbatches(config.batch, world_size // (tp * pp)))
    tokens, fp8 = config.batch.micro * config.data.seq_length, config.precision.mode == "fp8"
    if reason := _tp_problem(config.model, tokens, tp, fp8=fp8):
        works = [n for n in range(1, config.model.num_heads + 1) if not _tp_problem(config.model, tokens, n, fp8=fp8)]
        can = (
            f"parallel.tp can be {', '.join(map(str, works))}"
            if works
            else "no other parallel.tp works with these sizes"
        )
        yield f"parallel.tp = {tp} {reason}; {can}"
    if parallel.virtual_stages > 1 and pp == 1:
        yield (
            f"parallel.virtual_stages = {parallel.virtual_stages} needs a pipeline, and parallel.pp = 1; make it 2 or "
            "more, or choose parallel.schedule = 1f1b and parallel.virtual_stages = 1"
        )
    else:
        yield from _problem(lambda: model_parts(config.model, parallel, config.data.seq_length, pp))


def _problem(attempt: Callable[[], object]) -> Iterator[str]:
    try:
        attempt()
    except ConfigError as error:
        yield str(error)


def _tp_problem(model: ModelConfig, tokens: int, tp: int, *, fp8: bool) -> str:
    """Return why `tp` tensor-parallel ranks do not work for a microbatch of `tokens`; empty if they do."""
    if problem := tp_problem(model, tp, **{"batch.micro × data.seq_length": tokens}):
        return problem
    if fp8 and (odd := _no_fp8_sizes(model, tokens, tp)):
        return f"gives matmuls of {' and '.join(odd)}, but FP8 needs multiples of 16"
    return ""


def _no_fp8_sizes(model: ModelConfig, tokens: int, tp: int) -> list[str]:
    """List the dimensions of a rank's linear layers that FP8 matmuls do not support."""
    queries, kv = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    sizes = {
        "tokens (batch.micro × data.seq_length)": tokens,
        "model.hidden_size": model.hidden_size,
        "model.intermediate_size / tp": model.intermediate_size // tp,
        "heads / tp × model.head_dim": queries * model.head_dim,
        "(heads + 2 kv heads) / tp × model.head_dim": (queries + 2 * kv) * model.head_dim,
    }
    return [f"{name} = {value}" for name, value in sizes.items() if value % 16]


def _crossing(layout: Layout, ranks: ClusterSpec) -> str:
    if ranks.per_node % layout.tp == 0:
        return ""
    return f"; tp {layout.tp} spans nodes of {ranks.per_node} rank(s), over slower links"


def _needed(config: Config, layout: Layout, ranks: ClusterSpec) -> int:
    return estimate_fullest(config, layout, ranks.dtype, ranks.device_type).total


def _first_fitting(config: Config, layouts: list[Layout], ranks: ClusterSpec) -> tuple[Layout, int] | None:
    """Return the layout that `auto` chooses, and the memory that its fullest rank needs."""
    limit = USABLE * ranks.capacity
    for layout in layouts:
        stages = (estimate(config, layout, s, ranks.dtype, ranks.device_type) for s in range(layout.pp))
        if all(needed.total <= limit for needed in stages):
            return layout, _needed(config, layout, ranks)
    return None


def _remedies(config: Config, ranks: ClusterSpec) -> Iterator[str]:
    """Yield changes with which the run would fit, one of each kind, with the resulting memory."""
    for changes in _changes(config, ranks):
        for name, changed, more in changes:
            try:
                fitting = _first_fitting(changed, _possible(changed, more), more)
            except ConfigError:
                continue
            if fitting:
                layout, needed = fitting
                yield f"{name}: {needed / GIB:.1f} GiB with {_grid(layout)}"
                break


def _changes(config: Config, ranks: ClusterSpec) -> Iterator[list[tuple[str, Config, ClusterSpec]]]:
    """Yield possible changes, grouped by kind, the smallest change first."""
    parallel = config.parallel
    if "auto" not in (parallel.tp, parallel.pp):
        name = "parallel.tp = auto and parallel.pp = auto"
        yield [(name, _with_parallel(config, tp="auto", pp="auto"), ranks)]
    modes = ["none", "selective", "full"]
    in_all = parallel.recompute_layers is None
    stronger = modes[modes.index(parallel.recompute) + (1 if in_all else 0) :]
    recomputing = {mode: _with_parallel(config, recompute=mode, recompute_layers=None) for mode in stronger}
    yield [(f"parallel.recompute = {mode}", changed, ranks) for mode, changed in recomputing.items()]
    micro, batch = config.batch.micro, config.batch.global_
    smaller = [size for size in range(micro - 1, 0, -1) if batch % size == 0]
    yield [(f"batch.micro = {size}", with_micro(config, size), ranks) for size in smaller]
    if config.optimizer.moments == "fp32":
        optimizer = config.optimizer.model_copy(update={"moments": "bf16"})
        yield [("optimizer.moments = bf16", config.model_copy(update={"optimizer": optimizer}), ranks)]
    if ranks.device_type == "cuda":  # more ranks on this machine's CPU would share its memory
        more = [_grown(ranks, ranks.count * factor) for factor in (2, 4, 8, 16)]
        yield [(f"{grown.count} such ranks", config, grown) for grown in more]


def with_micro(config: Config, micro: int) -> Config:
    """Return `config` with another `batch.micro`."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro": micro})})


def _with_parallel(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})


def _grown(ranks: ClusterSpec, count: int) -> ClusterSpec:
    """Return `ranks` with another count; a single node is filled before nodes are added."""
    one_node = ranks.count <= ranks.per_node
    return replace(ranks, count=count, per_node=min(count, max(_NODE, ranks.per_node)) if one_node else ranks.per_node)
