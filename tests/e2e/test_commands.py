"""The commands that people type, as real processes."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from engine.testing.runs import losses, read_records
from tests.e2e.commands import ENVIRONMENT, ROOT, python, start


def tiny(workspace: Path, *overrides: str) -> list[str]:
    """Overrides that turn the 7B example into a run of seconds."""
    return [
        *("--model.preset", "tiny", "--run.dir", str(workspace / "run"), "--precision.mode", "fp32"),
        *("--data.tokenizer", "byte", "--data.train", f"[{{path: {workspace / 'corpus'}}}]", "--data.seq_length", "64"),
        *("--data.split", "[80, 20, 0]", "--batch.global", "4", "--lr_schedule.warmup_steps", "2"),
        *("--train.steps", "4", "--train.eval_steps", "1", "--log.interval", "1"),
        *("--ops.measure", "false", *overrides),
    ]


EXAMPLE = str(ROOT / "examples/pretrain_7b.sh")


@pytest.mark.parametrize(
    "command",
    [
        ["bash", EXAMPLE],
        ["torchrun", "--standalone", "--nproc-per-node", "2", EXAMPLE],
        ["torchrun", "--standalone", "--no-python", "--nproc-per-node", "2", EXAMPLE],
    ],
    ids=["bash", "torchrun", "torchrun --no-python"],
)
def test_the_7b_example_starts_in_three_ways(workspace, command):
    done = start([*command, *tiny(workspace)], workspace, NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    assert "2 rank(s) on cpu, gloo" in done.stdout
    assert "links       2 groups of this rank connected in " in done.stdout
    assert "finished: 4 steps" in done.stdout
    values = losses(read_records(workspace / "run/metrics.jsonl"))
    assert len(values) == 4
    before = done.stdout.splitlines().index(next(line for line in done.stdout.splitlines() if line.startswith("step ")))
    assert before + len(done.stderr.splitlines()) <= 40
    assert (workspace / "run/tensorboard").exists()


def test_the_7b_example_says_with_numbers_that_a_laptop_is_too_small(tmp_path):
    done = start(["bash", EXAMPLE], tmp_path, NPROC_PER_NODE="2")
    assert done.returncode == 72
    assert "tp 2 × pp 1 × dp 1 needs" in done.stderr
    assert "GiB per rank (parameters 6.3, gradients 12.6, optimizer 37.7, activations 9." in done.stderr
    assert "What would fit:" in done.stderr
    assert "model.preset = tiny" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("exit 72:")
    assert "Traceback" not in done.stderr and "torchrun" not in done.stderr  # no rank was started
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "used"), [({}, "32"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8")])
def test_the_example_sets_the_number_of_hardware_queues_unless_it_is_set(workspace, given, used):
    done = start(["bash", EXAMPLE, "--dry-run", *tiny(workspace)], workspace, **given)
    assert done.returncode == 0, done.stderr
    assert f" CUDA_DEVICE_MAX_CONNECTIONS={used} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170 torchrun " in done.stdout
    assert " --nproc-per-node 2 -m engine train " in done.stdout  # the default on a CPU


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(workspace):
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", EXAMPLE]
    command += tiny(workspace, "--train.steps", "300", "--checkpoint.interval", "0", "--train.eval_steps", "0")
    process = subprocess.Popen(
        command, cwd=workspace, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(read_records(workspace / "run/metrics.jsonl")) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "exit 75: rerun the same command to resume" in errors
    events = read_records(workspace / "run/events.jsonl")
    assert events[-1] | {"time": 0} == {
        "event": "exit",
        "time": 0,
        "code": 75,
        "reason": events[-1]["reason"],
        "advice": "rerun the same command to resume",
    }
    step = next(event["step"] for event in events if event["event"] == "save")
    done = start([*command, "--train.steps", str(step + 1)], workspace)
    assert done.returncode == 0, done.stderr
    assert f"resumes from {workspace}/run/checkpoints/step_{step:08d}" in done.stdout


def engine(*arguments: str) -> subprocess.CompletedProcess:
    return python("-m", "engine", *arguments)


def test_check_tells_what_follows_from_the_7b_configuration():
    done = engine("check", "examples/configs/llama2_7b.yaml", "--gpus", "8", "--nodes", "8")
    assert done.returncode == 0, done.stderr
    for part in (
        "6,738,415,616 parameters, 42.86 GFLOP per token",
        "flops       6 · multiplying parameters + 6 · layers · sequence · heads · head size (causal attention)",
        "64 ranks = tp 1 × pp 1 × dp 64\n            tp and pp auto: the smallest tp × pp whose fullest rank, 6",
        "1024 sequences = dp 64 × 16 microbatches of 1; 4,194,304 tokens per step",
        "100,000 steps = 419,430,400,000 tokens",
        "0–63   embedding, 0–31, head  6,738,415,616     12.6       25.1        1.2  ",
        "bfloat16, 8 nodes (--nodes) with 8 GPUs each (--gpus) of 80 GiB (--gpu-memory-gib)",
    ):
        assert part in done.stdout


def test_check_tells_who_holds_which_layers():
    options = ["--gpus", "8", "--nodes", "8", "--parallel.tp", "2", "--parallel.pp", "4"]
    done = engine("check", "examples/configs/llama2_7b.yaml", *options, "--parallel.schedule", "zero_bubble")
    assert done.returncode == 0, done.stderr
    for part in (
        "64 ranks = tp 2 × pp 4 × dp 8; neighbors differ in tp, then in dp, then in pp\n            as configured",
        "zero_bubble; its bubble adds 0.8% to the time of a step",
        "stage 0     0–15   embedding, 0–7  ",
        "stage 3     48–63  24–31, head     ",
    ):
        assert part in done.stdout


def test_check_shows_a_layout_that_does_not_fit_and_what_would():
    options = ["--gpus", "8", "--gpu-memory-gib", "40", "--parallel.tp", "1", "--parallel.pp", "1"]
    done = engine("check", "examples/configs/llama2_7b.yaml", *options)
    assert done.returncode == 72
    assert "stage 0     0–7    embedding, 0–31, head" in done.stdout
    assert "a GPU has 40.0 GiB. What would fit:\n  parallel.tp = auto and parallel.pp = auto: " in done.stderr


def test_config_prints_the_resolved_file_and_the_schema():
    done = engine("config", "examples/configs/tiny.yaml", "--train.steps", "70")
    assert yaml.safe_load(done.stdout)["train"]["steps"] == 70
    schema = json.loads(engine("config", "--schema").stdout)
    assert schema["title"] == "Config"
    assert "qwen3" in schema["$defs"]["ModelConfig"]["properties"]["family"]["enum"]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["check", "examples/configs/llama2_7b.yaml", "--gpus", "37"], 64, "the nearest that work are"),
        (["check", "examples/configs/llama2_7b.yaml", "--gpus", "0"], 64, "--gpus 0: expected at least 1"),
        (
            ["check", "examples/configs/tiny.yaml", "--nodes", "0"],
            64,
            "--nodes 0: expected at least 1",
        ),
        (["check", "examples/configs/none.yaml"], 64, "no configuration file"),
        (["train", "examples/configs/tiny.yaml", "--trian.steps", "5"], 64, "did you mean 'train'?"),
        (["train", "examples/configs/tiny.yaml", "--data.train", "[{path: /nowhere}]"], 65, "/nowhere"),
        (["train", "examples/configs/llama2_7b.yaml", "--model.num_layers", "500"], 72, "GiB per rank"),
    ],
)
def test_bad_commands_end_with_their_code(arguments, code, expected):
    done = engine(*arguments)
    assert done.returncode == code
    assert expected in done.stderr
    assert f"exit {code}: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_misspelt_checkpoint_is_an_error(workspace):
    options = tiny(workspace, "--run.resume", str(workspace / "chekpoints"))
    done = engine("train", str(ROOT / "examples/configs/llama2_7b.yaml"), *options)
    assert done.returncode == 66
    assert "no such checkpoint directory" in done.stderr
    assert not (workspace / "run").exists()
