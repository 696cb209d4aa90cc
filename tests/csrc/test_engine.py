"""Training through the kernels, run on the host, is training on the plain paths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from engine.model.attention import attend_within
from engine.ops import native
from engine.ops.norm import add_norm, layer_norm, rms_norm
from engine.ops.rope import rope_tables
from engine.testing.distributed import world_of
from engine.testing.models import new_decoder, tiny_config
from engine.testing.runs import random_batches, run_config
from engine.train.step import build_model, train_step


@pytest.fixture
def kernels(emulated, monkeypatch):
    """Call it to have the engine take the kernels for CPU tensors too."""
    return lambda: monkeypatch.setattr(native, "runs", lambda x: x.dtype != torch.float64)


def train(tmp_path, preset: str, *overrides: str, steps: int = 3):
    """Losses, gradient norms, and the final parameters."""
    config = run_config(tmp_path, *overrides, preset=preset)
    dtype = torch.float32 if config.precision.mode == "fp32" else torch.bfloat16
    model, optimizer = build_model(config, world_of(), dtype, seed=1)
    batches = random_batches(config)
    tokens = config.batch.global_ * config.data.seq_length
    numbers = []
    for step in range(1, steps + 1):
        result = train_step(model, optimizer, batches, step=step, lr=1e-3, tokens=tokens)
        numbers += [result.loss.item(), result.grad_norm.item()]
    return torch.tensor(numbers), torch.cat([shard.param for shard in optimizer.shards])


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3", "tiny-starcoder2"])
def test_training(kernels, tmp_path, preset, recompute):
    overrides = ("--parallel.recompute", recompute, "--train.z_loss", "1e-3")
    expected, parameters = train(tmp_path, preset, *overrides)
    kernels()
    got, same_parameters = train(tmp_path, preset, *overrides)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    assert (same_parameters - parameters).norm() < 1e-4 * parameters.norm()


def test_training_in_bf16(kernels, tmp_path):
    overrides = ("--precision.mode", "bf16", "--optimizer.moments", "bf16")
    expected, _ = train(tmp_path, "tiny", *overrides)
    kernels()
    got, _ = train(tmp_path, "tiny", *overrides)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    "recipe, preset",
    [("tensorwise", "tiny"), ("delayed", "tiny"), ("blockwise", "tiny"), ("blockwise", "tiny-starcoder2")],
)
def test_training_in_fp8(kernels, tmp_path, recipe, preset):
    """Norms and SwiGLU write FP8 if the scale is known in advance: for blocks, and for delayed after a step."""
    overrides = ("--precision.mode", "fp8", "--precision.recipe", recipe)
    expected, _ = train(tmp_path, preset, *overrides)
    kernels()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        got, _ = train(tmp_path, preset, *overrides)
    torch.testing.assert_close(got[::2], expected[::2], rtol=5e-3, atol=0)  # losses
    torch.testing.assert_close(got[1::2], expected[1::2], rtol=5e-2, atol=0)  # gradient norms
    calls = {event.key: event.count for event in trace.key_averages()}
    fused = {"tensorwise": 0, "delayed": 2, "blockwise": 3}[recipe] * 4 * 4  # steps, microbatches, layers
    assert calls.get("triaxis::norm_forward_fp8", 0) == 2 * fused
    assert calls.get("triaxis::swiglu_forward_fp8", 0) == (fused if preset == "tiny" else 0)
    assert (
        calls["triaxis::transpose_fp8"] == 3 * 4 * 4 * 4
    )  # of the input, for the gradient of each of a layer's 4 weights


@pytest.mark.parametrize("bias", [False, True])
def test_norms_as_the_model_calls_them(kernels, bias):
    """Sums and norms of more than two dimensions, with gradients to both."""
    torch.manual_seed(0)
    x, residual, weight = torch.randn(2, 3, 40), torch.randn(2, 3, 40), 1 + torch.rand(40)
    shift = torch.randn(40) if bias else None
    grads = torch.randn(2, 3, 40), torch.randn(2, 3, 40)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, *([shift] if bias else []))]
        given = leaves[3] if bias else None
        y, total = add_norm(leaves[0], leaves[1], leaves[2], given, 1e-5)
        alone = rms_norm(leaves[0], leaves[2], 1e-5) if given is None else layer_norm(leaves[0], *leaves[2:], 1e-5)
        ((y * grads[0]).sum() + (total * grads[1]).sum() + alone.square().sum()).backward()
        return [y, total, alone, *(leaf.grad for leaf in leaves)]

    expected = run()
    kernels()
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)


def test_a_block_compiles_as_one_graph(kernels):
    kernels()
    model = tiny_config()
    block = new_decoder(model).layers[0]
    cos, sin = rope_tables(torch.arange(16), model.head_dim, model.rope_theta)
    (x, residual), attend = torch.randn(2, 16, model.hidden_size), attend_within((0, 16), None)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block.forward, fullgraph=True, backend=counter)
    out, expected = (sum(function(x, residual, cos, sin, attend)) for function in (compiled, block))
    torch.testing.assert_close(out, expected)
    assert counter.frame_count == 1
    gradients = []
    for result in (out, expected):
        block.zero_grad()
        result.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in block.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_compiler_sees_through_the_question_for_kernels():
    compiled = torch.compile(lambda x: x + native.has_kernels(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(1)), torch.zeros(1) + native.has_kernels())
