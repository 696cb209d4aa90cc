import pytest
import torch
from torch import Tensor

from engine.config.schema import ParallelConfig
from engine.model.attention import attend_within
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.model.parameters import parameter_table
from engine.parallel.data import ShardedParameters
from engine.parallel.recompute import checkpoint, discard_and_recompute
from engine.testing.distributed import world_of
from engine.testing.models import tiny_config
from tests.parallel.live_memory import LiveMemory

TOKENS = 24


def mixed(x: Tensor, weight: Tensor) -> Tensor:
    return ((x @ weight).sin() * x).exp().tanh()


def gradients(function, *inputs: Tensor) -> tuple[list[Tensor], int]:
    """Of the sum of what the function returns, and the bytes that it has kept for them."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with LiveMemory() as memory:
        out = function(*leaves)
        kept = memory.bytes() - out.nbytes
    out.sum().backward()
    return [leaf.grad for leaf in leaves], kept


def test_again_keeps_nothing_and_gives_the_same_gradients():
    torch.manual_seed(0)
    inputs = torch.randn(16, 16), torch.randn(16, 16)
    expected, kept = gradients(mixed, *inputs)
    results, kept_again = gradients(lambda *arguments: checkpoint(mixed, *arguments), *inputs)
    assert all(map(torch.equal, results, expected))
    assert kept >= 3 * 16 * 16 * 4
    assert kept_again == 0


@pytest.mark.parametrize("trains", [False, True])
def test_again_computes_a_second_time_only_for_a_backward(trains):
    calls = []
    x = torch.randn(4, 4, requires_grad=True)
    with torch.set_grad_enabled(trains):
        out = checkpoint(lambda x, w: calls.append(1) or mixed(x, w), x, torch.eye(4))
    assert torch.equal(out, mixed(x, torch.eye(4)))
    assert out.requires_grad == trains
    if trains:
        out.sum().backward()
    assert len(calls) == 1 + trains


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x.sin() @ weight


def product_forgetting(x: Tensor, weight: Tensor) -> Tensor:
    middle = x.sin()
    with discard_and_recompute(middle, lambda: x.sin()):
        return middle @ weight


def test_a_discarded_tensor_is_not_kept_and_gives_the_same_gradients():
    torch.manual_seed(0)
    inputs = torch.randn(16, 16), torch.randn(16, 16)
    expected, kept = gradients(product, *inputs)
    results, kept_forgetting = gradients(product_forgetting, *inputs)
    assert all(map(torch.equal, results, expected))
    assert (kept, kept_forgetting) == (16 * 16 * 4, 0)


def test_a_transposed_view_is_not_mistaken_for_the_discarded_tensor():
    """It starts at the same place and has the same shape."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    middle = x.sin()
    with discard_and_recompute(middle, lambda: x.sin()):
        out = middle.t() @ weight
    out.sum().backward()
    torch.testing.assert_close(weight.grad, x.sin().sum(1, keepdim=True).expand(4, 4))


def test_what_is_not_discarded_is_kept_as_it_is():
    made = []
    x, other = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    middle = x.sin()
    with discard_and_recompute(middle, lambda: made.append(1) or x.sin()):
        loss = (other.sin() * other.cos()).sum()  # keeps tensors of the same shape
    loss.backward()
    torch.testing.assert_close(other.grad, (2 * other).cos())
    assert made == []


def run(preset: str, recompute: str, layers: int | None = None, *, postpone: bool = False) -> tuple[int, list[Tensor]]:
    """Bytes that three layers keep for their backward, and all gradients."""
    model = tiny_config(preset, num_layers=3)
    parameters = ShardedParameters(parameter_table(model), torch.float32, world_of())
    parameters.initialize(1)
    decoder = Decoder(
        model,
        Parameters(parameters.by_path, parameters.sinks),
        parallel=ParallelConfig(recompute=recompute, recompute_layers=layers),
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, 257, (TOKENS,))
    attend = attend_within((0, 9, TOKENS), model)
    positions = torch.arange(TOKENS)
    with torch.no_grad():
        expected = decoder(tokens, positions, attend)
    with LiveMemory() as memory:
        out = decoder(tokens, positions, attend)
        kept = memory.bytes()
    assert torch.equal(out, expected)
    parameters.flow.postponed = products = [] if postpone else None
    out.square().sum().backward()
    for add in products or ():
        add()
    return kept, [bucket.grad for bucket in parameters.buckets]


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3", "tiny-starcoder2", "tiny-olmo2", "tiny-gemma2"])
def test_recomputing_gives_bitwise_the_same_gradients_and_keeps_less(preset):
    most, expected = run(preset, "none")
    between = 0
    for recompute in ("selective", "full"):
        for layers in (1, None):
            for postpone in (False, True):
                kept, found = run(preset, recompute, layers, postpone=postpone)
                assert all(map(torch.equal, found, expected))
        between = between or kept
    assert kept < between < most
    assert kept == 4 * TOKENS * (4 * 64 + tiny_config(preset).head_dim)  # inputs and output of layers; rotary tables


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_only_the_first_layers_are_recomputed_where_a_number_is_given(recompute):
    none, all_ = run("tiny", "none")[0], run("tiny", recompute)[0]
    for layers in (1, 2, 3, 5):
        assert run("tiny", recompute, layers)[0] == none - (none - all_) * min(layers, 3) // 3
