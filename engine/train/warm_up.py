"""The warm-up: every stage computes each of its paths once before the first schedule, with no message under way.

CUDA loads a kernel at its first use, cuBLAS and cuDNN make a plan, torch.compile compiles, the allocator asks for
memory, and for much of it the host waits until its device is idle: inside a schedule, until every posted receive has
its sender. The order of messages makes that safe (docs/communication.md); the warm-up makes it rare, and on a GPU that
ranks share, where one rank's first use waits for the receives of another, it is needed. What follows a complete
gradient (sums over ranks, the optimizer) is not part of it.
Alternative considered: `CUDA_MODULE_LOADING=EAGER`, which loads kernels only; two ranks on one GPU hung with it, too.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from engine.config.schema import Config
from engine.data.samples.batch import ROUND, Batch
from engine.parallel.agreement import gather_ints, run_on_all_ranks
from engine.train.log import RunLog
from engine.train.measure import choose_fp8_algorithms
from engine.train.trainer import Trainer


def warm_up(trainer: Trainer, log: RunLog) -> None:
    """Warm up every stage, where that is of use, and log how long the slowest rank took. A collective.

    Raises:
        TriaxisError: on all ranks, if any rank cannot read its first microbatch.
    """
    world = trainer.world
    if not first_use_waits(world.device):
        return
    trainer.phase = "warming up"
    started = time.perf_counter()
    trainer.optimizer.parameters.finish_gathering()  # as restored or imported weights are gathered
    _wait_for_device(world.device)
    batch = run_on_all_ranks(world, trainer.first_microbatch)
    _use(trainer, batch)
    if choose_fp8_algorithms(trainer.config, world, log):
        _use(trainer, batch)  # they have kernels of their own
    _wait_for_device(world.device)
    # No schedule begins before this: a stage that is done posts nothing while another is still warming up.
    slowest = max(gather_ints(world, round(1000 * (time.perf_counter() - started))))
    log.say(f"warm-up     {slowest / 1000:.1f} s: every stage has computed each of its paths once")


def _use(trainer: Trainer, batch: Batch) -> None:
    for each in paths(batch, trainer.config):
        trainer.model.warm_up(each)


def first_use_waits(device: torch.device) -> bool:
    """Whether the first use of a kernel may wait for the device."""
    return device.type == "cuda"


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paths(batch: Batch, config: Config) -> Iterator[Batch]:
    """Yield `batch`, and where operators choose their path by the data, one that takes the other path.

    Attention depends on whether all segments have one length, the head on whether there are `target_indices`. How many
    documents and targets there are changes from batch to batch; no warm-up covers these shapes.
    """
    yield batch
    other = batch
    if config.data.document_mask:
        other = replace(other, cu_seqlens=_other_segments(batch))
    if config.task == "sft":
        other = replace(other, target_indices=_other_targets(batch))
    if other is not batch:
        yield other


def _other_segments(batch: Batch) -> tuple[int, ...]:
    """Segments of one length (the sequences) if those of `batch` have several, else of several."""
    (b, s), lengths = batch.tokens.shape, {end - start for start, end in pairwise(batch.cu_seqlens)}
    whole = tuple(range(0, b * s + 1, s))
    return whole if len(lengths) > 1 else (0, s // 3, *whole[1:])


def _other_targets(batch: Batch) -> torch.Tensor | None:
    """All positions if `batch` computes logits at some, else as few as `collate` ever chooses."""
    return torch.arange(min(ROUND, batch.tokens.numel())) if batch.target_indices is None else None
