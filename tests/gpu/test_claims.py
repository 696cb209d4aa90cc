"""What README.md and docs/ say of GPUs, where no other file here tests it. Where each claim is tested:

- The same code on a GPU and on a CPU, in fp32 and bf16: test_engine.py. NCCL, every layout, tp, pp, dp, schedules,
  FP8 with several ranks, reduction in bf16, gathering in FP8, fine-tuning, generation: test_ranks.py.
- `parallel.compile`, `run.deterministic`: test_engine.py. Recompute saves memory, `check` and the start know what fits:
  here.
- A run resumes bitwise, SIGTERM saves a checkpoint and exits with code 75: here.
- Kernels: every other file. Everything runs without them, `engine env` says what runs, `ops` chooses: here.
- FP8: test_fp8.py, test_fp8_sm90.py, test_quantize.py, training in each recipe in test_engine.py.
- `tools/bench/gpu.sh` builds, tests and measures: it runs these files.
"""

import gc

import pytest
import torch

from engine.checkpoint.run_directory import open_checkpoint
from engine.cli.env import environment
from engine.ops import native
from engine.ops.choice import _PACKAGES, installed
from engine.parallel.layout import Layout, init_distributed
from engine.plan.memory import GIB, available, estimate_fullest
from engine.testing.parity import deviation
from engine.testing.rank_cases import RankPlace, References, generate_ids
from engine.testing.runs import (
    losses,
    random_batches,
    read_records,
    run_config,
    run_training,
    run_until_signal,
    write_dataset,
)
from engine.train.step import build_model, train_step
from tests.gpu.test_engine import BF16, FP8, small, train
from tests.train.test_run import assert_bitwise, tensors

DEVICE = "cuda"
ATTENTION = ("flash_attn", "flash_attn_3", "flash_attn_4", "cudnn", "te")


@pytest.mark.parametrize("overrides", [BF16, *FP8], ids=lambda o: " ".join(o[1::2]))
def test_a_run_stopped_by_sigterm_resumes_bitwise(tmp_path, overrides):
    write_dataset(tmp_path / "corpus")
    settings = small(*overrides, "--run.device", DEVICE, "--run.deterministic", "true", "--train.eval_steps", "1")
    whole, cut = (
        run_config(tmp_path, *settings, "--run.dir", str(tmp_path / name), steps=30) for name in ("whole", "cut")
    )
    expected = run_training(whole)
    (account,) = run_until_signal(cut, 1, step=5)
    stopped_at = open_checkpoint(cut.run.dir).state.step
    assert 5 <= stopped_at < 30
    assert account == f"stopped by SIGTERM after step {stopped_at}; the state is saved"
    assert losses(run_training(cut)) == losses(expected)
    assert_bitwise(tensors(whole), tensors(cut))
    exits = [event["code"] for event in read_records(cut.run.dir / "events.jsonl") if event["event"] == "exit"]
    assert exits == [75, 0]


def test_fine_tuning_and_generation_give_what_a_cpu_gives(tmp_path_factory):
    """Packed conversations in fp32; then text sampled by the same model on both devices."""
    on_cpu, on_gpu = (References(tmp_path_factory.mktemp(device), device) for device in ("cpu", DEVICE))
    tolerances = {"loss": 1e-4, "gradient norm": 1e-3, "parameters": 1e-3}
    assert deviation(on_gpu.outcome("packed"), on_cpu.outcome("packed")).problems(tolerances) == []
    run = on_cpu.run("packed")
    (expected, _), (ids, _) = (generate_ids(run, 1, RankPlace(device, "gloo"))[0] for device in ("cpu", DEVICE))
    assert len(set(ids)) > 6
    assert ids == expected


def choices() -> list[tuple[str, str, str]]:
    """Setting of `ops`, implementation, FP8 recipe or "" for bf16; of other packages, those that are installed."""
    found = [("norm", "triaxis", ""), ("norm", "torch", ""), ("attention", "sdpa", ""), ("attention", "varlen", "")]
    found += [("norm", package, "") for package in ("apex", "te") if installed(package)]
    found += [("attention", package, "") for package in ATTENTION if installed(package)]
    found += [("fp8_matmul", impl, "tensorwise") for impl in ("cublaslt", "torch")]
    return [*found, ("fp8_matmul", "cublaslt", "blockwise")]


@pytest.mark.parametrize("name, impl, recipe", choices())
def test_each_implementation_trains(tmp_path, name, impl, recipe):
    overrides = next((o for o in FP8 if recipe == o[-1]), BF16)
    lr = 1e-4 if recipe else 1e-3
    auto, chosen = (train(tmp_path, DEVICE, small(*overrides, *more), lr=lr) for more in ((), (f"--ops.{name}", impl)))
    torch.testing.assert_close(chosen[0], auto[0], rtol=5e-3, atol=0)
    torch.testing.assert_close(chosen[1], auto[1], rtol=5e-2, atol=0)


@pytest.mark.parametrize(
    "setting, impl, message",
    [(setting, package, "which is not installed") for setting, package in
     (("norm", "apex"), ("norm", "te"), *(("attention", package) for package in ATTENTION)) if not installed(package)]
    + [("fp8_matmul", "triaxis", "refused on a GPU")],
)  # fmt: skip
def test_an_implementation_that_cannot_run_fails_at_the_start(tmp_path, setting, impl, message):
    write_dataset(tmp_path / "corpus")
    precision = BF16 if setting != "fp8_matmul" else FP8[2]
    overrides = small(*precision, "--run.device", DEVICE, f"--ops.{setting}", impl)
    with pytest.raises(RuntimeError, match=rf"ops\.{setting} = {impl} .*{message}"):
        run_training(run_config(tmp_path, *overrides))
    assert not read_records(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.parametrize("overrides", [BF16, FP8[0]], ids=lambda o: " ".join(o[1::2]))
def test_everything_runs_without_csrc(tmp_path, monkeypatch, overrides):
    lr = 1e-4 if "fp8" in overrides else 1e-3
    with_kernels = train(tmp_path, DEVICE, small(*overrides), lr=lr)
    calls = []
    monkeypatch.setattr(native, "WHY_NOT", "csrc was not built")
    monkeypatch.setattr(native, "runs", lambda x: bool(calls.append(x)))
    plain = train(tmp_path, DEVICE, small(*overrides), lr=lr)
    assert calls
    torch.testing.assert_close(plain[0], with_kernels[0], rtol=5e-3, atol=0)
    torch.testing.assert_close(plain[1], with_kernels[1], rtol=5e-2, atol=0)


def test_env_says_what_runs_here():
    report = "\n".join(environment())
    assert torch.cuda.get_device_name() in report
    assert "csrc        CUDA kernels for " in report
    assert report.count("csrc kernel") == 7
    for package in _PACKAGES:
        assert installed(package) == ("not installed" not in _line(report, package))


def _line(report: str, package: str) -> str:
    return next(line for line in report.splitlines() if line.startswith(f"{_PACKAGES[package][0]} "))


# About 0.5e9 parameters, 9 GB with gradients and moments, and 5 GB of activations.
LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_layers": 10, "num_heads": 16, "num_kv_heads": 16}
LARGE_SETTINGS = tuple(text for name, value in LARGE.items() for text in (f"--model.{name}", str(value)))


def large(tmp_path, *overrides: str):
    sizes = (*LARGE_SETTINGS, "--model.head_dim", "128", "--data.seq_length", "8192", "--model.max_position", "8192")
    return run_config(tmp_path, *sizes, *BF16, *overrides)


def peak_of(config) -> tuple[int, list[float]]:
    """Peak bytes that PyTorch reserved in three steps, and the losses."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, optimizer = build_model(config, init_distributed(DEVICE), torch.bfloat16, seed=1)
    batches, tokens = random_batches(config), config.batch.global_ * config.data.seq_length
    results = [train_step(model, optimizer, batches, step=step, lr=1e-4, tokens=tokens) for step in (1, 2, 3)]
    found = [result.loss.item() for result in results]
    peak = torch.cuda.max_memory_reserved()
    del model, optimizer, results
    gc.collect()
    return peak, found


def test_recompute_saves_memory_and_check_knows_how_much_is_needed(tmp_path):
    peaks, estimates, values = [], [], []
    for recompute in ("none", "selective", "full"):
        config = large(tmp_path, "--parallel.recompute", recompute)
        estimates.append(estimate_fullest(config, Layout(), torch.bfloat16, DEVICE).total)
        if estimates[-1] > torch.cuda.mem_get_info()[0]:
            pytest.skip(f"needs {estimates[-1] / GIB:.0f} GiB of free GPU memory")
        peak, loss = peak_of(config)
        peaks.append(peak)
        values.append(loss)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.85 * peaks[0]
    for peak, estimate in zip(peaks, estimates, strict=True):
        assert 0.6 * estimate < peak + 2 * GIB  # the estimate has 2 GiB for CUDA itself
        assert peak < estimate
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-3)


def test_what_does_not_fit_into_the_gpu_is_refused_at_the_start(tmp_path):
    memory = torch.cuda.get_device_properties(0).total_memory
    assert available(torch.device(DEVICE, 0), 1) == memory
    write_dataset(tmp_path / "corpus")
    sizes = ("--model.hidden_size", "16384", "--model.intermediate_size", "65536", "--model.num_heads", "128")
    config = run_config(tmp_path, *sizes, *BF16, "--run.device", DEVICE, "--model.num_layers", "80")
    with pytest.raises(RuntimeError, match=rf"a GPU has {memory / GIB:.1f} GiB. What would fit:"):
        run_training(config)
