"""The proof that the ranks of a layout cannot hang: record them, hold their programs against each other, run them.

Most ranks of a large layout run the same program as others, with other peers. `distinct_ranks` has one of each kind and
one peer of it on every axis, so a layout of 1,024 ranks is proven with a few; `problems` then compares the peers, which
would show a program that depends on more than the kind.
"""

import multiprocessing
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product

import torch

from engine.config.schema import Config
from engine.model.parameters import parameter_table
from engine.parallel.layout import Coordinates, Layout, TensorParallel
from engine.plan.stages import stage_parts
from engine.testing.communication import CHECKS, Record, problems
from engine.testing.recorded import record_training
from engine.testing.simulator import MODES, Mode, find_hang

# Shares of the ranks for each process, so that progress shows and no process ends long before the others. Not one for
# each rank: every share builds the schedule and proves it.
_SHARES = 8


def distinct_ranks(config: Config, layout: Layout) -> list[int]:
    """Every kind of rank of `layout`, and a peer of each on every axis; in order.

    All stages differ. Tensor-parallel ranks are of one kind where their parameters have the same shapes on all stages.
    Data-parallel ranks all are: their shards have one size.
    """
    kinds: dict[object, list[int]] = defaultdict(list)
    for rank in range(layout.tp):
        kinds[_shapes(config, layout, rank)].append(rank)
    tensor = sorted(rank for ranks in kinds.values() for rank in ranks[:2])
    at = product(range(layout.pp), range(min(layout.dp, 2)), tensor)
    return [layout.rank_at(Coordinates(pp=pp, dp=dp, cp=0, tp=tp)) for pp, dp, tp in at]


def _shapes(config: Config, layout: Layout, rank: int) -> tuple[object, ...]:
    """What a tensor-parallel rank holds, on every stage."""
    tp = TensorParallel(rank, layout.tp)
    stages = (
        stage_parts(config.model, config.parallel, config.data.seq_length, layout.pp, stage)
        for stage in range(layout.pp)
    )
    tables = [parameter_table(config.model, parts, tp) for parts in stages]
    return tuple((parameter.path, parameter.shape) for table in tables for parameter in table.parameters)


def record_in_processes(
    config: Config, layout: Layout, ranks: Sequence[int], *, steps: int, processes: int
) -> Iterator[list[Record]]:
    """Record ranks on the meta device, a share at a time, in as many processes; yields the records of each share."""
    size = max(2, -(-len(ranks) // (_SHARES * processes)))
    shares = [ranks[first : first + size] for first in range(0, len(ranks), size)]
    if processes == 1:
        yield from (_record(config, layout, steps, share) for share in shares)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "engine.testing.proof"])
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(_record, config, layout, steps, share) for share in shares]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _record(config: Config, layout: Layout, steps: int, ranks: Sequence[int]) -> list[Record]:
    torch.set_num_threads(1)
    return record_training(config, layout, steps=steps, ranks=ranks, device="meta")


def failures(
    records: Sequence[Record],
    *,
    checks: Collection[str] = tuple(CHECKS),
    modes: Sequence[Mode] = MODES,
    symmetric: bool = False,
) -> list[str]:
    """The problems that `checks` find in records, and in each of `modes` who hangs; see `problems` and `find_hang`."""
    hanging = [found for mode in modes if (found := find_hang(records, mode)) is not None]
    return problems(records, checks=checks, symmetric=symmetric) + hanging
