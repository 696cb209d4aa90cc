"""Decisions that all ranks make together, on the host.

If a single rank stops, fails or decides, the others wait for it forever, so such decisions are made from a few numbers
that are the same on every rank. These are exchanged over `World.control_group` and do not wait for the device.
Every function here is a collective, to be called by all ranks in the same order; with one rank it is the identity.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from engine.errors import TriaxisError, as_triaxis_error, error_of
from engine.parallel.layout import World, shutdown_distributed

T = TypeVar("T")


def sum_ints(world: World, numbers: Sequence[int]) -> list[int]:
    """Element-wise sum over all ranks; every rank gives equally many numbers."""
    if world.control_group is None:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(total, group=world.control_group)
    return total.tolist()


def gather_ints(world: World, number: int) -> list[int]:
    """The number of each rank, in the order of the ranks."""
    return sum_ints(world, [number * (rank == world.rank) for rank in range(world.layout.world_size)])


def broadcast_ints(world: World, numbers: Sequence[int]) -> list[int]:
    """Rank 0's numbers, on every rank; what the others give is ignored."""
    if world.control_group is None:
        return list(numbers)
    count = torch.tensor(len(numbers))
    dist.broadcast(count, src=0, group=world.control_group)
    content = torch.tensor(numbers) if world.is_main else torch.empty(int(count), dtype=torch.int64)
    dist.broadcast(content, src=0, group=world.control_group)
    return content.tolist()


def first_problem(world: World, problem: str | None) -> str | None:
    """The problem of the lowest rank that has one, or None; the same answer on every rank."""
    if world.control_group is None:
        return problem
    text = b"" if problem is None else problem.encode()
    lengths = gather_ints(world, len(text))
    speaker = next((rank for rank, length in enumerate(lengths) if length), None)
    if speaker is None:
        return None
    message = torch.zeros(lengths[speaker], dtype=torch.uint8)
    if world.rank == speaker:
        message = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(message, src=speaker, group=world.control_group)
    return bytes(message.tolist()).decode()


def run_on_all_ranks(world: World, action: Callable[[], T]) -> T:
    """This rank's result of `action`, if it worked on every rank.

    Raises:
        TriaxisError: on all ranks, of the class and with the message of the lowest rank where it failed.
        Exception: on this rank only, a bug in the program, which ends it with a traceback.
    """
    failure: TriaxisError | None = None
    try:
        result = action()
    except Exception as error:
        failure = as_triaxis_error(error)
        if failure is None:
            raise
    codes = gather_ints(world, failure.exit_code if failure else 0)
    code = next((code for code in codes if code), None)
    if code is None:
        return result
    prefix = f"rank {world.rank}: " if len(codes) > 1 else ""
    text = first_problem(world, None if failure is None else f"{prefix}{failure}")
    raise on_all_ranks(world, error_of(code, text or ""))


def compute_once(
    world: World, keys: Sequence[int], compute: Callable[[int], Sequence[int]], size: int
) -> list[list[int]]:
    """The results for this rank's `keys`, each computed by the lowest rank that has the key.

    Args:
        keys: positive and distinct; other ranks may have others.
        compute: takes an index of `keys` and returns `size` integers.

    Raises:
        TriaxisError: on all ranks, if `compute` raises one on any rank.
    """
    longest = max(gather_ints(world, len(keys)))
    if longest == 0:
        return []
    mine, owners = [*keys, *[0] * (longest - len(keys))], dict[int, int]()
    ranks = range(world.layout.world_size)
    for place, key in enumerate(sum_ints(world, [key * (rank == world.rank) for rank in ranks for key in mine])):
        if key:
            owners.setdefault(key, place // longest)
    owned = [index for index, key in enumerate(keys) if owners[key] == world.rank]
    computed = run_on_all_ranks(world, lambda: {keys[index]: compute(index) for index in owned})
    numbers = sum_ints(world, [number for key in owners for number in computed.get(key, [0] * size)])
    results = {key: numbers[i * size : (i + 1) * size] for i, key in enumerate(owners)}
    return [results[key] for key in keys]


def on_all_ranks(world: World, error: TriaxisError) -> TriaxisError:
    """Mark an error that all ranks raise together, so that it is printed once."""
    error.reported_elsewhere, error.is_shared = not world.is_main, True
    return error


@contextmanager
def leave_together(world: World, position: Callable[[], str]) -> Iterator[None]:
    """Shut down the process groups after the body, or after an error that all ranks raise together.

    An error of this rank alone gets a note with the rank, its host and its position, and leaves the process groups as
    they are: their shutdown can wait for peers, which wait for this rank. `engine.errors.run_program` then reports the
    error and ends the process without them.

    Args:
        position: where this rank is in the program; may be empty.
    """
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, TriaxisError) and error.is_shared):
            rank = f"rank {world.rank} ({socket.gethostname()})" if world.layout.world_size > 1 else ""
            error.add_note(", ".join(filter(None, (rank, position()))))
            raise
        shutdown_distributed()
        raise
    shutdown_distributed()
