"""FP8 in the parallel layers, emulated: exact enough, the same however a layer is cut, and resumed bitwise."""

import pytest
import torch

from engine.config.schema import Config
from engine.errors import ConfigError
from engine.model.layers import ColumnLinear, Parameters
from engine.ops.choice import require_fp8
from engine.ops.quantize import scale_from_amax
from engine.parallel.fp8 import AmaxSlots, Fp8State
from engine.parallel.gradients import GradientFlow, GradientSink, trained_parameter
from engine.parallel.layout import Layout
from engine.testing.distributed import run_ranks, world_of
from engine.testing.runs import random_batches, run_config, run_training, write_dataset
from engine.train.step import build_model, train_step
from tests.parallel.late import late

RECIPES = ["tensorwise", "delayed", "blockwise"]


def sqnr(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to quantization noise in dB."""
    return 20 * torch.log10(exact.norm() / (got - exact).norm()).item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_is_exact_enough(recipe):
    torch.manual_seed(0)
    weight, x, grad = torch.randn(256, 512) / 16, torch.randn(384, 512), torch.randn(384, 256)
    sink = GradientSink("w.weight", torch.zeros_like(weight), GradientFlow(lambda _: None))
    tensors = {"w.weight": trained_parameter(weight.clone(), sink)}
    state = Fp8State(tensors, recipe, world_of(), amax_history=4)
    layer = ColumnLinear(Parameters(tensors, {"w.weight": sink}, state.quantizers), "w", world_of().tp)
    for _ in range(2):  # the second step of "delayed" takes the scales of the first
        sink.main_grad.zero_()
        state.begin_step()
        state.weights_changed()
        given = x.clone().requires_grad_()
        out = layer(given)
        out.backward(grad)
        state.end_step()
    assert sqnr(out, x @ weight.t()) >= 25
    assert sqnr(given.grad, grad @ weight) >= 20
    assert sqnr(sink.main_grad, grad.t() @ x) >= 20


def steps(config: Config, layout: Layout = Layout(), count: int = 3) -> tuple[list[float], list[float], dict]:  # noqa: B008
    """Losses and gradient norms of all ranks together, and the scales of this rank's layers."""
    world = world_of(layout)
    model, optimizer = build_model(config, world, torch.bfloat16, seed=1)
    batches = random_batches(config, dp_rank=world.coords.dp, dp_size=layout.dp)
    losses, norms = [], []
    for step in range(1, count + 1):
        with late():
            result = train_step(model, optimizer, batches, step=step, lr=1e-3, tokens=4 * config.data.seq_length)
            optimizer.parameters.finish_gathering()
        world.sum_on_device(loss := result.loss.clone())
        losses.append(loss.item())
        norms.append(result.grad_norm.item())
    model.fp8.begin_step()
    return losses, norms, {path: layer.scales.tolist() for path, layer in model.fp8.quantizers.items()}


def fp8_config(tmp_path, *overrides: str, preset: str = "tiny") -> Config:
    sizes = ("--model.intermediate_size", "192")  # a multiple of 16 for each of 2 ranks
    return run_config(tmp_path, "--precision.mode", "fp8", *sizes, *overrides, preset=preset)


LAYOUTS = {
    "tp 2": (Layout(tp=2), ()),
    "dp 2": (Layout(dp=2), ()),
    "pp 2": (Layout(pp=2), ()),
    "pp 2, zero bubble": (Layout(pp=2), ("--parallel.schedule", "zero_bubble")),
    "tp 2, all recomputed": (Layout(tp=2), ("--parallel.recompute", "full")),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_layouts_agree(tmp_path, recipe, name):
    layout, overrides = LAYOUTS[name]
    overrides = ("--precision.recipe", recipe, *overrides)
    losses, norms, scales = steps(fp8_config(tmp_path, "--precision.recipe", recipe))
    ranks = run_ranks(layout.world_size, steps, fp8_config(tmp_path, *overrides), layout)
    torch.testing.assert_close(torch.tensor(ranks[0][0]), torch.tensor(losses), rtol=2e-3, atol=0)
    torch.testing.assert_close(torch.tensor(ranks[0][1]), torch.tensor(norms), rtol=3e-2, atol=0)
    if recipe == "delayed":
        for path in scales:
            found = [rank[2][path] for rank in ranks if path in rank[2]]
            assert found == [found[0]] * (1 if layout.pp > 1 else 2)
            assert 1 not in scales[path]
            # sums of another order, in bf16
            torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(scales[path]), rtol=0.1, atol=0)


def scales_of_unequal_shares() -> list[float]:
    """The scales that a rank uses where the ranks' shares differ in size; where it holds everything they would too."""
    world = world_of(Layout(tp=2))
    values = torch.full((16, 16), 1.0 + world.coords.tp)
    state = Fp8State({"w": values}, "tensorwise", world, amax_history=1)
    layer = state.quantizers["w"]
    of_grad = [layer.quantize_grad_output(5 * values, reduce_amax=reduce)[0] for reduce in (True, False)]
    found = [layer.quantized_weight()[0], layer.quantize_input(3 * values)[0], *of_grad]
    # the op that made it has taken its amax
    found.append(layer.quantize_input(3 * values, (3 * values).max().view(1))[0])
    return [q.scale_inv.item() for q in found]


def test_ranks_use_the_scale_of_the_largest_share():
    of_ranks = run_ranks(2, scales_of_unequal_shares)
    for own, found in zip((1, 2), of_ranks, strict=True):
        assert found == pytest.approx([2 / 448, 6 / 448, 10 / 57344, 5 * own / 57344, 6 / 448])


def test_delayed_computes_the_scales_of_all_layers_at_the_start_of_a_step():
    """Bitwise the current scale of the history's amax, and its reciprocal."""
    state = Fp8State({name: torch.ones(16, 16) for name in "ab"}, "delayed", world_of(), amax_history=2)
    amax = {"a": (3.0, 0.3), "b": (0.0, 7.0)}
    for step in range(2):
        state.begin_step()
        for name, (of_input, of_grad) in amax.items():
            layer = state.quantizers[name]
            layer.quantize_input(torch.full((16, 16), of_input / (step + 1)))
            layer.quantize_grad_output(torch.full((16, 16), -of_grad / (step + 1)), reduce_amax=False)
        state.end_step()
    state.begin_step()
    for name, found in amax.items():
        pairs = zip(found, (torch.float8_e4m3fn, torch.float8_e5m2), strict=True)
        scales = torch.stack([scale_from_amax(torch.tensor(value), dtype) for value, dtype in pairs])
        layer = state.quantizers[name]
        assert torch.equal(layer.scales, scales)
        assert torch.equal(layer.scale_invs, scales.reciprocal())
        x, _ = layer.quantize_input(torch.ones(16, 16))
        assert x.scale_inv.data_ptr() == layer.scale_invs.data_ptr()  # not computed again


def test_slots_of_maxima_are_zero_and_separate():
    slots = AmaxSlots(torch.device("cpu"))
    taken = [slots.take().add_(number + 1) for number in range(2050)]
    assert torch.equal(torch.cat(taken), torch.arange(1.0, 2051))


def test_some_layers_stay_in_bf16(tmp_path):
    overrides = ("--model.num_layers", "4", "--precision.bf16_first_layers", "1", "--precision.bf16_last_layers", "2")
    config = fp8_config(tmp_path, *overrides)
    model, _ = build_model(config, world_of(), torch.bfloat16, seed=1)
    linear = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    assert set(model.fp8.quantizers) == {f"layers.1.{name}.weight" for name in linear}


def test_a_quantized_weight_is_kept_until_it_changes(tmp_path):
    config = fp8_config(tmp_path)
    model, optimizer = build_model(config, world_of(), torch.bfloat16, seed=1)
    layer = next(iter(model.fp8.quantizers.values()))
    batches = random_batches(config)
    model.evaluate(batches)
    kept = layer.quantized_weight()[0]
    assert layer.quantized_weight()[0] is kept
    train_step(model, optimizer, batches, step=1, lr=1e-1, tokens=128)
    model.evaluate(batches)
    assert not torch.equal(layer.quantized_weight()[0].values.float(), kept.values.float())


@pytest.mark.parametrize(
    ("recipe", "steps", "sources"), [("tensorwise", 1, [False]), ("delayed", 0, [False, True]), ("delayed", 1, [True])]
)
def test_a_rehearsal_has_the_scales_of_the_steps_to_come(recipe, steps, sources):
    state = Fp8State({"w": torch.ones(16, 16)}, recipe, world_of(), amax_history=2)
    layer, found = state.quantizers["w"], []

    def use() -> None:
        found.append(layer.use_history)
        layer.quantize_input(torch.full((16, 16), 7.0))
        layer.quantized_weight()

    for _ in range(steps):
        state.begin_step()
        layer.quantize_input(torch.full((16, 16), 3.0))
        state.end_step()
    before = (layer.use_history, *layer.amax.tolist(), *layer.scales.tolist())
    state.rehearse(use)
    assert found == sources
    assert (layer.use_history, *layer.amax.tolist(), *layer.scales.tolist()) == before
    assert layer.weight_cache is None


@pytest.mark.parametrize("then", [1, 2])
def test_delayed_scaling_resumes(tmp_path, then):
    """Bitwise in one layout; and in another one, which reads the same history."""
    write_dataset(tmp_path / "corpus")
    settings = ("--precision.recipe", "delayed", "--precision.amax_history", "3", "--lr_schedule.kind", "constant")

    def run(name: str, *overrides: str, ranks: int = 1) -> list[float]:
        config = fp8_config(tmp_path, *settings, "--run.dir", str(tmp_path / name), *overrides)
        return [record["loss"] for record in run_training(config, ranks) if "loss" in record]

    whole = run("whole")
    run("split", "--train.steps", "4")
    got = run("split", "--parallel.tp", str(then), ranks=then)[4:]
    if then == 1:
        assert got == whole[4:]
    else:
        torch.testing.assert_close(torch.tensor(got), torch.tensor(whole[4:]), rtol=5e-3, atol=0)


def test_what_fp8_cannot_do_is_said_before_the_start(tmp_path):
    with pytest.raises(ConfigError, match="choose one of the two"):
        fp8_config(tmp_path, "--parallel.compile", "true")
    with pytest.raises(ConfigError, match="is more than model"):
        fp8_config(tmp_path, "--precision.bf16_last_layers", "99")
    write_dataset(tmp_path / "corpus")
    with pytest.raises(RuntimeError, match=r"data\.seq_length\) = 24.* but FP8 needs multiples of 16"):
        run_training(fp8_config(tmp_path, "--data.seq_length", "24"))


@pytest.mark.parametrize(
    "capability, overrides, message",
    [
        ((8, 0), (), "needs a GPU of compute capability 8.9 or newer, and A GPU has compute capability 8.0; use bf16"),
        ((8, 9), ("--precision.recipe", "blockwise"), "needs compute capability 9.0"),
        ((9, 0), ("--precision.recipe", "blockwise", "--ops.fp8_matmul", "torch"), "has one scale per tensor"),
        (
            (9, 0),
            ("--ops.fp8_matmul", "triaxis"),
            "has scales per block, and cannot run precision.recipe = tensorwise; use cublaslt",
        ),
        (
            (9, 0),
            ("--precision.recipe", "blockwise", "--ops.fp8_matmul", "triaxis"),
            "ops.fp8_matmul = triaxis is refused on a GPU: the custom kernel gave wrong values .* use cublaslt",
        ),
        ((9, 0), ("--precision.recipe", "blockwise", "--ops.fp8_matmul", "cublaslt"), ""),
        ((9, 0), ("--precision.recipe", "blockwise"), ""),
        ((8, 9), (), ""),
    ],
)
def test_what_a_gpu_lacks_is_named(tmp_path, monkeypatch, capability, overrides, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    config, gpu = fp8_config(tmp_path, *overrides), torch.device("cuda")
    if not message:
        require_fp8(config.precision, config.ops, gpu)
        return
    with pytest.raises(ConfigError, match=message):
        require_fp8(config.precision, config.ops, gpu)
    require_fp8(config.precision, config.ops, torch.device("cpu"))
