"""The examples for clusters, on two nodes of one rank: real ranks for Slurm, what would be started for the others."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.cli.launch import SHUTDOWN_S
from engine.errors import HangError, Interrupted, PeerError, TriaxisError
from engine.testing.runs import read_records
from tests.e2e.commands import ENVIRONMENT, ROOT

SBATCH = ROOT / "examples/slurm/train.sbatch"
JOBSET = ROOT / "examples/kubernetes/jobset.yaml"
SKYPILOT = ROOT / "examples/skypilot/train.yaml"
PROGRAMS = {
    "triaxis": f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m engine "$@"\n',
    # Two nodes, of which a file `stop` has the tasks signaled, as Slurm does before the time limit. The code is the
    # highest one of the tasks.
    "srun": """#!/bin/bash
        while [[ $1 == --* ]]; do shift; done
        SLURM_NODEID=0 "$@" & a=$!
        SLURM_NODEID=1 "$@" & b=$!
        (until [ -e stop ]; do sleep 0.1; done; kill -TERM $a $b) & watcher=$!
        wait $a; code=$?; wait $b; other=$?
        kill $watcher 2> /dev/null
        exit $(( code > other ? code : other ))
    """,
    "scontrol": """#!/bin/bash
        [ "$1" = requeue ] && echo "$2" >> requeued || printf '127.0.0.1\\nother\\n'
    """,
}


@pytest.fixture
def job(workspace: Path) -> Path:
    """A directory with programs of the scheduler in bin/, and a small run's settings in tiny.yaml."""
    (workspace / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (workspace / "bin" / name).write_text(text.replace("\n        ", "\n"))
        (workspace / "bin" / name).chmod(0o755)
    recipe = yaml.safe_load((ROOT / "examples/configs/tiny.yaml").read_text(encoding="utf-8"))
    recipe["run"] |= {"dir": "run", "device": "cpu"}
    recipe["data"] |= {"train": [{"path": "corpus"}], "split": [1, 0, 0], "seq_length": 32}
    recipe["train"], recipe["lr_schedule"] = {"steps": 12}, {"kind": "constant"}
    recipe["ops"], recipe["log"] = {"measure": False}, {"interval": 1, "tensorboard": False}
    (workspace / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return workspace


def start(command: list[str], job: Path, **environment: str) -> "subprocess.Popen[str]":
    path = f"{job / 'bin'}:{ENVIRONMENT['PATH']}"
    return subprocess.Popen(
        command, cwd=job, env=ENVIRONMENT | {"PATH": path} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_slurm_job_saves_before_its_time_limit_queues_again_and_resumes(job):
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "a,b"}
    slurm["SLURM_JOB_ID"] = str(os.getpid())
    command = ["bash", str(SBATCH), "tiny.yaml", "--train.steps"]
    first = start([*command, "5000"], job, **slurm)
    while len(read_records(job / "run/metrics.jsonl")) < 2 and first.poll() is None:
        time.sleep(0.05)
    (job / "stop").touch()
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == Interrupted.exit_code, printed
    assert "2 rank(s) on cpu, gloo" in printed
    assert (job / "requeued").read_text().split() == [slurm["SLURM_JOB_ID"]]
    saved = next(event["step"] for event in read_records(job / "run/events.jsonl") if event["event"] == "save")

    (job / "stop").unlink()
    again = start([*command, str(saved + 1)], job, **slurm)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert f"resumes from run/checkpoints/step_{saved:08d}" in printed
    assert len((job / "requeued").read_text().split()) == 1


def test_a_slurm_job_that_is_refused_does_not_queue_again(job):
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "7"}
    refused = start(["bash", str(SBATCH), "tiny.yaml", "--trian.steps", "3"], job, **slurm)
    printed, _ = refused.communicate(timeout=300)
    assert refused.returncode == 64, printed
    assert not (job / "requeued").exists()


def test_slurm_gives_the_ranks_time_to_save():
    seconds = re.search(r"^#SBATCH --signal=TERM@(\d+)$", SBATCH.read_text(encoding="utf-8"), re.MULTILINE)
    assert seconds and int(seconds[1]) > SHUTDOWN_S


def jobset() -> tuple[dict[str, Any], dict[str, Any]]:
    """The set, and the specification of its job."""
    content = yaml.safe_load(JOBSET.read_text(encoding="utf-8"))
    (replicated,) = content["spec"]["replicatedJobs"]
    return content, replicated["template"]["spec"]


def jobset_node(number: int) -> tuple[list[str], dict[str, str]]:
    """What a pod of it runs, and its environment."""
    _, spec = jobset()
    (container,) = spec["template"]["spec"]["containers"]
    plain = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    (place,) = (one["name"] for one in container["env"] if "job-completion-index" in str(one.get("valueFrom")))
    return ["triaxis", *container["args"][:-1], "tiny.yaml", "--dry-run"], plain | {place: str(number)}


def skypilot_node(number: int) -> tuple[list[str], dict[str, str]]:
    """What SkyPilot runs on a node, and its environment."""
    content = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))
    run = content["run"].replace("cd /shared ", "cd . ").rstrip() + " --dry-run"
    given = {"SKYPILOT_NODE_RANK": str(number), "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    given |= {"SKYPILOT_NUM_NODES": "8", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    return ["bash", "-ec", run], content["envs"] | given | {"RECIPE": "tiny.yaml"}


@pytest.mark.parametrize(("node", "host"), [(jobset_node, "llama2-7b-node-0-0.llama2-7b"), (skypilot_node, "10.0.0.7")])
def test_a_node_knows_its_place(job, node, host):
    command, environment = node(3)
    batch = yaml.safe_load((job / "tiny.yaml").read_text())
    batch["batch"]["global"] = 256  # for 64 ranks
    (job / "tiny.yaml").write_text(yaml.safe_dump(batch))
    done = start(command, job, **environment)
    printed, _ = done.communicate(timeout=300)
    assert done.returncode == 0, printed
    place = f"--nnodes 8 --node-rank 3 --master-addr {host} --master-port 29500 --nproc-per-node 8 "
    assert f"torchrun {place}-m engine train tiny.yaml" in printed


def test_the_jobset_is_consistent():
    content, spec = jobset()
    env = {one["name"]: one.get("value") for one in spec["template"]["spec"]["containers"][0]["env"]}
    container = spec["template"]["spec"]["containers"][0]
    (name,) = (job["name"] for job in content["spec"]["replicatedJobs"])
    assert int(env["NNODES"]) == spec["completions"] == spec["parallelism"]
    assert int(env["NPROC_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert env["MASTER_ADDR"] == f"{content['metadata']['name']}-{name}-0-0.{content['metadata']['name']}"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > SHUTDOWN_S
    assert f"USER {spec['template']['spec']['securityContext']['runAsUser']}\n" in (ROOT / "Dockerfile").read_text()


def test_errors_that_a_restart_repeats_end_the_run():
    content, spec = jobset()
    (rule,) = spec["podFailurePolicy"]["rules"]
    (ends,) = content["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], ends["action"], ends["onJobFailureReasons"]) == (
        "FailJob",
        "FailJobSet",
        ["PodFailurePolicy"],
    )
    transient = {Interrupted, PeerError, HangError}
    lasting = {kind.exit_code for kind in TriaxisError.__subclasses__() if kind not in transient} - {1}
    assert set(rule["onExitCodes"]["values"]) == lasting
    recovery = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [Interrupted.exit_code]


def test_other_failures_are_tried_again():
    content, spec = jobset()
    assert content["spec"]["failurePolicy"]["maxRestarts"] > 0 == spec["backoffLimit"]  # all pods, not one of them
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    recovery = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))["resources"]["job_recovery"]
    assert recovery["max_restarts_on_errors"] > 0


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: names and arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [tuple(line.split(" ", 1)) for line in text.replace("\\\n", "").splitlines() if line]


def test_the_image_is_of_one_pytorch_and_runs_without_root():
    """It has not been built here: hadolint is clean, its commands parse, and it agrees with the rest of the tree."""
    version = re.search(
        r"ARG PYTORCH=(([\d.]+)-cuda[\d.]+-cudnn9)\n", (ROOT / "Dockerfile").read_text(encoding="utf-8")
    )
    assert f"torch=={version[2]}" in (ROOT / "examples/environment.sh").read_text(encoding="utf-8")
    sky = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))["resources"]["image_id"]
    assert sky == f"docker:pytorch/pytorch:{version[1]}-devel"
    assert [text for name, text in instructions() if name == "FROM"] == [
        "pytorch/pytorch:${PYTORCH}-devel AS build", "pytorch/pytorch:${PYTORCH}-runtime",
    ]  # fmt: skip
    for name, text in instructions():
        if name == "RUN":
            script = re.sub(r"--mount=\S+ +", "", text)
            assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0, text
    last = dict(instructions())
    assert last["USER"] not in ("root", "0")
    assert (last["ENTRYPOINT"], last["CMD"]) == ('["triaxis"]', '["env"]')
