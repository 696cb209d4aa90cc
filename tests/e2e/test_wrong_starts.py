"""Wrong starts of the 7B examples, in each way to start them: the refusal is the last thing on the screen.

`triaxis train` and `bash examples/SCRIPT` exit with the code of the refusal. torchrun exits with 1 whatever its ranks
do, and ends with a report of its own, which shows the refusal and then a border. All starts run in forks of this
process, which has imported torch already, and three of them as people type them.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from engine.cli.launch import NodeLaunch, run_node
from engine.cli.main import main
from tests.e2e.commands import ROOT, forked, start

STARTS = {  # options, exit code, what the refusal says
    "misspelled key": ("--batch.mirco 2", 64, r"batch.mirco: no such setting \(did you mean 'micro'\?\)"),
    "no tokenizer": ("--data.tokenizer gone.model", 64, "tokenizer 'gone.model': no such file; expected"),
    "large tokenizer": ("--model.vocab_size 128", 64, "model.vocab_size = 128 is smaller than the 257 entries of"),
    "indivisible batch": ("--batch.micro 2 --batch.global 5", 64, "batch.global = 5 is not .*; the nearest that work"),
    "no dataset": ("--data.train '[{path: gone}]'", 65, "no dataset file at gone.idx; .* by preprocessing"),
    "world size": ("--parallel.tp 3 --parallel.pp 5", 64, "parallel.tp × parallel.pp = 3 × 5; start 15 ranks, or"),
    "memory": ("--model.preset llama2-7b", 72, r"tp \d × pp 1 × dp \d needs .* has [\d.]+ GiB. What would fit:"),
    "foreign key": ("--max_steps 5", 64, "max_steps: no such setting; use train.steps"),
    "old key": ("--batch.micro_batch_size 4", 64, "batch.micro_batch_size: no such setting; use batch.micro"),
    "no GPU": ("--gpus 8", 64, "--gpus(: torchrun has started this process as a rank| 8: this machine shows 0)"),
}


def options(workspace: Path, wrong: str) -> list[str]:
    """A run of a small model, with the wrong options behind those that are right."""
    return [
        *("--model.preset", "tiny", "--run.dir", str(workspace / "run"), "--precision.mode", "fp32"),
        *("--run.device", "auto", "--data.tokenizer", "byte", "--data.seq_length", "64"),
        *("--data.train", f"[{{path: {workspace / 'corpus'}}}]", "--parallel.tp", "1", "--parallel.pp", "1"),
        *shlex.split(wrong),
    ]


def refusal(text: str, code: int, said: str) -> str:
    """Check that `text` ends with a refusal, and return it."""
    last = text[text.rindex("error: ") :]
    assert re.search(said, last), text
    assert re.match(rf"exit {code}: [a-z]", last.splitlines()[-1]), text
    return last.strip()


def report(text: str) -> str:
    """What torchrun's report says of the first failure, without its border, which is the last line."""
    *lines, border = text.rpartition("\n  traceback : \n")[2].splitlines()
    assert re.fullmatch("=+", border), text
    return "\n".join(line.removeprefix("  ") for line in lines)


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize("recipe", ["llama2_7b.yaml", "sft_llama2_7b.yaml"])  # of pretrain_7b.sh and sft_7b.sh
@pytest.mark.parametrize("wrong", STARTS)
def test_before_ranks_start(workspace, wrong, recipe):
    given, code, said = STARTS[wrong]
    ranks = [] if "--gpus" in given else ["--ranks", "2"]
    command = ["train", str(ROOT / "examples/configs" / recipe), *ranks, *options(workspace, given)]
    done = forked(lambda: main(command), workspace)
    assert done.returncode == code, done.stderr
    refusal(done.stderr, code, said)
    assert "Traceback" not in done.stderr
    assert not (workspace / "run").exists()


@pytest.mark.parametrize("wrong", STARTS)
def test_in_a_rank_of_torchrun(workspace, wrong):
    given, code, said = STARTS[wrong]
    file, rank = workspace / "error.json", {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    command = ["train", "llama2-7b", *options(workspace, given)]
    done = forked(lambda: main(command), workspace, TORCHELASTIC_ERROR_FILE=str(file), **rank)
    assert done.returncode == code, done.stderr
    shown = str(ChildFailedError("train", {0: ProcessFailure(0, 1, done.returncode, str(file))}))
    assert report(shown) == refusal(done.stderr, code, said)


@pytest.mark.parametrize("way", ["bash", "torchrun", "torchrun --no-python"])
@pytest.mark.parametrize(
    ("wrong", "script"),
    [("misspelled key", "sft_7b.sh"), ("no GPU", "sft_7b.sh"), ("world size", "pretrain_7b.sh")],
)
def test_as_people_type_it(workspace, wrong, script, way):
    given, code, said = STARTS[wrong]
    first, *rest = way.split()
    launcher = [first, *(["--standalone", "--nproc-per-node", "2"] if first == "torchrun" else []), *rest]
    done = start([*launcher, str(ROOT / "examples" / script), *options(workspace, given)], workspace)
    if first == "bash":
        assert done.returncode == code
        refusal(done.stderr, code, said)
        return
    assert done.returncode == 1
    refusal(report(done.stderr), code, said)
    cause = done.stderr.partition("Root Cause")[2]
    assert re.search(rf"\n  exitcode  : {code} ", cause)
    assert done.stderr.count(f"exit {code}: ") == 2  # of the rank that reports, and torchrun's report
    assert done.stderr.count("Traceback") == 1 and "torch/distributed/run.py" in done.stderr  # torchrun's own
    assert not (workspace / "run").exists()


def test_under_torchrun_one_rank_prints_the_help(tmp_path):
    example = str(ROOT / "examples/pretrain_7b.sh")
    done = start(["torchrun", "--standalone", "--nproc-per-node", "2", example, "--help"], tmp_path)
    assert (done.returncode, done.stdout.count("usage: python -m engine train"), done.stderr) == (0, 1, "")


def test_a_refusal_of_ranks_is_the_last_thing_that_triaxis_train_shows(workspace):
    """Of what only ranks do: the first one writes to run.dir."""
    command = [
        sys.executable,
        "-m",
        "engine",
        "train",
        "tiny",
        "--ranks",
        "2",
        *options(workspace, "--ops.measure false"),
    ]
    done = start([*command, "--run.dir", str(workspace / "corpus.idx/run")], workspace)
    assert done.returncode == 74, done.stderr
    refusal(done.stderr, 74, "corpus.idx/run cannot be written: ")
    assert done.stderr.count("cannot be written") == 1


SILENT = """
import os, time
from engine.errors import ConfigError, run_program
def fail():
    time.sleep(60 * (os.environ["LOCAL_RANK"] == "0"))
    error = ConfigError("no")
    error.reported_elsewhere, error.patience_s = True, 0
    raise error
run_program(fail)
"""


def test_a_refusal_is_shown_if_the_rank_that_reports_it_is_ended_before(tmp_path):
    (tmp_path / "silent.py").write_text(SILENT)
    done = forked(lambda: run_node(NodeLaunch(2), ["-m", "silent"], tmp_path), tmp_path)
    assert done.returncode == 64
    assert done.stderr.splitlines() == [
        "error: no",
        "exit 64: correct the command or the configuration and start again",
    ]
