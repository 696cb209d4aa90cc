import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from engine.checkpoint.load import load_decoder
from engine.testing.runs import run_config, run_training

TOOLS = Path(__file__).parents[2] / "tools"


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def greedy(directory: Path, *options: str) -> str:
    done = tool("generate", directory, "--prompt", "abcabcabc", "--max-new-tokens", 12, "--temperature", 0, *options)
    assert done.returncode == 0, done.stderr
    assert "12 tokens in" in done.stderr
    return done.stdout


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3"])
def test_a_run_a_checkpoint_and_its_export_write_the_same_text(workspace, preset):
    config = run_config(workspace, preset=preset, steps=30)
    run_training(config)
    exported, imported = workspace / "hf", workspace / "imported"
    assert tool("convert_checkpoint", "--from", config.run.dir, "--to", exported, "--dtype", "fp32").returncode == 0
    assert tool("convert_checkpoint", "--from", exported, "--to", imported).returncode == 0
    text = greedy(config.run.dir)
    assert text.startswith("abcabcabc")
    assert len(text.strip()) > 9
    assert greedy(config.run.dir / "checkpoints/step_00000030") == text
    assert greedy(exported) == text
    assert greedy(imported) == text

    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    _decoder, tokenizer = load_decoder(exported, torch.float32, torch.device("cpu"))
    ids = torch.tensor([tokenizer.encode("abcabcabc")])
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    assert tokenizer.decode(theirs) == text.removesuffix("\n")


def test_what_cannot_be_generated_from(tmp_path):
    missing = tool("generate", tmp_path / "none", "--prompt", "x")
    assert missing.returncode == 66
    assert "no such checkpoint directory" in missing.stderr
    empty = tool("generate", tmp_path, "--prompt", "x")
    assert empty.returncode == 66
    assert "holds no checkpoint" in empty.stderr
    assert tool("generate", tmp_path, "--prompt", "x", "--top-p", 0).returncode == 64
    latin = tool("generate", tmp_path, "--prompt", b"\xe4".decode(errors="surrogateescape"))
    assert (latin.returncode, "--prompt is not UTF-8" in latin.stderr) == (64, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    done = tool("generate", tmp_path, "--prompt", "x", "--device", "cuda")
    assert done.returncode == 64
    assert "--device cuda: this machine shows no GPU" in done.stderr
