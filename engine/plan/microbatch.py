"""The rule for `batch.micro`: which microbatch sizes are possible, the memory and speed of each, and the one to take.

A larger microbatch makes a step of the same batch faster: fewer passes read the weights and add to the fp32 gradients.
It keeps more activations, and a pipeline fills with fewer microbatches, so its bubble grows. The rule takes the
smallest size within 2 % of the fastest that fits. It does not recompute to make room, which costs more than is gained.
Alternative considered: `batch.micro: auto`. The size decides in which order gradients are summed, so a run resumed on
other GPUs would no longer be bitwise the same; the data loader and the choice of a layout need it first; and it would
decide for a few percent what one line in the configuration says.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config.derived import microbatches
from engine.config.schema import Config
from engine.parallel.layout import Layout
from engine.plan.layouts import layout_problems, with_micro
from engine.plan.memory import GIB, USABLE, ClusterSpec, estimate_fullest
from engine.plan.throughput import step_seconds

_TIGHT = 0.98  # fraction of a GPU's memory; peaks up to it were measured, with expandable segments: tests/plan
_WORTH = 1.02  # times faster
_EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


@dataclass(frozen=True)
class MicrobatchSize:
    """A possible `batch.micro`.

    Attributes:
        micro: sequences per microbatch.
        count: microbatches per rank and step.
        needed: estimated bytes of the fullest rank.
        seconds: predicted time of a step; only ratios mean something.
    """

    micro: int
    count: int
    needed: int
    seconds: float


def microbatch_sizes(config: Config, layout: Layout, ranks: ClusterSpec) -> list[MicrobatchSize]:
    """List the sizes that this layout allows, up to the first that does not fit and to the configured one."""
    share = config.batch.micro * microbatches(config.batch, layout.dp)
    sizes: list[MicrobatchSize] = []
    for micro in (n for n in range(1, share + 1) if share % n == 0):
        if sizes and sizes[-1].needed > ranks.capacity and micro > config.batch.micro:
            break
        changed = with_micro(config, micro)
        if any(layout_problems(changed, layout.world_size, layout.tp, layout.pp)):
            continue
        needed = estimate_fullest(changed, layout, ranks.dtype, ranks.device_type).total
        sizes.append(MicrobatchSize(micro, share // micro, needed, step_seconds(changed, layout)))
    return sizes


def recommended(sizes: list[MicrobatchSize], limit: float) -> MicrobatchSize | None:
    """Return the smallest of `sizes` within 2 % of the fastest that fits in `limit` bytes; None if none does."""
    fitting = [size for size in sizes if size.needed <= limit]
    fastest = min((size.seconds for size in fitting), default=0.0)
    return next((size for size in fitting if size.seconds <= _WORTH * fastest), None)


def memory_limit(config: Config, ranks: ClusterSpec) -> float:
    """Return the bytes that a recommended size may take: with `auto` sizes of the layout those with which `auto` keeps
    this layout.
    """
    chooses_layout = "auto" in (config.parallel.tp, config.parallel.pp)
    return (USABLE if chooses_layout else _TIGHT) * ranks.capacity


def describe_microbatches(config: Config, layout: Layout, ranks: ClusterSpec) -> Iterator[str]:
    """Yield a table of the possible sizes and what the rule recommends; nothing for CPUs, where no speed is known."""
    if ranks.device_type != "cuda":
        return
    sizes = microbatch_sizes(config, layout, ranks)
    now = next(size for size in sizes if size.micro == config.batch.micro)
    yield "microbatch  batch.micro  microbatches  peak GiB  free GiB  predicted speed"
    for size in sizes:
        free = (ranks.capacity - size.needed) / GIB
        notes = [_fit(size, ranks.capacity)] + ["configured"] * (size is now)
        row = f"{size.micro:11}  {size.count:12}  {size.needed / GIB:8.1f}  {free:8.1f}  {_speed(size, now)}"
        yield f"{'':12}{row}  {', '.join(filter(None, notes))}".rstrip()
    yield from (f"{'':12}{line}" for line in _advice(config, layout, ranks, sizes, now))


def _speed(size: MicrobatchSize, now: MicrobatchSize) -> str:
    return f"{now.seconds / size.seconds:.2f}×"


def _fit(size: MicrobatchSize, capacity: int) -> str:
    if size.needed > capacity:
        return "does not fit"
    return "tight" if size.needed > USABLE * capacity else ""


def _advice(
    config: Config, layout: Layout, ranks: ClusterSpec, sizes: list[MicrobatchSize], now: MicrobatchSize
) -> Iterator[str]:
    limit = memory_limit(config, ranks)
    best = recommended(sizes, limit)
    if best is None:
        return  # `require_fit` says what would fit, or the choice of the layout what is safer
    if now.needed <= limit and now.seconds <= _WORTH * best.seconds:
        best = now
        only = sum(size.needed <= limit for size in sizes) == 1
        verdict = "the only one that fits" if only else "within 2% of the fastest that fits"
        yield f"batch.micro = {now.micro} is {verdict}"
    else:
        memory = f"{best.needed / GIB:.1f} of {ranks.capacity / GIB:.1f} GiB"
        yield f"recommended: batch.micro = {best.micro}, {_speed(best, now)} the speed by a model of one H200, {memory}"
    if best.needed > USABLE * ranks.capacity:
        yield f"batch.micro = {best.micro} is tight (more than {USABLE:.0%}): set {_EXPANDABLE}"
    larger = next((size for size in sizes if size.seconds * _WORTH < best.seconds and size.needed > limit), None)
    if larger and config.optimizer.moments == "fp32":
        smaller = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"moments": "bf16"})})
        needed = estimate_fullest(with_micro(smaller, larger.micro), layout, ranks.dtype, ranks.device_type).total
        if needed <= limit:
            both = f"batch.micro = {larger.micro} and optimizer.moments = bf16"
            yield f"with {both}: {_speed(larger, now)} the speed, {needed / GIB:.1f} GiB"
