import pytest
import torch

from engine.model.families import PRESETS
from engine.model.parameters import parameter_table
from engine.plan.throughput import flops_per_token, peak_tflops
from engine.testing.runs import run_config


@pytest.mark.parametrize(
    ("preset", "seq_length", "gflop"),
    [("llama2-7b", 4096, 42.86), ("llama3-8b", 8192, 51.47)],  # published, with causal attention
)
def test_flops_per_token(tmp_path, preset, seq_length, gflop):
    assert preset in PRESETS
    model = run_config(tmp_path, preset=preset).model
    assert flops_per_token(model, parameter_table(model), seq_length) / 1e9 == pytest.approx(gflop, abs=0.005)


def test_the_peak_of_a_cpu_is_not_known():
    assert peak_tflops(torch.device("cpu")) is None
