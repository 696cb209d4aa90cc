"""The staging group gives what gloo gives, through the engine's own calls, and only to those who wait."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel.collectives import all_gather, all_max, all_reduce, gathered, reduce_scatter
from engine.parallel.layout import Layout
from engine.testing.distributed import run_ranks, world_of

DTYPES = (torch.float32, torch.bfloat16)
RANKS = 3


def data(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)  # sums are exact in any order


def collectives() -> dict[str, Tensor]:
    group, rank = dist.group.WORLD, dist.get_rank()
    found: dict[str, Tensor] = {"backend": torch.tensor(dist.get_backend(group) == "staged")}
    for dtype in DTYPES:
        x = data(rank, 2, 5, dtype=dtype)
        found[f"gathered {dtype}"] = gathered(x, group)
        whole = torch.zeros(2 * RANKS, 5, dtype=dtype)
        own = whole.chunk(RANKS)[rank].copy_(x)
        all_gather(whole, own, group).wait()
        found[f"gathered in place {dtype}"] = whole
        for name, start in (("sum", all_reduce), ("max", all_max)):
            start(reduced := x.clone(), group).wait()
            found[f"{name} {dtype}"] = reduced
        long = data(rank, 2 * RANKS, 3, dtype=dtype)
        reduce_scatter(out := torch.empty(2, 3, dtype=dtype), long, group).wait()
        reduce_scatter(own := long.chunk(RANKS)[rank], long, group).wait()
        found[f"scattered {dtype}"], found[f"scattered in place {dtype}"] = out, own
    return found


def test_collectives_give_what_gloo_gives():
    staged, plain = (run_ranks(RANKS, collectives, backend=backend) for backend in ("staged", "gloo"))
    for rank, (got, expected) in enumerate(zip(staged, plain, strict=True)):
        assert (got.pop("backend").item(), expected.pop("backend").item()) == (True, False)
        for name, values in expected.items():
            assert torch.equal(got[name], values), f"{name} of rank {rank}"
    assert torch.equal(staged[0]["sum torch.float32"], sum(data(rank, 2, 5) for rank in range(RANKS)))


def strided_sum() -> Tensor:
    columns = data(dist.get_rank(), 4, 6).t()[::2]
    all_reduce(columns, dist.group.WORLD).wait()
    return columns


def test_a_tensor_need_not_be_contiguous():
    expected = sum(data(rank, 4, 6).t()[::2] for rank in range(2))
    assert all(torch.equal(columns, expected) for columns in run_ranks(2, strided_sum, backend="staged"))


def gathered_in_fp8() -> Tensor:
    return gathered(data(dist.get_rank(), 2, 5).to(torch.float8_e4m3fn), dist.group.WORLD).float()


def test_bytes_are_gathered_whatever_they_stand_for():
    expected = torch.cat([data(rank, 2, 5) for rank in range(2)])
    assert all(torch.equal(whole, expected) for whole in run_ranks(2, gathered_in_fp8, backend="staged"))


def around(dtype: torch.dtype) -> list[Tensor]:
    """Two messages from every rank to the next one, both under way at once, and a blocking one back."""
    rank, group = dist.get_rank(), dist.group.WORLD
    after, before = (rank + 1) % RANKS, (rank - 1) % RANKS
    received = [torch.zeros(3, 4).to(dtype) for _ in range(2)]
    receives = [dist.irecv(tensor, before, group) for tensor in received]
    sent = [(data(rank, 3, 4) + i).to(dtype) for i in range(2)]
    sends = [dist.isend(tensor, after, group) for tensor in sent]
    for tensor in sent:
        tensor.zero_()  # the copy is on its way
    for work in (*receives, *sends):
        work.wait()
    token = torch.full((1,), float(rank))
    if rank == 0:
        dist.send(token, 2, group)
    elif rank == 2:
        dist.recv(token, 0, group)
    return [tensor.float() for tensor in received] + [token]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_messages_arrive_in_order(dtype):
    for rank, (first, second, token) in enumerate(run_ranks(RANKS, around, dtype, backend="staged")):
        expected = data((rank - 1) % RANKS, 3, 4)
        assert torch.equal(first, expected)
        assert torch.equal(second, expected + 1)
        assert token.item() == (0 if rank == 2 else rank)


def before_and_after() -> list[tuple[Tensor, Tensor]]:
    """A result before and after `wait`, and what a second `wait` makes of a tensor that has changed since."""
    rank, group = dist.get_rank(), dist.group.WORLD
    x, out, message = torch.ones(2), torch.zeros(4), torch.zeros(2)
    works = [all_reduce(x, group), all_gather(out, torch.ones(2), group)]
    works.append(dist.isend(torch.ones(2), 1, group) if rank == 0 else dist.irecv(message, 0, group))
    dist.barrier(group)
    early = [tensor.clone() for tensor in (x, out, message)]
    for work in works:
        work.wait()
    late = [tensor.clone() for tensor in (x, out, message)]
    receiving = works[-1]
    message.fill_(7)
    receiving.wait()
    return [*zip(early, late, strict=True), (message, torch.tensor(receiving.is_completed()))]


def test_a_result_is_there_only_after_the_wait():
    for rank, found in enumerate(run_ranks(2, before_and_after, backend="staged")):
        (x, reduced), (out, whole), (message, arrived), (kept, completed) = found
        assert x.tolist() == [1, 1]
        assert reduced.tolist() == [2, 2]
        assert out.tolist() == [0] * 4
        assert whole.tolist() == [1] * 4
        assert message.tolist() == [0, 0]
        assert arrived.tolist() == [rank, rank]
        assert kept.tolist() == [7, 7]
        assert completed.item()


def names_of_groups() -> list[str]:
    world = world_of(Layout(tp=2))
    return [dist.get_backend(group) for group in (world.group, world.tp_group, world.control_group)]


def test_the_groups_of_an_axis_are_staged_and_the_control_group_is_not():
    assert run_ranks(2, names_of_groups, backend="staged") == [["staged", "staged", "gloo"]] * 2


def unknown_call() -> None:
    dist.broadcast(torch.zeros(1), 0)


def test_a_call_that_is_not_staged_is_an_error():
    with pytest.raises(RuntimeError, match="rank 0 failed"):
        run_ranks(2, unknown_call, backend="staged")
