"""Which ranks `triaxis train` starts, and with which line; as processes they are tested in `e2e`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from engine.cli.launch import NodeLaunch, _recorded_code
from engine.cli.train import _in_a_child, _launch, parser
from engine.errors import ConfigError, TriaxisError
from tests.config.minimal import build

VARIABLES = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
VARIABLES += ("CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def launch(*arguments: str) -> NodeLaunch:
    options, overrides = parser().parse_known_args(["CONFIG", *arguments])
    return _launch(options, build({}, *overrides))


def test_without_options_it_is_as_many_ranks_as_gpus_or_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch() == NodeLaunch(1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert launch() == NodeLaunch(8)
    assert launch("--run.device", "cpu") == NodeLaunch(1)
    assert launch("--ranks", "2") == NodeLaunch(2)
    assert launch("--gpus", "4") == NodeLaunch(4)
    monkeypatch.setenv("NPROC_PER_NODE", "3")
    assert launch() == NodeLaunch(3)
    assert launch("--gpus", "4") == NodeLaunch(4)


def test_options_take_precedence_over_the_variables_of_schedulers(monkeypatch):
    place = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert launch("--ranks", "8") == NodeLaunch(8, 4, 2, "node0", 1234)
    assert launch("--ranks", "8", "--node-rank", "3", "--master-port", "99") == NodeLaunch(8, 4, 3, "node0", 99)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gpus", "9"], r"^--gpus 9: this machine shows 8 of them; --ranks 9 starts"),
        (["--gpus", "1", "--run.device", "cpu"], "^--gpus 1: run.device = cpu"),
        (["--ranks", "0"], "^--ranks 0: expected at least 1"),
        (["--gpus", "0"], "^--gpus 0: expected at least 1"),
        (["--nodes", "0"], "^--nodes 0: expected at least 1"),
        (["--gpus", "0"], "^--gpus 0: expected at least 1"),
        (["--nodes", "4", "--node-rank", "4"], "^--node-rank 4: expected 0 to 3 of 4 nodes"),
        (["--nodes", "4", "--node-rank", "-1"], "^--node-rank -1: expected 0 to 3"),
    ],
)
def test_what_cannot_be_started_is_named(monkeypatch, arguments, problem):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ConfigError, match=problem):
        launch(*arguments)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NPROC_PER_NODE", "gpu", "a number"),
        ("NNODES", "x", "a number"),
        ("NNODES", "0", "at least 1"),
        ("NODE_RANK", "1", r"0 to 0 of 1 node \(--nodes or NNODES\)"),
        ("MASTER_PORT", "70000", "1 to 65535"),
    ],
)
def test_a_variable_of_the_environment_is_blamed_for_its_value(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name} = {value} in the environment: expected {expected}"):
        launch()


def test_a_node_must_know_its_place():
    NodeLaunch(8).require_place()
    NodeLaunch(8, 4, 0, "node0").require_place()
    for unknown in (NodeLaunch(8, 4), NodeLaunch(8, 4, 1), NodeLaunch(8, 4, None, "node0")):
        with pytest.raises(ConfigError, match=r"--nodes 4 needs --node-rank \(0 to 3"):
            unknown.require_place()


def test_the_line_is_one_for_torchrun(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    program = ["-m", "engine", "train", "tiny", "--data.train", "[{path: a b}]"]
    settings = "OMP_NUM_THREADS=7 CUDA_DEVICE_MAX_CONNECTIONS=32 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170"
    ranks = "-m engine train tiny --data.train '[{path: a b}]'"
    assert NodeLaunch(8).line(program) == f"{settings} torchrun --standalone --nproc-per-node 8 {ranks}"
    meet = "--nnodes 4 --node-rank 1 --master-addr node0 --master-port 29500"
    assert NodeLaunch(8, 4, 1, "node0").line(program) == f"{settings} torchrun {meet} --nproc-per-node 8 {ranks}"
    meet = "--nnodes 4 --node-rank $NODE_RANK --master-addr $MASTER_ADDR --master-port 29500"
    assert NodeLaunch(8, 4).line(program) == f"{settings} torchrun {meet} --nproc-per-node 8 {ranks}"


def test_the_code_of_a_stopped_run_is_the_recorded_one(tmp_path):
    events, started = tmp_path / "events.jsonl", time.time()
    assert _recorded_code(events, started) is None
    lines = [{"event": "start", "time": started}, {"event": "exit", "time": started + 1, "code": 75}]
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _recorded_code(events, started) == 75
    assert _recorded_code(events, started + 2) is None  # of an earlier start


def test_ranks_that_are_left_are_ended():
    """In a program of its own: it ends all of its children."""
    program = (
        "import subprocess; from engine.cli.launch import _kill_ranks; "
        "rank = subprocess.Popen(['sleep', '60'], start_new_session=True); _kill_ranks(); print(rank.wait())"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "-9\n"


def test_a_check_that_is_killed_says_so():
    with pytest.raises(TriaxisError, match=r"the check before the start was ended by SIGKILL; often .* out of memory"):
        _in_a_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
