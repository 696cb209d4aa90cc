"""Run functions on real ranks inside a test.

Ranks are forked from a server process that has only imported torch (no threads, no autograd), so a rank starts in a
fraction of a second and never inherits a held lock. They rendezvous through a file. Alternatives considered: torchrun
(seconds per start) and forking the test process itself (inherits its thread pools).
"""

import multiprocessing
import os
import resource
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.parallel.layout import Layout, World, build_process_groups, init_distributed
from engine.testing.hangs import RECORDER_SETTINGS, end_with_traces, leave_traces, read_traces
from engine.testing.staged import STAGED, register_staged

SHARED_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "2"}
"""Environment variables with which ranks share a GPU over NCCL, from 2.30 on: each leaves room for the others."""
_PRELOADED = ["torch", "torch.distributed", "engine.train.run", "engine.testing.distributed"]


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120, backend: str = "gloo"
) -> list[Any]:
    """Call `function(*arguments)` on every rank of a new world and return the results by rank.

    `function` must be importable by name. RANK and WORLD_SIZE are set as torchrun does; with several ranks, the default
    process group is initialized.

    Args:
        backend: "gloo", "nccl", or "staged" (`engine/testing/staged.py`); with the last two, ranks may share a GPU.

    Raises:
        RuntimeError: a rank failed, died or timed out; the message contains its traceback, or the stacks of its threads
            and its last calls to other ranks.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        pipes: list[Connection] = []
        processes: list[ForkServerProcess] = []
        for rank in range(world_size):
            receiver, sender = context.Pipe()
            target = (sender, rank, world_size, Path(directory), backend, function, arguments)
            process = context.Process(target=_run_rank, args=target, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            results, problems = _collect(pipes, processes, timeout_s)
            if problems:
                _end(Path(directory), {rank: processes[rank] for rank in problems.keys() - results.keys()})
                raise RuntimeError("\n".join(_reported(Path(directory), rank, problems) for rank in sorted(problems)))
            return [results[rank] for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def join_ranks(backend: str, store: Path, rank: int, world_size: int) -> None:
    """Initialize the default process group of a rank, which meets the others at the file `store`."""
    if backend == STAGED:
        register_staged()
    if backend != "gloo":
        os.environ.update(SHARED_GPU)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)


def world_of(layout: Layout | None = None, *, kv_replicas: int = 1, device: str = "cpu") -> World:
    """Return the calling rank's world in `layout`; by default all ranks are data-parallel. A collective."""
    world = init_distributed(device)
    return build_process_groups(world, layout or world.layout, kv_replicas=kv_replicas)


def _collect(
    pipes: list[Connection], processes: list[ForkServerProcess], timeout_s: float
) -> tuple[dict[int, Any], dict[int, str]]:
    """Collect results and problems by rank. After one fails, wait two more seconds for errors of the others."""
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
    return results, problems


def _end(directory: Path, processes: Mapping[int, ForkServerProcess]) -> None:
    """End the ranks that may hang, so that they leave traces."""
    end_with_traces(directory, {rank: process.pid for rank, process in processes.items() if process.pid is not None})
    for process in processes.values():
        process.join(5)


def _reported(directory: Path, rank: int, problems: dict[int, str]) -> str:
    return "\n".join(filter(None, [f"rank {rank} failed:\n{problems[rank]}", read_traces(directory, rank)]))


def _run_rank(
    sender: Connection,
    rank: int,
    world_size: int,
    directory: Path,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(RECORDER_SETTINGS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an aborted rank leaves its stacks, not its memory
    leave_traces(directory, rank)
    torch.set_num_threads(1)
    try:
        if world_size > 1:
            join_ranks(backend, directory / "store", rank, world_size)
        sender.send((None, function(*arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    sender.poll(
        None
    )  # tensors are sent through shared memory: wait until the caller has read them and ends this process
