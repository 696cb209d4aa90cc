"""cuBLASLt's algorithms for FP8 matmuls on a GPU: each candidate computes the same, and a run measures and keeps them.

The logic without a GPU: tests/csrc/test_cublaslt.py. Times: tools/bench/fp8_algorithms.py.
"""

import pytest
import torch

from engine.ops.fp8 import add_scaled_matmul, scaled_matmul
from engine.ops.fp8_algorithms import NUM_CANDIDATES, Fp8Plans, Plan
from engine.ops.quantize import QuantizedTensor
from engine.testing.runs import run_config, write_dataset
from engine.train.run import train
from tests.gpu.conftest import DEVICE
from tests.gpu.test_fp8 import ACCURATE, BF16, PAIRS, error, operands

SIZES = [(256, 384, 512), (2048, 4096, 11008)]


DTYPES = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 4}  # as triaxis_dtype
SCALINGS = ("tensorwise", "block_1x128", "block_128x128")  # as triaxis_scaling
F32_OUT, BF16_OUT = 0, 1


def plan_of(a: QuantizedTensor, b: QuantizedTensor, out_dtype: int) -> Plan:
    """The plan of a matmul that has run."""
    (m, k), n = a.values.shape, b.values.shape[0]
    dtypes = DTYPES[a.values.dtype], DTYPES[b.values.dtype], out_dtype
    wanted = (m, n, k, *dtypes, SCALINGS.index(a.scaling), SCALINGS.index(b.scaling), 0)
    (plan,) = (plan for plan in Fp8Plans().existing() if plan[1:] == wanted)
    return plan


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_each_candidate_computes_the_matmul(emulated, pair, size):
    a, b, expected = operands(pair, size)
    scaled_matmul(a, b, torch.bfloat16, impl="cublaslt")
    plans, plan = Fp8Plans(), plan_of(a, b, BF16_OUT)
    candidates = plans.candidates(plan)
    assert 1 <= len(candidates) <= NUM_CANDIDATES and len(set(candidates)) == len(candidates)
    for algorithm in candidates:
        plans.use(plan, algorithm)
        assert error(scaled_matmul(a, b, torch.bfloat16, impl="cublaslt"), expected) < BF16


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair", ["tensors", "a gradient with a weight", "1x128 with 1x128"])
def test_each_candidate_accumulates(emulated, pair, size):
    a, b, product = operands(pair, size)
    start = torch.randn_like(product) * product.std()
    add_scaled_matmul(start.clone(), a, b, impl="cublaslt")
    plans, plan = Fp8Plans(), plan_of(a, b, F32_OUT)
    for algorithm in plans.candidates(plan):
        plans.use(plan, algorithm)
        add_scaled_matmul(out := start.clone(), a, b, impl="cublaslt")
        assert error(out - start, product) < ACCURATE


@pytest.mark.parametrize("pair", PAIRS)
def test_the_measured_one_is_a_candidate(emulated, pair):
    a, b, expected = operands(pair, SIZES[0])
    scaled_matmul(a, b, torch.bfloat16, impl="cublaslt")
    plans, plan = Fp8Plans(), plan_of(a, b, BF16_OUT)
    algorithm = plans.measure(plan)
    assert algorithm in plans.candidates(plan)
    plans.use(plan, algorithm)
    assert error(scaled_matmul(a, b, torch.bfloat16, impl="cublaslt"), expected) < BF16
    key = plans.measured_key(plan)
    assert key["gpu"] == torch.cuda.get_device_name() and key["cublaslt"] >= 120000 and key["driver"] >= 12000


def test_what_is_no_algorithm_is_refused(emulated):
    a, b, expected = operands("tensors", SIZES[0])
    scaled_matmul(a, b, torch.bfloat16, impl="cublaslt")
    with pytest.raises(ValueError, match="FP8 matmul 256 × 384 × 512"):
        Fp8Plans().use(plan_of(a, b, BF16_OUT), bytes(64))
    assert error(scaled_matmul(a, b, torch.bfloat16, impl="cublaslt"), expected) < BF16


def test_a_run_measures_at_its_start_and_reads_what_was_measured(tmp_path, capsys, monkeypatch):
    write_dataset(tmp_path / "corpus")
    given = ("--run.device", DEVICE, "--precision.mode", "fp8", "--ops.measure", "true")
    config = run_config(tmp_path, *given, "--ops.measured_dir", str(tmp_path / "machine"), steps=2)
    train(config)
    assert "as measured" in capsys.readouterr().out
    kept = {path.name for path in (tmp_path / "machine").iterdir()}
    assert kept == {path.name for path in (config.run.dir / "measured").iterdir()} and kept
    monkeypatch.setattr(Fp8Plans, "measure", lambda *_: pytest.fail("measured again"))
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})}))
    assert "as measured" in capsys.readouterr().out
