"""The table of launches says how many kernels the operators of csrc launch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.ops import native
from engine.testing.distributed import world_of
from engine.testing.launches import launches_of
from engine.testing.runs import random_batches, run_config
from engine.train.step import build_model, train_step


class Compare(TorchDispatchMode):
    """Compares the kernels that each call launches in the emulation with the table."""

    def __init__(self, launched):
        super().__init__()
        self.launched, self.seen = launched, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.launched()
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("triaxis::"):
            self.seen.add(name.removeprefix("triaxis::"))
            # fills are PyTorch's: those of `quantize` are not launched by csrc
            expected = 1 if name == "triaxis::quantize" else launches_of(name, result, args)
            assert self.launched() - before == expected, name
        return result


@pytest.mark.parametrize("recipe, preset", [("delayed", "tiny"), ("blockwise", "tiny-qwen3")])
def test_as_launched(launched, monkeypatch, tmp_path, recipe, preset):
    overrides = ("--precision.mode", "fp8", "--precision.recipe", recipe, "--batch.global", "1")
    config = run_config(tmp_path, *overrides, preset=preset)
    model, optimizer = build_model(config, world_of(), torch.bfloat16, seed=1)
    monkeypatch.setattr(native, "runs", lambda x: x.dtype != torch.float64)
    with Compare(launched) as compared:
        for step in (1, 2):
            train_step(model, optimizer, random_batches(config), step=step, lr=1e-3, tokens=128)
    assert compared.seen >= {"norm_forward", "norm_forward_fp8", "norm_backward", "quantize", "square_sum", "adamw_"}
