"""Fine-tuning as people do it: a model directory and conversations in, a model directory that chats out."""

import json
from pathlib import Path

import pytest

from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import ConfigError
from engine.testing.runs import read_records
from tests.e2e.commands import ROOT, python, start
from tests.e2e.models import write_llama

transformers = pytest.importorskip("transformers")

EXAMPLE = str(ROOT / "examples/sft_7b.sh")
ANSWERS = {"What is 2 + 2?": "Four.", "Who are you?": "A small model.", "Say hello": "Hello, you!", "Bye": "See you."}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as other programs leave it, with a tokenizer and no chat template; and data for it."""
    folder = tmp_path_factory.mktemp("sft")
    model = write_llama(folder / "base")
    with (folder / "chats.jsonl").open("w") as file:
        for question, answer in ANSWERS.items():
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    done = python(
        *("tools/preprocess_data.py", "--task", "sft", "--input", folder / "chats.jsonl", "--chat-template", "chatml"),
        *("--tokenizer-model", model, "--output-prefix", folder / "chats", "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    return folder


def overrides(base: Path, run: Path, steps: int) -> list[str]:
    return [
        *("--model.from_hf", str(base / "base"), "--run.dir", str(run), "--precision.mode", "fp32"),
        *("--data.train", f"[{{path: {base / 'chats_sft'}}}]", "--data.split", "[1, 0, 0]", "--data.seq_length", "128"),
        *("--batch.global", "2", "--optimizer.lr", "5e-3", "--train.steps", str(steps), "--train.epochs", "0"),
        *("--train.early_stopping", "0", "--train.eval_steps", "0", "--checkpoint.keep_best", "false"),
        *("--log.interval", "1", "--ops.measure", "false"),
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["bash", EXAMPLE],
        ["torchrun", "--standalone", "--nproc-per-node", "2", EXAMPLE],
        ["torchrun", "--standalone", "--no-python", "--nproc-per-node", "2", EXAMPLE],
    ],
    ids=["bash", "torchrun", "torchrun --no-python"],
)
def test_the_example_starts_in_three_ways(base, tmp_path, command):
    done = start([*command, *overrides(base, tmp_path / "run", 2)], tmp_path, NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    for part in (
        "sequences   train: 4 conversations in 2 sequences",
        f"with the weights of {base / 'base'}",
        "finished: 2 steps",
    ):
        assert part in done.stdout
    assert len(read_records(tmp_path / "run/metrics.jsonl")) == 2


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that has learned its answers by heart, exported."""
    folder = tmp_path_factory.mktemp("tuned")
    done = start(["bash", EXAMPLE, *overrides(base, folder / "run", 80)], folder, NPROC_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    done = python("tools/convert_checkpoint.py", "--from", folder / "run", "--to", folder / "hf", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_exported_directory_chats_in_transformers_and_stops(tuned):
    hf = tuned / "hf"
    ends = json.loads((hf / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [0, 2]  # end of document, end of turn
    assert "<|im_start|>" in (hf / "chat_template.jinja").read_text()
    pipe = transformers.pipeline("text-generation", model=str(hf))
    for question, answer in ANSWERS.items():
        reply = pipe([{"role": "user", "content": question}], max_new_tokens=40, do_sample=False)
        assert reply[0]["generated_text"][-1] == {"role": "assistant", "content": answer}


@pytest.mark.parametrize("where", ["run", "hf"])
def test_generate_gives_the_same_answers(tuned, where):
    for question, answer in ANSWERS.items():
        done = python("tools/generate.py", tuned / where, "--chat", "--prompt", question, "--temperature", 0)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == answer


def test_what_was_tuned_can_be_tuned_again(tuned, base, tmp_path):
    """The export as a start: its template is now its own, and its answers are known."""
    done = python(
        *("tools/preprocess_data.py", "--task", "sft", "--input", base / "chats.jsonl", "--workers", 1),
        *("--tokenizer-model", tuned / "hf", "--output-prefix", tmp_path / "chats"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "chats_sft.mask.bin").read_bytes() == (base / "chats_sft.mask.bin").read_bytes()
    again = overrides(base, tmp_path / "run", 1)
    again[1] = str(tuned / "hf")
    done = start(["bash", EXAMPLE, *again], tmp_path, NPROC_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    assert read_records(tmp_path / "run/metrics.jsonl")[0]["loss"] < 0.2


def test_a_directory_without_weights_is_refused_before_anything_starts(base, tmp_path):
    command = ["check", "examples/configs/sft_llama2_7b.yaml", *overrides(base, tmp_path / "run", 1)]
    assert python("-m", "engine", *command).returncode == 0
    command[command.index("--model.from_hf") + 1] = str(base)
    done = python("-m", "engine", *command)
    assert done.returncode == ConfigError.exit_code
    assert f"model.from_hf = {base}: {base / 'config.json'} is missing" in done.stderr


def test_the_template_of_other_data_comes_along_in_an_import(tuned):
    directory = HuggingFaceDirectory(tuned / "hf")
    assert {path.name for path in directory.tokenizer_files} >= {"chat_template.jinja", "generation_config.json"}
    names = {path.name for path in load_tokenizer(str(tuned / "hf")).files}
    assert names >= {"chat_template.jinja", "generation_config.json", "tokenizer_config.json", "tokenizer.json"}
