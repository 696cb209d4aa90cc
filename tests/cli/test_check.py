"""What `python -m engine check` prints; as a process it is tested in `e2e`."""

import re
from pathlib import Path

import numpy as np
import pytest

from engine.cli.check import check_run
from engine.data.storage.writer import IndexedDatasetWriter
from engine.errors import ConfigError, DataError, OutOfMemoryError
from engine.testing.runs import run_config, write_conversations


def printed(capsys, config, gpus: int = 1, nodes: int = 1, gpu_memory_gib: float = 80) -> list[str]:
    check_run(config, gpus, nodes, gpu_memory_gib)
    return capsys.readouterr().out.splitlines()


def test_a_run_that_works(workspace, capsys):
    lines = printed(capsys, run_config(workspace, "--train.eval_steps", "1"), 2)
    assert [re.sub(r"[\d,]+", "n", line) for line in lines if line.startswith("data")] == [
        "data        n tokens to train",
        "data        n tokens to valid",
    ]
    assert lines[0] == ("assumed     float32, 1 node (--nodes) with 2 ranks each (--ranks) and this machine's memory")
    assert lines[-1] == "ok"
    assert not any(line.startswith("microbatch") for line in lines)  # no speed of a CPU is known


def test_gpus_that_are_not_here(workspace, capsys):
    config = run_config(workspace, "--precision.mode", "bf16", "--run.device", "auto", "--parallel.tp", "auto")
    lines = printed(capsys, config, 2, nodes=2, gpu_memory_gib=40)
    gpus = "2 nodes (--nodes) with 2 GPUs each (--gpus) of 40 GiB (--gpu-memory-gib)"
    assert lines[0].startswith(f"assumed     bfloat16, {gpus}; this machine has ")
    assert not any(line.startswith("warning") for line in lines)
    assert "            tp auto: the smallest tp × pp whose fullest rank, 2.6 GiB, fits in 90% of 40.0 GiB" in lines
    table = lines.index("microbatch  batch.micro  microbatches  peak GiB  free GiB  predicted speed")
    assert lines[table + 1].split() == ["1", "1", "2.6", "37.4", "1.00×", "configured"]
    assert lines[table + 2].strip() == "batch.micro = 1 is the only one that fits"


def test_a_run_that_reads_its_data_too_often_and_is_silent_for_minutes(workspace, capsys):
    gpus = ("--precision.mode", "bf16", "--run.device", "auto", "--log.interval", "2000000000")
    lines = printed(capsys, run_config(workspace, *gpus, steps=1_000_000_000))
    silence, repetition = (line for line in lines if line.startswith("warning"))
    assert re.search(r"log is step 1000000000, about [\d:d ]+ after .* lower log.interval = 2000000000$", silence)
    assert re.search(
        r"corpus \d,\d{3},\d{3}\.\d times; .*add data, or lower train.steps = 1000000000 to 4\d\d$", repetition
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("--train.steps", "1", "--batch.global", "100000"), r"reads .* 241\.0 times; .*: add data$"),
        (("--train.steps", "100000", "--lr_schedule.warmup_steps", "9000"), "add data$"),
        (
            ("--train.steps", "100000", "--lr_schedule.warmup_steps", "9"),
            r"add data, or lower train.steps = 100000 to \d+$",
        ),
    ],
)
def test_a_shorter_run_is_advised_only_if_it_is_longer_than_its_warmup(workspace, capsys, overrides, said):
    (warning,) = (line for line in printed(capsys, run_config(workspace, *overrides)) if "more than 4 passes" in line)
    assert re.search(said, warning)


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (("--train.epochs", "60"), "60.0 times; .*: add data, or lower train.epochs = 60 to 16$"),
        (("--train.epochs", "60", "--train.steps", "50"), "25.0 times; .*: add data, or lower train.steps = 50 to 32$"),
        (("--train.epochs", "16", "--batch.global", "96"), ""),  # 2 steps have room for 24 passes
    ],
)
def test_the_setting_that_makes_a_fine_tuning_too_long_is_named(tmp_path, capsys, length, said):
    write_conversations(tmp_path / "corpus")
    config = run_config(tmp_path, "--task", "sft", "--data.split", "[1, 0, 0]", *length, steps=0)
    warnings = [line for line in printed(capsys, config) if "more than 16 passes" in line]
    assert [bool(re.search(said, line)) for line in warnings] == [True] * bool(said)


def test_a_large_document_that_is_wholly_in_one_part(workspace, capsys):
    write_documents(workspace / "corpus", [300] * 8 + [90_000])
    asked = ("--train.eval_steps", "1", "--data.split")
    (warning,) = (line for line in printed(capsys, run_config(workspace, *asked, "[90, 10, 0]")) if "split" in line)
    assert re.match(r"warning     97% of .*corpus are in the valid part although .* asks for 10%: ", warning)
    assert not any("split" in line for line in printed(capsys, run_config(workspace, *asked, "[10, 90, 0]")))


def write_documents(prefix: Path, lengths: list[int]) -> None:
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        writer.add_documents(np.full(sum(lengths), 97), lengths)


def test_files_that_are_not_here_are_named(tmp_path, capsys):
    lines = printed(capsys, run_config(tmp_path))
    assert f"data        {tmp_path / 'corpus.idx'} is not on this machine, so it is not checked" in lines
    assert lines[-1] == "not checked: 1 file not on this machine; the rest is ok"


def test_a_file_with_a_similar_name_is_suggested(tmp_path, capsys):
    for name in ("corpus_text_document.idx", "corpus_text_document.bin", "tokens.model"):
        (tmp_path / name).touch()
    lines = printed(capsys, run_config(tmp_path, "--data.tokenizer", str(tmp_path / "token.model")))
    missing = "is not on this machine, so it is not checked (did you mean"
    assert f"data        {tmp_path / 'corpus.idx'} {missing} 'corpus_text_document'?)" in lines
    assert f"data        {tmp_path / 'token.model'} {missing} 'tokens.model'?)" in lines
    assert lines[-1] == "not checked: 2 files not on this machine; the rest is ok"


def test_what_does_not_fit_is_shown_and_refused(tmp_path, capsys):
    config = run_config(tmp_path, "--precision.mode", "bf16", "--run.device", "auto")
    with pytest.raises(OutOfMemoryError, match=r"a GPU has 1\.0 GiB"):
        check_run(config, 1, 1, 1)
    assert "stage 0     0      embedding, 0–3, head" in capsys.readouterr().out


def test_data_that_do_not_fit_the_run(workspace):
    with pytest.raises(DataError, match="and needs"):
        check_run(run_config(workspace, "--data.seq_length", "4096", "--data.split", "[1, 9, 0]"), 1, 1, 80)


@pytest.mark.parametrize(("options", "name"), [((0, 1, 80), "gpus 0"), ((1, 0, 80), "nodes 0")])
def test_options_out_of_range(tmp_path, options, name):
    with pytest.raises(ConfigError, match=f"--{name}: expected at least 1"):
        check_run(run_config(tmp_path), *options)
