"""Weights gathered in FP8: half the bytes, bitwise the results of the bf16 gather, and no bf16 weight that is read."""

import pytest
import torch

from engine.checkpoint.run_directory import open_checkpoint
from engine.config.schema import Config
from engine.parallel.fp8 import Fp8State
from engine.parallel.layout import Layout
from engine.parallel.table import initialize
from engine.plan.memory import estimate
from engine.testing.distributed import run_ranks, world_of
from engine.testing.runs import losses, random_batches, run_config, run_training, write_dataset
from engine.train.step import build_model, train_step
from tests.parallel.late import late

RECIPES = ["tensorwise", "delayed"]
BF16 = torch.bfloat16
GATHER = ("--parallel.fp8_param_gather", "true")


def fp8_config(tmp_path, *overrides: str, steps: int = 5) -> Config:
    """Without clipping: the gradient norm is summed by buckets, which are others, so it may differ in its last bit."""
    sizes = ("--model.intermediate_size", "192")  # a multiple of 16 for each of 2 ranks
    return run_config(
        tmp_path, "--precision.mode", "fp8", "--optimizer.clip_grad", "0", *sizes, *overrides, steps=steps
    )


LAYOUTS = {
    "dp 2": (2, ()),
    "tp 2 × dp 2": (4, ("--parallel.tp", "2", "--precision.bf16_first_layers", "1")),
    "pp 2 × dp 2": (4, ("--parallel.pp", "2", "--parallel.schedule", "zero_bubble")),
}


def trained(config: Config, ranks: int) -> tuple[list[float], list[float], dict]:
    """Losses and evaluations of a run, its gradient norms, and all tensors of its checkpoint."""
    records = run_training(config, ranks)
    of_losses = [record[name] for record in records for name in ("loss", "eval_loss") if name in record]
    norms = [record["grad_norm"] for record in records if "grad_norm" in record]
    checkpoint = open_checkpoint(config.run.dir)
    kinds = ("param", "exp_avg", "exp_avg_sq", *["fp8_amax"] * (config.precision.recipe == "delayed"))
    tensors = {
        (kind, name): checkpoint.read(name, kind=kind) for kind in kinds for name in checkpoint.manifest.tensors[kind]
    }
    return of_losses, norms, tensors


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_bitwise_that_of_the_bf16_gather(tmp_path, recipe, name):
    write_dataset(tmp_path / "corpus")
    ranks, overrides = LAYOUTS[name]
    common = ("--precision.recipe", recipe, "--train.eval_steps", "1", "--train.eval_interval", "2", *overrides)
    (got, norms, tensors), (expected_losses, expected_norms, expected) = (
        trained(fp8_config(tmp_path, *common, "--run.dir", str(tmp_path / directory), *more), ranks)
        for directory, more in (("in_fp8", GATHER), ("in_bf16", ()))
    )
    assert len(got) == 9
    assert got == expected_losses
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in tensors.items())


def test_a_run_resumes_bitwise_with_either_gather(tmp_path):
    write_dataset(tmp_path / "corpus")

    def run(name: str, steps: int, *overrides: str) -> list[float]:
        common = ("--run.dir", str(tmp_path / name), "--lr_schedule.kind", "constant")
        return losses(run_training(fp8_config(tmp_path, *common, *overrides, steps=steps), 2))

    whole = run("whole", 6)
    run("cut", 2)
    run("cut", 4, *GATHER)
    assert run("cut", 6) == whole


def late_steps(config: Config, layout: Layout) -> tuple[list[float], int, dict[str, tuple[float, int]]]:
    """Losses of three steps with late communication, bytes that this rank gave to all-gathers of the last, and for each
    FP8 weight whether the bf16 one is NaN, and its bytes."""
    world = world_of(layout)
    model, optimizer = build_model(config, world, BF16, seed=1)
    batches = random_batches(config, dp_rank=world.coords.dp, dp_size=layout.dp)
    found = []
    optimizer.parameters.finish_gathering()
    for step in range(1, 4):
        with late() as traffic:
            result = train_step(model, optimizer, batches, step=step, lr=1e-3, tokens=4 * config.data.seq_length)
            buckets = optimizer.parameters.buckets
            assert all(bucket.gathering is not None for bucket in buckets)  # for the next forward pass
            optimizer.parameters.finish_gathering()
        sizes = [nbytes for name, nbytes in traffic.nbytes if name == "all_gather"]
        assert sizes == [(b.end - b.begin) * (1 if b.plan.in_fp8 else 2) for b in reversed(buckets)]  # in its order
        world.sum_on_device(loss := result.loss.clone())
        found.append(loss.item())
    weights = {path: optimizer.parameters.by_path[path] for path in model.fp8.quantizers}
    read = {path: (w.isnan().all().item(), w.untyped_storage().nbytes()) for path, w in weights.items()}
    return found, traffic.total_bytes("all_gather"), read


def test_half_the_bytes_of_a_weight_are_gathered_and_its_bf16_values_do_not_exist(tmp_path):
    """They are NaN: whatever read them would lose the run."""
    config = fp8_config(tmp_path, *GATHER, "--batch.global", "4")
    in_fp8 = run_ranks(4, late_steps, config, Layout(dp=4))
    in_bf16 = run_ranks(4, late_steps, fp8_config(tmp_path), Layout(dp=4))
    model = config.model
    weights = model.num_layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    for (got, sent, read), (expected, sent_in_bf16, _) in zip(in_fp8, in_bf16, strict=True):
        assert got == expected
        assert len(read) == 4 * model.num_layers
        assert set(read.values()) == {(True, 2)}
        assert sent_in_bf16 - sent == pytest.approx(weights / 4, abs=2 * 128)  # but for the padding of a bucket


def quantized(config: Config, layout: Layout) -> list[tuple[str, bool]]:
    """Whether each FP8 weight is what quantizing the whole bf16 weight gives, row-major and transposed."""
    world = world_of(layout)
    with late():
        model, optimizer = build_model(config, world, BF16, seed=1)
        optimizer.parameters.finish_gathering()
    table = {slot.parameter.path: slot.parameter for b in optimizer.parameters.buckets for slot in b.plan.slots}
    found = []
    for path, layer in model.fp8.quantizers.items():
        initialize(table[path], whole := torch.empty(table[path].shape, dtype=BF16), 1)
        expected = Fp8State({path: whole}, "tensorwise", world, amax_history=1).quantizers[path].quantized_weight()
        same = [
            torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and a.scale_inv.equal(b.scale_inv)
            for a, b in zip(layer.quantized_weight(), expected, strict=True)
        ]
        found.append((path, all(same)))
    return found


@pytest.mark.parametrize("layout", [Layout(dp=3), Layout(tp=2, dp=2)], ids=str)
def test_gathered_weights_are_those_of_the_whole_weight_from_the_start(tmp_path, layout):
    for found in run_ranks(layout.world_size, quantized, fp8_config(tmp_path, *GATHER), layout):
        assert len(found) == 16
        assert all(same for _, same in found)


def held_bytes(config: Config) -> tuple[int, int]:
    """Bytes of all parameters that a rank holds, and what the plan says; both without transposed FP8 weights."""
    model, optimizer = build_model(config, world_of(), BF16, seed=1)
    weights = [bucket.param for bucket in optimizer.parameters.buckets]
    values = [layer.gathered.values for layer in model.fp8.quantizers.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*weights, *values)}
    transposed = sum(value.numel() for value in values)
    return sum(storages.values()), estimate(config, Layout(dp=2), 0, BF16, "cpu").parameters - transposed


def test_the_plan_counts_what_is_held(tmp_path):
    for held, planned in run_ranks(2, held_bytes, fp8_config(tmp_path, *GATHER)):
        assert held == pytest.approx(planned, rel=0.01)


def test_one_data_parallel_rank_gathers_nothing(tmp_path):
    model, optimizer = build_model(fp8_config(tmp_path, *GATHER), world_of(), BF16, seed=1)
    assert optimizer.parameters.fp8 is None
    assert all(layer.gathered is None for layer in model.fp8.quantizers.values())
