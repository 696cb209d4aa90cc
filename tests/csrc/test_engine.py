"""Training through the kernels, run on the host, is training on the plain paths."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from engine.model import layers
from engine.model.attention import attend_within
from engine.ops import native
from engine.ops.norm import add_norm, layer_norm, rms_norm
from engine.ops.quantize import Fp8Activation, GradHandover
from engine.ops.rope import apply_rope_qkv, rope_tables
from engine.ops.swiglu import swiglu
from engine.parallel.fp8 import Fp8Quantizer, Fp8State
from engine.parallel.gradients import GradientFlow, GradientSink, trained_parameter
from engine.parallel.layout import NO_TP, Layout
from engine.parallel.tensor import column_linear
from engine.testing.distributed import run_ranks, world_of
from engine.testing.models import new_decoder, tiny_config
from engine.testing.runs import random_batches, run_config
from engine.train.step import build_model, train_step


@pytest.fixture
def kernels(emulated, monkeypatch):
    """Call it to have the engine take the kernels for CPU tensors too."""
    return lambda: monkeypatch.setattr(native, "runs", lambda x: x.dtype != torch.float64)


def train(tmp_path, preset: str, *overrides: str, steps: int = 3, layout: Layout | None = None):
    """Losses, gradient norms, and the final parameters."""
    config = run_config(tmp_path, *overrides, preset=preset)
    dtype = torch.float32 if config.precision.mode == "fp32" else torch.bfloat16
    model, optimizer = build_model(config, world_of(layout), dtype, seed=1)
    batches = random_batches(config)
    tokens = config.batch.global_ * config.data.seq_length
    numbers = []
    for step in range(1, steps + 1):
        result = train_step(model, optimizer, batches, step=step, lr=1e-3, tokens=tokens)
        numbers += [result.loss.item(), result.grad_norm.item()]
    return torch.tensor(numbers), torch.cat([shard.param for shard in optimizer.shards])


@pytest.mark.parametrize(
    ("preset", "recompute"),
    [
        *itertools.product(["tiny", "tiny-qwen3", "tiny-starcoder2"], ["none", "selective", "full"]),
        ("tiny-gemma2", "selective"),  # norms, an activation and scores that kernels do not have
        ("tiny-olmo2", "full"),
    ],
)
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
    linears = 3 * 4 * 4 * 4  # steps, microbatches, layers, linear layers
    # of the input, for the weight's gradient; with one scale, only where a norm has written it in FP8
    transposes = {"tensorwise": 0, "delayed": 2 * fused, "blockwise": linears}[recipe]
    assert calls.get("triaxis::transpose_fp8", 0) == transposes
    # A tensor without a scale is read once for its amax where no kernel takes it: weights, the gradients of two layers,
    # attention's output.
    current = {"tensorwise": 3, "delayed": 1, "blockwise": 0}[recipe]  # steps with scales from the current amax
    weights = 0 if recipe == "blockwise" else linears // 4
    assert calls.get("triaxis::amax_", 0) == weights + current * 4 * 4 * (2 + 1)
    assert all(calls.get(f"aten::{name}", 0) < linears // 4 for name in ("abs", "where", "reciprocal"))  # a few a step


@pytest.mark.parametrize(
    "recipe, preset, recompute, swiglu, rope, current",
    [  # in a microbatch, gradients of a layer: written in FP8 by SwiGLU and RoPE; read once more for their current amax
        ("tensorwise", "tiny", "none", 0, 0, 2),
        ("delayed", "tiny", "full", 1, 1, 2),
        ("blockwise", "tiny", "selective", 1, 1, 0),
        ("blockwise", "tiny-mistral", "none", 1, 1, 0),
        ("delayed", "tiny-qwen2", "selective", 1, 0, 2),  # the gradient of a bias needs the values
        ("delayed", "tiny-qwen3", "none", 1, 0, 3),  # norms lie between the projection and RoPE
        ("blockwise", "tiny-starcoder2", "full", 0, 0, 0),  # biases, GELU
    ],
)
def test_gradients_that_ops_hand_over_change_no_bit(
    kernels, tmp_path, monkeypatch, recipe, preset, recompute, swiglu, rope, current
):
    """Whole steps with the gradients quantized by the op that computes them, or all by the linear layers."""
    overrides = ["--precision.mode", "fp8", "--precision.recipe", recipe, "--parallel.recompute", recompute]
    overrides += ["--model.intermediate_size", "256", "--batch.global", "2"]
    kernels()
    with monkeypatch.context() as patched:
        patched.setattr(Fp8Quantizer, "grad_spec", lambda *args: None)
        expected, parameters = train(tmp_path, preset, *overrides, steps=2)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        got, same_parameters = train(tmp_path, preset, *overrides, steps=2)
    assert torch.equal(got, expected)
    assert torch.equal(same_parameters, parameters)
    calls = {event.key: event.count for event in trace.key_averages()}
    steps = {"tensorwise": 0, "delayed": 1, "blockwise": 2}[recipe]  # whose scales are known before
    layers = 2 * 4  # microbatches, layers
    assert calls.get("triaxis::swiglu_backward_fp8", 0) == swiglu * steps * layers
    assert calls.get("triaxis::rope_qk_backward_fp8", 0) == rope * steps * layers
    if recipe != "blockwise":
        weights = 2 * 4 * 4  # steps, layers, linear layers
        inputs = {"none": 1, "full": 2, "selective": 4}[recompute]  # attention's output, also when recomputed; all
        assert calls["triaxis::amax_"] == weights + (2 - steps) * layers * (current + inputs)


def transpose_in_backward(patched: pytest.MonkeyPatch) -> None:
    """Have inputs written row-major only, and transposed for the weight's gradient."""
    quantize, fused = Fp8Quantizer.quantize_input, layers.swiglu_for_fp8
    patched.setattr(Fp8Quantizer, "quantize_input", lambda self, *args, transposed: quantize(self, *args))

    def row_major(*args):
        result = fused(*args)
        return replace(result, transposed=None) if isinstance(result, Fp8Activation) else result

    patched.setattr(layers, "swiglu_for_fp8", row_major)


@pytest.mark.parametrize("recompute, norms", [("none", 2), ("selective", 0), ("full", 2)])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_inputs_transposed_as_they_are_quantized_change_no_bit(
    kernels, tmp_path, monkeypatch, recipe, recompute, norms
):
    """By `quantize`, and by SwiGLU. `norms`: those that write FP8 in a layer in the second step of "delayed", which are
    transposed later.
    """
    overrides = ["--precision.mode", "fp8", "--precision.recipe", recipe, "--parallel.recompute", recompute]
    overrides += ["--batch.global", "2"]
    kernels()

    def run():
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            result = train(tmp_path, "tiny", *overrides, steps=2)
        calls = {event.key: event.count for event in trace.key_averages()}
        return *result, calls.get("triaxis::transpose_fp8", 0)

    with monkeypatch.context() as patched:
        transpose_in_backward(patched)
        expected, parameters, transposes = run()
    got, same_parameters, left = run()
    assert torch.equal(got, expected)
    assert torch.equal(same_parameters, parameters)
    assert transposes == 2 * 2 * 4 * 4  # steps, microbatches, layers, linear layers
    assert left == (2 * 4 * norms if recipe == "delayed" else 0)


def steps_of_a_rank(library: Path, directory: Path, layout: Layout, overrides: tuple[str, ...]):
    """Numbers and parameters of a rank, with all gradients quantized by linear layers and all inputs transposed in the
    backward, and without.
    """
    torch.ops.load_library(library)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "runs", lambda x: x.dtype != torch.float64)
        got = train(directory, "tiny", *overrides, steps=2, layout=layout)
        patched.setattr(Fp8Quantizer, "grad_spec", lambda *args: None)
        transpose_in_backward(patched)
        return train(directory, "tiny", *overrides, steps=2, layout=layout), got


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=["tp", "zero bubble"])
def test_quantizing_earlier_changes_no_bit_on_several_ranks(emulated_library, tmp_path, recipe, layout):
    """Scales of all tensor-parallel ranks; weight gradients that wait."""
    overrides = ("--precision.mode", "fp8", "--precision.recipe", recipe, "--model.intermediate_size", "512")
    overrides += ("--parallel.schedule", "zero_bubble") if layout.pp > 1 else ()
    for expected, got in run_ranks(2, steps_of_a_rank, emulated_library, tmp_path, layout, overrides):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_a_gradient_that_was_not_handed_over_is_refused(kernels):
    """The output of the linear layer has a second use: the sum of both gradients was never quantized."""
    kernels()
    torch.manual_seed(0)
    sink = GradientSink("w", torch.zeros(256, 64), GradientFlow(lambda _: None))
    weight = trained_parameter(torch.randn(256, 64).bfloat16(), sink)
    for recipe in ("tensorwise", "blockwise"):
        quantizer = Fp8State({"w": weight}, recipe, world_of(), amax_history=1).quantizers["w"]
        x = torch.randn(32, 64).bfloat16().requires_grad_()
        for second_use in (0.0, 1.0):
            handover = GradHandover(quantizer.grad_spec(x))
            out = column_linear(x, weight, None, NO_TP, sink, quantizer, handover)
            loss = swiglu(out, handover).sum()
            if not second_use:
                loss.backward()
                continue
            with pytest.raises(RuntimeError, match="the output has another use"):
                (loss + out.sum()).backward()


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
    (x, residual), attend = torch.randn(2, 16, model.hidden_size), attend_within((0, 16), model)
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


def test_inductor_compiles_the_operators(kernels):
    """Forward and backward: operators without an amax change no argument, which TorchInductor cannot lower."""
    kernels()
    torch.manual_seed(0)
    x, qkv = torch.randn(8, 64, requires_grad=True), torch.randn(8, 6, 16, requires_grad=True)
    weight = torch.randn(64, requires_grad=True)
    tables = rope_tables(torch.arange(8), 16, 1e4)

    def loss(x, qkv, weight):
        return swiglu(rms_norm(x, weight, 1e-5)).sum() + sum(
            part.square().sum() for part in apply_rope_qkv(qkv, *tables, 2)
        )

    expected = torch.autograd.grad(loss(x, qkv, weight), (x, qkv, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, qkv, weight), (x, qkv, weight))
    torch.testing.assert_close(got, expected)
