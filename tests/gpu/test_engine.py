"""Training on a GPU is training on a CPU, in every precision; it compiles, and repeats bitwise where asked to."""

import pytest
import torch

from engine.model.attention import attend_within
from engine.ops.rope import rope_tables
from engine.parallel.layout import init_distributed
from engine.testing.models import new_decoder, tiny_config
from engine.testing.runs import losses, random_batches, run_config, run_training, write_dataset
from engine.train.step import build_model, train_step
from tests.csrc.test_engine import test_norms_as_the_model_calls_them  # noqa: F401
from tests.train.test_run import assert_bitwise, tensors

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
FP8 = [("--precision.mode", "fp8", "--precision.recipe", recipe) for recipe in ("tensorwise", "delayed", "blockwise")]
CUSTOM_MATMUL = (*FP8[2], "--ops.fp8_matmul", "triaxis")
FP32, BF16 = ("--precision.mode", "fp32"), ("--precision.mode", "bf16")


def small(*overrides: str) -> tuple[str, ...]:
    sizes = [text for name, value in SIZES.items() for text in (f"--model.{name}", str(value))]
    return (*sizes, "--data.seq_length", "128", *overrides)


def train(tmp_path, device: str, overrides: tuple[str, ...], preset: str = "tiny", steps: int = 5, lr: float = 1e-3):
    """Losses and gradient norms."""
    config = run_config(tmp_path, *overrides, preset=preset)
    dtype = torch.float32 if config.precision.mode == "fp32" else torch.bfloat16
    model, optimizer = build_model(config, init_distributed(device), dtype, seed=1)
    batches = random_batches(config)
    tokens = config.batch.global_ * config.data.seq_length
    results = [train_step(model, optimizer, batches, step=step, lr=lr, tokens=tokens) for step in range(1, steps + 1)]
    return [torch.cat([getattr(result, name) for result in results]).cpu() for name in ("loss", "grad_norm")]


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3", "tiny-starcoder2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_training_in_fp32(tmp_path, preset, recompute):
    overrides = (*FP32, "--parallel.recompute", recompute, "--train.z_loss", "1e-3")
    on_cpu, on_gpu = (train(tmp_path, device, overrides, preset) for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu[0], on_cpu[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(on_gpu[1], on_cpu[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "overrides", [BF16, (*BF16, "--optimizer.moments", "bf16"), *FP8, CUSTOM_MATMUL], ids=lambda o: " ".join(o[1::2])
)
def test_training_in_fewer_bits(tmp_path, overrides):
    """In FP8 with a tenth of the learning rate: a value that rounds to another code is amplified from step to step.

    Two runs on a CPU whose matmuls differ by 1e-6 are, in five steps, up to 1e-2 (loss) and 6e-1 (norm) apart at 1e-3,
    and 7e-4 and 2.4e-2 at 1e-4 (worst of three recipes and three runs).
    """
    lr = 1e-4 if "fp8" in overrides else 1e-3
    on_cpu, on_gpu = (train(tmp_path, device, small(*overrides), lr=lr) for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu[0], on_cpu[0], rtol=5e-3, atol=0)
    torch.testing.assert_close(on_gpu[1], on_cpu[1], rtol=5e-2, atol=0)


def test_training_compiled(tmp_path):
    plain, compiled = (
        train(tmp_path, "cuda", small(*BF16, "--parallel.compile", on), steps=3) for on in ("false", "true")
    )
    torch.testing.assert_close(compiled[0], plain[0], rtol=5e-3, atol=0)
    torch.testing.assert_close(compiled[1], plain[1], rtol=5e-2, atol=0)


@pytest.mark.parametrize("overrides", [BF16, FP8[1]], ids=lambda o: " ".join(o[1::2]))
def test_deterministic_runs_repeat_bitwise(tmp_path, overrides):
    write_dataset(tmp_path / "corpus")
    settings = small(*overrides, "--run.device", "cuda", "--run.deterministic", "true")
    configs = [run_config(tmp_path, *settings, "--run.dir", str(tmp_path / name)) for name in ("one", "two")]
    first, second = (losses(run_training(config)) for config in configs)
    assert len(first) == 10
    assert first == second
    assert_bitwise(*(tensors(config) for config in configs))


def test_a_block_compiles_as_one_graph():
    """With Inductor, which calls the kernels and fuses the code between them."""
    model = tiny_config()
    block = new_decoder(model).layers[0].to("cuda", torch.bfloat16)
    cos, sin = rope_tables(torch.arange(16, device="cuda"), model.head_dim, model.rope_theta)
    attend = attend_within((0, 16), model)
    torch.manual_seed(0)
    x, residual = torch.randn(2, 16, model.hidden_size, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(block.forward, fullgraph=True)
    results = []
    for function in (compiled, block):
        block.zero_grad()
        out = sum(function(x, residual, cos, sin, attend))
        out.float().square().mean().backward()
        results.append([out.detach(), *(parameter.grad.clone() for parameter in block.parameters())])
    for got, expected in zip(*results, strict=True):
        assert (got.float() - expected.float()).norm() < 2e-2 * expected.float().norm()
