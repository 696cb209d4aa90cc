import random
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.parallel.collectives import (
    Work,
    all_gather,
    all_reduce,
    gather_sequence,
    reduce_scatter,
    scatter_sequence_sum,
)
from engine.testing.distributed import run_ranks

K, COLUMNS = 5, 3  # of a rank's part
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.03, torch.float64: 1e-12, torch.int64: 0}


def values(rank: int, rows: int, dtype: torch.dtype, columns: int = COLUMNS) -> Tensor:
    """What `rank` contributes; every rank can compute it."""
    generator = torch.Generator().manual_seed(rank)
    if dtype == torch.int64:
        return torch.randint(-(1 << 40), 1 << 40, (rows, columns), generator=generator)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator).to(dtype)


def total(addends: list[Tensor]) -> Tensor:
    exact = torch.stack(addends)
    return (exact if exact.dtype == torch.int64 else exact.double()).sum(0)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


def come(late: int) -> None:
    """Let one rank come late: whoever does not wait for it, or for what it still has to read, is found out."""
    if dist.get_rank() == late:
        time.sleep(0.02)


def gathered(late: int, dtype: torch.dtype, in_place: bool) -> Tensor:
    n, rank = dist.get_world_size(), dist.get_rank()
    out, x = torch.zeros(n * K, COLUMNS, dtype=dtype), values(rank, K, dtype)
    x = out[rank * K : (rank + 1) * K].copy_(x) if in_place else x
    come(late)
    all_gather(out, x, dist.group.WORLD).wait()
    result = out.clone()
    x.zero_()  # what a late rank must have by now
    return result


def reduced_and_scattered(late: int, dtype: torch.dtype, in_place: bool) -> Tensor:
    n, rank = dist.get_world_size(), dist.get_rank()
    x = values(rank, n * K, dtype)
    out = x[rank * K : (rank + 1) * K] if in_place else torch.zeros(K, COLUMNS, dtype=dtype)
    come(late)
    reduce_scatter(out, x, dist.group.WORLD).wait()
    assert in_place or torch.equal(x, values(rank, n * K, dtype)), "the addends are the caller's"
    result = out.clone()
    x.zero_()
    return result


def reduced(late: int, dtype: torch.dtype) -> Tensor:
    x = values(dist.get_rank(), K, dtype)
    come(late)
    all_reduce(x, dist.group.WORLD).wait()
    return x


def check_values() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    for dtype in TOLERANCE:
        everything = torch.cat([values(i, K, dtype) for i in range(n)])
        for late in (0, n - 1):
            for in_place in (False, True):
                assert torch.equal(gathered(late, dtype, in_place), everything)
        sums = [reduced_and_scattered(late, dtype, in_place) for late in (0, n - 1) for in_place in (False, True)]
        assert_close(sums[0], total([values(i, n * K, dtype) for i in range(n)])[rank * K : (rank + 1) * K])
        assert all(torch.equal(sums[0], other) for other in sums), "repeats bitwise"
        sums = [reduced(late, dtype) for late in (0, n - 1)]
        assert_close(sums[0], total([values(i, K, dtype) for i in range(n)]))
        assert all(torch.equal(sums[0], other) for other in sums), "repeats bitwise"
        dist.broadcast(sums[0], src=0)
        assert torch.equal(sums[0], sums[-1]), "bitwise equal on all ranks"


def check_group_of_one() -> None:
    rank = dist.get_rank()
    group = [dist.new_group([i]) for i in range(dist.get_world_size())][rank]
    x, out = values(rank, K, torch.float32), torch.zeros(2, K, COLUMNS)
    all_gather(out[0], x, group).wait()
    reduce_scatter(out[1], x, group).wait()
    all_reduce(x, group).wait()
    assert torch.equal(out, values(rank, K, torch.float32).expand(2, K, COLUMNS))
    assert torch.equal(x, out[0])
    reduce_scatter(x, x, group).wait()
    all_gather(x, x, group).wait()
    assert torch.equal(x, out[0])


def started(kind: int, seed: int, rows: int, group: ProcessGroup) -> tuple[Work, Tensor, Tensor]:
    """An operation under way, where its result will be, and what it must be."""
    n, rank, ranks = group.size(), group.rank(), dist.get_process_group_ranks(group)
    mine = slice(rank * rows, (rank + 1) * rows)
    if kind == 0:
        out = torch.zeros(n * rows, COLUMNS, dtype=torch.int64)
        pending = all_gather(out, values(seed + ranks[rank], rows, torch.int64), group)
        return pending, out, torch.cat([values(seed + i, rows, torch.int64) for i in ranks])
    addends = [values(seed + i, n * rows, torch.int64) for i in ranks]
    if kind == 1:
        out = addends[rank].clone()
        return all_reduce(out, group), out, total(addends)
    x = addends[rank].clone()
    out = x[mine] if seed % 2 else torch.zeros(rows, COLUMNS, dtype=torch.int64)
    return reduce_scatter(out, x, group), out, total(addends)[mine]


def check_many_at_once() -> None:
    """All kinds in several groups, with work in between, waited for in an order that differs from rank to rank."""
    n, rank = dist.get_world_size(), dist.get_rank()
    ends = dist.new_group([0, n - 1])
    groups = [dist.group.WORLD, dist.new_group(), *([ends] if rank in (0, n - 1) else [])]
    operations = []
    for i in range(9):
        come(i % n)
        operations += [started(i % 3, 100 * i + i // 3, 1 + 4000 * (i % 2), group) for group in groups]
        torch.randn(128, 128) @ torch.randn(128, 128)
    random.Random(rank).shuffle(operations)
    for pending, out, expected in operations:
        pending.wait()
        assert torch.equal(out, expected)


def check_native_path() -> None:
    """What NCCL is asked for, asked of gloo's native collectives."""
    backend, dist.get_backend = dist.get_backend, lambda group: "nccl"
    try:
        for in_place in (False, True):
            n, rank = dist.get_world_size(), dist.get_rank()
            everything = torch.cat([values(i, K, torch.float64) for i in range(n)])
            assert torch.equal(gathered(n - 1, torch.float64, in_place), everything)
            expected = total([values(i, n * K, torch.float64) for i in range(n)])[rank * K : (rank + 1) * K]
            assert_close(reduced_and_scattered(n - 1, torch.float64, in_place), expected)
    finally:
        dist.get_backend = backend


def check_everything() -> None:
    check_values()
    check_group_of_one()
    check_many_at_once()
    check_native_path()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives_between_real_ranks(ranks):
    run_ranks(ranks, check_everything)


T, H, F = 12, 4, 24  # tokens and features that 2, 3 and 4 divide, hidden size


def feed_forward_loss(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, group: ProcessGroup | None) -> Tensor:
    """Column- then row-parallel: x and weights [t/n, h], up [h, f/n], down [f/n, h] give a share of the loss."""
    out = scatter_sequence_sum(torch.tanh(gather_sequence(x, group) @ up) @ down, group)
    return (out.sin() * weights).sum()


def whole_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((H, T), (H, F), (F, H), (T, H))
    x, *others = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return [x.t(), *others]  # not contiguous


def check_gradients() -> None:
    n, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    whole = [tensor.requires_grad_() for tensor in whole_inputs()]
    plain = feed_forward_loss(*whole, None)
    expected = torch.autograd.grad(plain, whole)
    dims = (0, 1, 0, 0)
    mine = [tensor.detach().chunk(n, dim)[rank].requires_grad_() for tensor, dim in zip(whole, dims, strict=True)]
    loss = feed_forward_loss(*mine, group)
    gradients = torch.autograd.grad(loss, mine)
    for gradient, full, dim in zip(gradients, expected, dims, strict=True):
        assert_close(gradient, full.chunk(n, dim)[rank])
    assert_close(summed(loss.detach()), plain.detach())
    slope = summed(sum((gradient * direction(gradient)).sum() for gradient in gradients))
    ahead, behind = (
        summed(feed_forward_loss(*[tensor.detach() + step * direction(tensor) for tensor in mine], group))
        for step in (1e-5, -1e-5)
    )
    torch.testing.assert_close((ahead - behind) / 2e-5, slope, rtol=1e-7, atol=0)


def direction(tensor: Tensor) -> Tensor:
    return torch.linspace(-1, 2, tensor.numel(), dtype=torch.float64).view(tensor.shape)


def summed(share: Tensor) -> Tensor:
    total = share.detach().clone()
    dist.all_reduce(total)
    return total


def check_gradients_without_memory_of_their_own() -> None:
    n, group = dist.get_world_size(), dist.group.WORLD
    x = torch.ones(n * K, COLUMNS, requires_grad=True)
    gather_sequence(x, group).sum().backward()  # an expanded scalar arrives
    assert torch.equal(x.grad, torch.full_like(x, n))
    x.grad = None
    scatter_sequence_sum(x, group).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def check_differentiable() -> None:
    check_gradients()
    check_gradients_without_memory_of_their_own()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gradients_are_those_of_one_process(ranks):
    run_ranks(ranks, check_differentiable)


def test_one_rank_keeps_its_tensor():
    x = torch.ones(2, 3)
    assert gather_sequence(x, None) is x
    assert scatter_sequence_sum(x, None) is x
