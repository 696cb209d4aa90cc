"""Run functions on real gloo ranks inside a test.

Ranks are forked from a server process that has only imported torch (no threads, no autograd), so a rank starts in a
fraction of a second and never inherits a held lock. They rendezvous through a file. Alternatives considered: torchrun
(seconds per start) and forking the test process itself (inherits its thread pools).
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.parallel.layout import Layout, World, build_process_groups, init_distributed

_PRELOADED = ["torch", "torch.distributed", "engine.train.run", "engine.testing.distributed"]


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """Call `function(*arguments)` on every rank of a gloo world and return the results by rank.

    `function` must be importable by name. RANK and WORLD_SIZE are set as torchrun does; with several ranks, the default
    process group is initialized.

    Raises:
        RuntimeError: a rank failed or timed out; the message contains its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        pipes: list[Connection] = []
        processes: list[ForkServerProcess] = []
        for rank in range(world_size):
            receiver, sender = context.Pipe()
            target = (sender, rank, world_size, Path(directory) / "store", function, arguments)
            process = context.Process(target=_run_rank, args=target, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def world_of(layout: Layout | None = None, *, kv_replicas: int = 1) -> World:
    """Return the calling rank's world in `layout`; by default all ranks are data-parallel. A collective."""
    world = init_distributed("cpu")
    return build_process_groups(world, layout or world.layout, kv_replicas=kv_replicas)


def _collect(pipes: list[Connection], processes: list[ForkServerProcess], timeout_s: float) -> list[Any]:
    """Collect every rank's result. After one fails, wait two more seconds for errors of the others."""
    results: dict[int, Any] = {}
    problems: dict[int, str] = {}
    while waiting := [rank for rank in range(len(pipes)) if rank not in results]:
        ready = wait([pipes[rank] for rank in waiting], 2 if problems else timeout_s)
        if not ready:
            problems |= {rank: f"has not finished within {timeout_s} s" for rank in waiting if not problems}
            break
        for rank in (rank for rank in waiting if pipes[rank] in ready):
            try:
                problem, results[rank] = pipes[rank].recv()
            except EOFError:
                processes[rank].join()
                problem, results[rank] = f"died without an error message, exit code {processes[rank].exitcode}", None
            if problem is not None:
                problems[rank] = problem
    if problems:
        raise RuntimeError("\n".join(f"rank {rank} failed:\n{problems[rank]}" for rank in sorted(problems)))
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    sender: Connection,
    rank: int,
    world_size: int,
    store: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    try:
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        sender.send((None, function(*arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    sender.poll(
        None
    )  # tensors are sent through shared memory: wait until the caller has read them and ends this process
