"""The launches of a step, counted without a GPU."""

import pytest
import torch

from engine.errors import TriaxisError
from engine.ops import native
from engine.testing.launches import LaunchCounter, presented_as_gpu, step_launches
from tools.bench.launches import launch_config

pytestmark = pytest.mark.skipif(bool(native.WHY_NOT), reason=native.WHY_NOT)

# launches of a step of llama2-7b in 8 microbatches of 4,096 tokens; a change that lowers them lowers the bound
MOST = {"bf16": 10_689, "tensorwise": 13_763, "delayed": 12_241, "blockwise": 12_865}


def counted(recipe: str, *overrides: str, layers: int = 2, microbatches: int = 1) -> int:
    overrides = ("--model.num_layers", str(layers), *overrides)
    return step_launches(launch_config("llama2-7b", recipe, microbatches, 4096, overrides)).total()


@pytest.mark.parametrize("recipe", MOST)
def test_of_a_step(recipe):
    """Two and three layers and one and two microbatches give the rest: launches are linear in both."""
    few, more = (counted(recipe, layers=layers) for layers in (2, 3))
    per_microbatch, with_more = (counted(recipe, layers=layers, microbatches=2) for layers in (2, 3))
    layer, microbatch = more - few, per_microbatch - few
    layer_of_a_microbatch = with_more - more - microbatch
    assert few + 30 * layer + 7 * microbatch + 30 * 7 * layer_of_a_microbatch <= MOST[recipe]


def test_a_new_launch_is_counted(monkeypatch):
    from engine.model import decoder

    forward = decoder.Block.forward
    before = counted("bf16", "--model.num_layers", "3")
    monkeypatch.setattr(decoder.Block, "forward", lambda self, x, *args: forward(self, x * 1, *args))
    assert counted("bf16", "--model.num_layers", "3") == before + 3 * 2  # forward and backward


@pytest.mark.parametrize("preset, norms", [("qwen3-8b", 4), ("starcoder2-7b", 2)])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_other_families_and_recompute(preset, norms, recompute):
    overrides = ("--model.num_layers", "2", "--parallel.recompute", recompute)
    launches = step_launches(launch_config(preset, "bf16", 1, 4096, overrides))
    forward = sum(count for (name, _), count in launches.items() if name == "triaxis::norm_forward")
    assert forward == 1 + norms * 2 * (1 if recompute == "none" else 2)


def test_views_and_allocations_launch_nothing():
    with presented_as_gpu(), LaunchCounter() as counter:
        x = torch.empty(4, 6, device=torch.device("cuda"))
        assert x.is_cuda and x.device.type == "cuda"
        x.view(6, 4).t()[1:].detach().unsqueeze(0)
        x.new_zeros(0)
    assert counter.launches.total() == 0


def test_an_unknown_operator_is_named():
    with presented_as_gpu(), LaunchCounter(), pytest.raises(TriaxisError, match="aten::cumsum: unknown number"):
        torch.empty(4, device=torch.device("cuda")).cumsum(0)
