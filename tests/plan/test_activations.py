"""What layers keep for their backward passes, beside what operations save and what the papers say."""

import pytest
import torch

from engine.config.schema import Config, ParallelConfig
from engine.model.attention import attend_within
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.model.parameters import kv_replicas, parameter_table
from engine.parallel.data import ShardedParameters
from engine.parallel.layout import Layout
from engine.parallel.pipeline.partition import Part
from engine.plan.activations import ActivationSizes
from engine.testing.distributed import run_ranks, world_of
from engine.testing.runs import run_config
from engine.train.step import fp8_state
from tests.parallel.live_memory import LiveMemory, settled

TOKENS = 256
BF16 = torch.bfloat16
WIDE = ("--model.hidden_size", "256", "--model.intermediate_size", "512", "--data.seq_length", str(TOKENS))


def sizes_of(config: Config, tp: int = 1, itemsize: int = 2) -> ActivationSizes:
    return ActivationSizes.of(config.model, config.batch, config.data, config.precision, tp, itemsize)


def live(config: Config, part: Part, layout: Layout) -> dict[str, tuple[int, int]]:
    """By kind of recompute, bytes that a part of the model keeps for its backward pass, and that wait for the weight
    gradients behind it."""
    world, found = world_of(layout, kv_replicas=kv_replicas(config.model, layout.tp)), {}
    parameters = ShardedParameters(parameter_table(config.model, [part], world.tp), torch.float32, world)
    state = fp8_state(config, parameters, world)
    quantizers = {} if state is None else state.quantizers
    for quantizer in quantizers.values():
        quantizer.quantized_weight()  # kept for all microbatches
    attend = attend_within((0, 16, TOKENS), config.model)
    for recompute in ("none", "selective", "full"):
        decoder = Decoder(
            config.model,
            Parameters(parameters.by_path, parameters.sinks, quantizers),
            part,
            world.tp,
            ParallelConfig(recompute=recompute),
        )
        parameters.flow.postponed = []
        with LiveMemory() as alive:
            x = torch.ones(TOKENS // layout.tp, config.model.hidden_size).requires_grad_()
            out = decoder(x, torch.arange(TOKENS), attend)
            kept = settled(alive) - out.nbytes
            out.backward(torch.ones_like(out))
            del out
            waiting = settled(alive) - x.grad.nbytes
            if config.model.norm_placement != "post":  # where the first matmul reads the input itself
                waiting -= x.nbytes
        found[recompute] = kept, waiting
    return found


def hold_against_estimate(config: Config, part: Part, tp: int, found: dict[str, tuple[int, int]]) -> None:
    """Beside what is counted, layers keep the rotary tables, and a number or two of each row and head."""
    for recompute, (kept, waiting) in found.items():
        config = config.model_copy(update={"parallel": ParallelConfig(recompute=recompute)})
        tables = 4 * TOKENS * config.model.head_dim
        assert kept - tables == pytest.approx(sizes_of(config, tp, 4).kept(part, config.parallel), rel=0.04)
        scales = 8 * 4 * len(part.layers)  # of FP8 operands, if there is one for a tensor
        frequencies = 4 * config.model.head_dim // 2
        assert waiting == pytest.approx(sizes_of(config, tp, 4).waiting(part), abs=scales + frequencies)


MIDDLE = Part(range(1, 4), has_embedding=False, has_head=False)


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3", "tiny-starcoder2", "tiny-olmo2", "tiny-gemma2"])
def test_layers_keep_what_is_said(tmp_path, preset):
    config = run_config(tmp_path, *WIDE, preset=preset)
    hold_against_estimate(config, MIDDLE, 1, live(config, MIDDLE, Layout()))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-starcoder2", "tiny-olmo2", "tiny-gemma2"])
def test_fp8_layers_keep_what_is_said(tmp_path, preset, recipe):
    """FP8 copies of what their matmuls read, which selective recompute does not discard; one layer is in bf16."""
    fp8 = ("--precision.mode", "fp8", "--precision.recipe", recipe, "--precision.bf16_first_layers", "2")
    config = run_config(tmp_path, *WIDE, *fp8, preset=preset)
    hold_against_estimate(config, MIDDLE, 1, live(config, MIDDLE, Layout()))


def test_fp8_layers_of_tensor_parallel_ranks_keep_what_is_said(tmp_path):
    config = run_config(tmp_path, *WIDE, "--precision.mode", "fp8")
    for found in run_ranks(2, live, config, MIDDLE, Layout(tp=2)):
        hold_against_estimate(config, MIDDLE, 2, found)


def test_layers_of_tensor_parallel_ranks_keep_what_is_said(tmp_path):
    """With more ranks than key and value heads."""
    config = run_config(tmp_path, *WIDE, "--model.num_kv_heads", "1")
    for found in run_ranks(2, live, config, MIDDLE, Layout(tp=2)):
        hold_against_estimate(config, MIDDLE, 2, found)


def test_layers_that_are_not_recomputed_keep_all(tmp_path):
    part = Part(range(4), has_embedding=True, has_head=False)
    full = ("--parallel.recompute", "full")
    none, one, all_, more = (
        sizes_of(config).kept(part, config.parallel)
        for config in (
            run_config(tmp_path, *overrides)
            for overrides in (
                (),
                (*full, "--parallel.recompute_layers", "1"),
                full,
                (*full, "--parallel.recompute_layers", "9"),
            )
        )
    )
    assert one == (3 * none + all_) // 4
    assert more == all_


def test_the_loss_keeps_its_gradients(tmp_path):
    """fp32 [t, h] and [v, h], until its backward pass; as each microbatch of GPipe does."""
    config = run_config(tmp_path, *WIDE)
    parameters = ShardedParameters(parameter_table(config.model), BF16, world_of())
    decoder = Decoder(
        config.model,
        Parameters(parameters.by_path, parameters.sinks),
        Part(range(0), has_embedding=False, has_head=True),
    )
    tokens = torch.zeros(TOKENS, dtype=torch.long)
    with LiveMemory() as alive:
        x = torch.ones(TOKENS, 256, dtype=BF16).requires_grad_()
        loss = decoder.loss(x, tokens, tokens, torch.ones(TOKENS), (0, TOKENS))
        kept = alive.bytes() - 4 * TOKENS
    assert loss.isfinite()
    part = Part(range(0), has_embedding=False, has_head=True)
    assert kept == pytest.approx(sizes_of(config).kept(part, config.parallel), rel=0.03)


def test_a_layer_of_gpt_keeps_what_korthikanti_et_al_count(tmp_path):
    """34·h bytes a token in 16 bits without attention's matrix (arXiv 2205.05198, section 4.1); ours has no dropout,
    whose masks take 2·h, and keeps queries and keys before and after the rotation, 4·h."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
    overrides = [item for key, value in sizes.items() for item in (f"--model.{key}", str(value))]
    config = run_config(tmp_path, *overrides, "--data.document_mask", "false", preset="tiny-starcoder2")
    assert 2 * sizes_of(config).layer("none") == (34 - 2 + 4) * 64


def test_only_layers_with_a_window_keep_a_mask(tmp_path):
    window = ("--model.sliding_window", "8", "--data.seq_length", "32", "--data.document_mask", "false")
    configs = [run_config(tmp_path, *window, "--model.window_layers", layers) for layers in ("null", "[0]", "[]")]
    part = Part(range(4), has_embedding=False, has_head=False)
    all_layers, one, none = (sizes_of(config).kept(part, config.parallel) for config in configs)
    assert (all_layers - one, one - none) == (3 * 2 * 32 * 32, 2 * 32 * 32)


def test_tensor_parallel_ranks_divide_the_activations(tmp_path):
    """All that a layer keeps is divided, with sequence parallelism; key and value heads as long as there are enough."""
    config = run_config(tmp_path, "--model.num_kv_heads", "4")
    one, four = (sizes_of(config, tp).layer("none") for tp in (1, 4))
    assert one == 4 * four
