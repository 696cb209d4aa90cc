from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F

from engine.ops import cross_entropy
from engine.ops.cross_entropy import (
    VocabularyShard,
    WeightSink,
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from engine.parallel.layout import TensorParallel
from tests.ops.op_parity import FP32, assert_same


@pytest.fixture(autouse=True, params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    if request.param == "many chunks":
        monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS_CPU", 1)  # 64 tokens at a time


def example(tokens: int, hidden: int = 24, vocab: int = 101) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    mask = (torch.rand(tokens) > 0.3).float()
    labels = torch.randint(0, vocab, (tokens,))
    return torch.randn(tokens, hidden), torch.randn(vocab, hidden) / 3, labels, mask


def both(labels: torch.Tensor, mask: torch.Tensor, z_loss: float = 0.0, softcap: float | None = None) -> tuple:
    options = {"z_loss": z_loss, "softcap": softcap}
    return (
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, mask, **options),
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, labels, mask, **options),
    )


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 200])
def test_equals_its_reference(tokens):
    hidden, weight, labels, mask = example(tokens)
    assert_same(*both(labels, mask), [hidden, weight], torch.tensor(0.37), **FP32)


def test_large_products_equal_the_reference():
    hidden, weight, labels, mask = example(600, 128, 1003)  # these go through oneDNN
    assert_same(*both(labels, mask), [hidden, weight], **FP32)


def test_equals_pytorch():
    hidden, weight, labels, mask = example(130)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")[mask > 0].sum()
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, mask), expected)


@pytest.mark.parametrize("masked_label", [-100, -1, 0, 100])
def test_labels_do_not_matter_where_masked(masked_label):
    hidden, weight, labels, mask = example(130)
    op = both(labels.where(mask > 0, masked_label), mask)[0]
    assert_same(op, both(labels, mask)[1], [hidden, weight], **FP32)


def test_fully_masked_is_zero_with_zero_gradients():
    hidden, weight, _, mask = example(130)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((130,), -100), torch.zeros_like(mask))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_z_loss_is_the_square_of_the_log_of_the_sum():
    hidden, weight, labels, mask = example(130)
    z = (hidden @ weight.t()).exp().sum(-1).log()
    expected = (0.25 * z**2 * mask).sum() + linear_cross_entropy(hidden, weight, labels, mask)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, mask, z_loss=0.25), expected)


@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (0.1, None), (0.1, 0.7)])
def test_gradients_in_double(z_loss, softcap):
    """gradcheck goes backwards many times, so it proves the reference, and the reference the fast path."""
    hidden, weight, labels, mask = example(70, 3, 5)
    inputs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    fast, reference = both(labels, mask, z_loss, softcap)
    assert torch.autograd.gradcheck(reference, inputs)
    assert_same(fast, reference, inputs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which):
    hidden, weight, labels, mask = example(130)
    inputs = [hidden.clone(), weight.clone()]
    inputs[which].requires_grad_()
    linear_cross_entropy(*inputs, labels, mask).backward()
    assert inputs[1 - which].grad is None
    expected = [hidden.requires_grad_(), weight.requires_grad_()]
    linear_cross_entropy_reference(*expected, labels, mask).backward()
    torch.testing.assert_close(inputs[which].grad, expected[which].grad, **FP32)


def test_gradients_can_be_taken_once():
    hidden, weight, labels, mask = example(5)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 130])
def test_a_sink_gets_the_weight_gradient(tokens, dtype):
    """In the forward pass, times the scale; the first time it overwrites what is there."""
    hidden, weight, labels, mask = example(tokens)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    main_grad, arrived = torch.full(weight.shape, torch.nan), []
    for accumulate in (False, True):
        sink = WeightSink(lambda add, accumulate=accumulate: add(main_grad, accumulate), lambda: arrived.append(True))
        loss = linear_cross_entropy(hidden, weight, labels, mask, scale=0.3, sink=sink)
        hidden.grad = None
        loss.backward()
    assert arrived == [True, True]
    assert weight.grad is None
    wide, expected = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    reference = 0.3 * linear_cross_entropy_reference(wide, expected, labels, mask)
    reference.backward()
    tolerance = FP32 if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(loss, reference, **tolerance)
    torch.testing.assert_close(hidden.grad.float(), wide.grad, **tolerance)
    if tokens:
        torch.testing.assert_close(main_grad, 2 * expected.grad, **tolerance)
    else:
        assert main_grad.isnan().all()  # nothing came


def test_with_a_sink_nothing_else_scales_the_loss():
    hidden, weight, labels, mask = example(5)
    sink = WeightSink(lambda add: add(torch.zeros_like(weight), True), lambda: None)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), labels, mask, sink=sink)
    with pytest.raises(RuntimeError, match="by `scale` alone"):
        (2 * loss).backward()


def test_evaluation_computes_no_gradients(monkeypatch):
    hidden, weight, labels, mask = example(130)
    calls = []
    matmul = cross_entropy.matmul_transposed
    monkeypatch.setattr(cross_entropy, "matmul_transposed", lambda *ab: calls.append(ab) or matmul(*ab))
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, mask)
    assert len(calls) == -(-130 // min(130, chunk_rows(101, "cpu")))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, labels, mask).detach())


@pytest.mark.parametrize("where", [0, 129])
def test_nan_stays_nan(where):
    hidden, weight, labels, mask = example(130)
    hidden[where, 0] = torch.nan
    assert linear_cross_entropy(hidden, weight, labels, torch.ones_like(mask)).isnan()


def test_extreme_logits():
    """Losses beyond the range of exp, and a sure prediction."""
    hidden, weight = torch.eye(3) * 500, torch.eye(3) * 2
    labels = torch.tensor([0, 2, 1])
    assert_same(*both(labels, torch.ones(3)), [hidden, weight], **FP32)
    assert linear_cross_entropy(hidden, weight, labels, torch.ones(3)) == 2000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_fp32_loss(dtype):
    hidden, weight, labels, mask = example(200)
    inputs = [hidden.to(dtype), weight.to(dtype)]
    assert linear_cross_entropy(*inputs, labels, mask).dtype == torch.float32
    assert_same(*both(labels, mask), inputs, rtol=2e-2, atol=5e-2)


def test_chunks_are_whole_tiles_of_bounded_size(monkeypatch):
    monkeypatch.undo()
    assert chunk_rows(32000, "cpu") == 256
    assert chunk_rows(10**9, "cpu") == chunk_rows(10**9, "cuda") == 64
    assert chunk_rows(32000, "cuda") % 64 == 0


def test_never_waits_for_the_device():
    hidden, weight, labels, mask = (x.to("meta") for x in example(130))
    linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, mask).backward()
    assert weight.grad.shape == weight.shape


def on_shards(shards: int, hidden: torch.Tensor, weight: torch.Tensor, op: Callable) -> list[torch.Tensor]:
    """op(hidden, weight, shard) on threads that share the vocabulary as ranks do: loss, summed gradient of `hidden`,
    joined gradient of `weight`."""
    barrier, slots = Barrier(shards), [torch.empty(0)] * shards

    def run(rank: int) -> tuple[torch.Tensor, ...]:
        def gather(x: torch.Tensor) -> torch.Tensor:
            slots[rank] = x.clone()
            barrier.wait(10)
            together = torch.stack(slots)
            barrier.wait(10)
            return together

        first, rows = TensorParallel(rank, shards).share(len(weight))
        mine = [x.detach().clone().requires_grad_() for x in (hidden, weight[first : first + rows])]
        loss = op(*mine, VocabularyShard(first, -(-len(weight) // shards), gather))
        (0.37 * loss).backward()
        return loss.detach(), *(x.grad for x in mine)

    with ThreadPoolExecutor(shards) as pool:
        losses, for_hidden, for_weight = zip(*pool.map(run, range(shards)), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    return [losses[0], torch.stack(for_hidden).sum(0), torch.cat(for_weight)]


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_ranks_that_share_the_vocabulary_agree_with_the_whole(shards, z_loss, monkeypatch):
    if cross_entropy._CHUNK_ELEMENTS_CPU > 1:  # in chunks whose number a rank's own share would decide differently
        monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS_CPU", 128 * (101 // shards))
    hidden, weight, labels, mask = example(200)
    hidden, weight, labels = hidden.double(), weight.double(), labels.where(mask > 0, -100)

    def op(hidden: torch.Tensor, weight: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels, mask, z_loss=z_loss, shard=shard)

    expected = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy_reference(*expected, labels, mask, z_loss=z_loss)
    (0.37 * loss).backward()
    results = zip(on_shards(shards, hidden, weight, op), (loss.detach(), *(x.grad for x in expected)), strict=True)
    for got, want in results:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_ranks_exchange_two_numbers_a_token():
    hidden, weight, labels, mask = example(130)
    sent = []

    def op(hidden: torch.Tensor, weight: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
        counted = VocabularyShard(
            shard.first_label, shard.most_rows, lambda x: sent.append(x.numel()) or shard.gather(x)
        )
        return linear_cross_entropy(hidden, weight, labels, mask, shard=counted)

    on_shards(2, hidden, weight, op)
    assert sum(sent) == 2 * 2 * 130
