"""The program that converts checkpoints: both ways, seen from the input; messages and exit codes."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from engine.checkpoint.manifest import State
from engine.checkpoint.run_directory import open_checkpoint
from engine.checkpoint.save import save
from engine.checkpoint.shares import StateSlice
from engine.cli.convert import TensorProgress, main
from engine.config.schema import ModelConfig
from engine.data.tokenizers.load import load_tokenizer
from engine.errors import CheckpointError, ConfigError
from engine.model.families import PRESETS
from engine.model.parameters import logical_shapes
from engine.parallel.table import Rectangle
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece

PROGRAM = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
MODEL = ModelConfig(**{**PRESETS["tiny"], "num_layers": 1, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8})


def convert(*arguments: object) -> None:
    """The program in this process."""
    main([str(argument) for argument in arguments])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", "byte")


def write_run(run_dir: Path, tokenizer: str) -> Path:
    """A run with one checkpoint."""
    torch.manual_seed(0)
    pieces = [
        StateSlice("param", name, shape, Rectangle((0,) * len(shape), shape), torch.randn(shape))
        for name, shape in logical_shapes(MODEL).items()
    ]
    save(
        run_dir, pieces, State(5, 20, 80, "data", {}),
        config_yaml=yaml.safe_dump({"model": MODEL.model_dump(mode="json"), "data": {"tokenizer": tokenizer}}),
        tokenizer_files=[], keep_last=1, rank=0, world_size=1, first_problem=lambda problem: problem,
    )  # fmt: skip
    return run_dir


def test_both_ways_and_the_next_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert("--from", run_dir / "checkpoints", "--to", tmp_path / "hf", "--dtype", "fp32")
    said = capsys.readouterr().out
    assert "exported 12 tensors" in said
    assert "(step 5)" in said
    assert "read back and verified" in said
    assert f"triaxis generate {tmp_path / 'hf'} --prompt" in said

    convert("--from", tmp_path / "hf", "--to", tmp_path / "imported")
    said = capsys.readouterr().out
    assert "imported 12 tensors" in said
    assert f"triaxis generate {tmp_path / 'imported'} --prompt" in said
    assert f"run.resume to {tmp_path / 'imported'}" in said
    before, after = open_checkpoint(run_dir), open_checkpoint(tmp_path / "imported")
    for name in logical_shapes(MODEL):
        assert torch.equal(before.read(name), after.read(name))


def test_a_checkpoint_directory_is_exported_as_bf16_unless_told(run_dir: Path, tmp_path: Path) -> None:
    convert("--from", run_dir / "checkpoints" / "step_00000005", "--to", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def test_a_conversion_is_verified_as_it_is_made_and_later(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, run = tmp_path / "hf", tmp_path / "imported"
    for source, target in ((run_dir, hf), (hf, run), (hf, run)):
        convert("--from", source, "--to", target, "--verify")
        said = capsys.readouterr().out
        assert "verify     tensors     equal: 12 tensors, bitwise in bfloat16" in said
        assert f"verified: {target}.verify.json" in said
        report = json.loads(target.with_name(f"{target.name}.verify.json").read_text())
        assert report["huggingface"] == str(hf) and report["checks"]["tensors"]["result"] == "equal"
    assert "imported 12 tensors" not in said  # it was there
    (hf / "config.json").write_text((hf / "config.json").read_text().replace("10000.0", "10001.0"))
    with pytest.raises(CheckpointError, match=r"hf differs from .*step_00000005 in tensors; see .*hf\.verify\.json"):
        convert("--from", run_dir, "--to", hf, "--verify")
    assert "the configurations differ: rope_theta 10000.0 and 10001.0" in capsys.readouterr().out


def test_progress_shows_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TensorProgress({"a": (10,), "b": (30,)})
    progress._shown_at -= 10
    progress("a", 10)
    progress("b", 30)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "25.0%" in err and "1/2 tensors" in err and "GB/s" in err and "ETA 0:00" in err


def test_what_cannot_be_converted(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such directory: --from .*misspelt"):
        convert("--from", tmp_path / "misspelt", "--to", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a Hugging Face directory"):
        convert("--from", tmp_path / "empty", "--to", tmp_path / "out")
    for file, reason in {
        "gguf/m.gguf": r"GGUF file.*gguf_file=NAME",
        "lora/adapter_config.json": r"adapter of peft.*merge_and_unload",
        "models--a--b/snapshots/0af1/config.json": r"name a snapshot: .*snapshots/0af1",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
        with pytest.raises(CheckpointError, match=reason):
            convert("--from", tmp_path / file.split("/")[0], "--to", tmp_path / "out")
    with pytest.raises(CheckpointError, match="GGUF file"):
        convert("--from", tmp_path / "gguf/m.gguf", "--to", tmp_path / "out")
    (tmp_path / "megatron/iter_0000010").mkdir(parents=True)
    (tmp_path / "megatron/iter_0000010/__0_0.distcp").touch()
    for name in ("megatron", "megatron/iter_0000010"):
        with pytest.raises(CheckpointError, match=r"Megatron-Core writes it; its index is a pickle.*export_ckpt"):
            convert("--from", tmp_path / name, "--to", tmp_path / "out")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        convert("--from", run_dir, "--to", run_dir)
    convert("--from", run_dir, "--to", tmp_path / "hf")
    with pytest.raises(ConfigError, match="--dtype bf16 applies only to exports"):
        convert("--from", tmp_path / "hf", "--to", tmp_path / "out", "--dtype", "bf16")
    assert not (tmp_path / "out").exists()


def test_as_a_program_it_ends_with_the_code_of_the_error(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--from", str(tmp_path / "misspelt"), "--to", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=PROGRAM.parents[1], env={"PYTHONPATH": "."})
    assert ended.returncode == 66
    assert "error: no such directory: --from" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_shards_of_a_size_and_weights_alone(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "the model"
    convert("--from", run_dir, "--to", out, "--dtype", "fp16", "--shard-gb", 1e-5, "--without-tokenizer")
    assert len(list(out.glob("model-*.safetensors"))) > 2 and not (out / "tokenizer.json").exists()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    assert "triaxis generate" not in capsys.readouterr().out
    convert("--from", run_dir, "--to", tmp_path / "the other model")
    assert f"triaxis generate {shlex.quote(str(tmp_path / 'the other model'))} --prompt" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--shard-gb 0\.0; expected a positive number"):
        convert("--from", run_dir, "--to", tmp_path / "other", "--shard-gb", 0)
    with pytest.raises(ConfigError, match="apply only to exports"):
        convert("--from", out, "--to", tmp_path / "other", "--without-tokenizer")


def test_without_the_tokenizer_its_ids_are_kept(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert("--from", run_dir, "--to", tmp_path / "hf", "--without-tokenizer")
    assert "only the ids of its special tokens" in capsys.readouterr().out
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == 256


def test_a_tokenizer_that_is_gone_does_not_keep_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path / "run", "gone.model")
    with pytest.raises(ConfigError, match="gone"):
        convert("--from", run_dir, "--to", tmp_path / "hf")
    convert("--from", run_dir, "--to", tmp_path / "hf", "--without-tokenizer")
    assert "no ids of special tokens: tokenizer 'gone.model': no such file" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None


def test_an_import_says_what_its_tokenizer_is(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And names the command that generates text only where it will find one."""
    sentencepiece = train_sentencepiece(standard_library_texts(20_000), vocab_size=400)
    tiktoken, refused = b"IQ== 0\nIg== 1\n" * 9, "without a tokenizer, which text generation needs: "
    cases: list[tuple[dict[str, bytes], str]] = [
        ({"spiece.model": sentencepiece}, "tokenizer: spiece.model, 400 tokens"),
        ({"vocab.json": b"{}", "merges.txt": b""}, "GPT2Tokenizer or Qwen2Tokenizer, not None; AutoTokenizer"),
        ({"tokenizer.model": tiktoken}, "known for Llama 3, cl100k_base, o200k_base only; AutoTokenizer"),
        ({"mine.model": sentencepiece}, "mine.model is imported if it is named tokenizer.model"),
        ({}, "a directory without one"),
    ]
    for i, (files, said) in enumerate(cases):
        hf, run = tmp_path / f"hf{i}", tmp_path / f"run{i}"
        convert("--from", run_dir, "--to", hf, "--without-tokenizer")
        for name, content in files.items():
            (hf / name).write_bytes(content)
        capsys.readouterr()
        convert("--from", hf, "--to", run)
        out, usable = capsys.readouterr().out, i == 0
        assert said in out and (refused in out) != usable and ("triaxis generate" in out) == usable, out
    spec = open_checkpoint(tmp_path / "run0").tokenizer_spec
    assert spec is not None and load_tokenizer(spec).kind == "sentencepiece"


def test_an_import_says_where_transformers_gives_other_ids(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It makes a LlamaTokenizer anew, whatever the files say; and an embedding with fewer rows than the tokenizer."""
    hf = tmp_path / "hf"
    convert("--from", run_dir, "--to", hf, "--without-tokenizer")
    (hf / "tokenizer.model").write_bytes(train_sentencepiece(standard_library_texts(20_000), vocab_size=400))
    rows = "warning: the tokenizer has 400 entries, the embedding 257 rows"
    for name, content in (
        ("plain", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("rebuilt", {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    ):
        (hf / "tokenizer_config.json").write_text(json.dumps(content))
        capsys.readouterr()
        convert("--from", hf, "--to", tmp_path / name)
        out = capsys.readouterr().out
        assert rows in out
        differs = "read by transformers (LlamaTokenizer), gives other ids than the run's for ' a leading space'" in out
        assert differs == (name == "rebuilt"), out
