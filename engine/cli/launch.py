"""Starts one process for each rank of this node, with torchrun's agent in this process.

Alternative considered: to become torchrun (exec). It exits with 1 whatever code a rank has, and prints 60 lines behind
the message of the rank that failed.
"""

import json
import logging
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, TriaxisError, ended_by

SHUTDOWN_S = 170  # from SIGTERM until the agent kills the ranks: for a step and a checkpoint; torchrun's default is 30
_AGENT = "torch.distributed.elastic.multiprocessing.api"
_REPEATED = ("failed (exitcode", "Sending process")  # a line a rank, behind the message of the rank that failed
_GUARD_S = 1.0  # for the process beside a killed rank to write where it was
HARDWARE_QUEUES = 32  # kernels of several streams wait for each other in fewer; the engine refuses 1 with stages


@dataclass(frozen=True)
class NodeLaunch:
    """The ranks to start on this node, and where the nodes meet."""

    ranks: int
    nodes: int = 1
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int = 29500

    @property
    def world_size(self) -> int:
        return self.ranks * self.nodes

    def require_place(self) -> None:
        """Check that it is said which of several nodes this is.

        Raises:
            ConfigError: it is not.
        """
        if self.nodes > 1 and (self.node_rank is None or self.master_addr is None):
            raise ConfigError(
                f"--nodes {self.nodes} needs --node-rank (0 to {self.nodes - 1}, another one on each node) and "
                "--master-addr (the host of node 0), or NODE_RANK and MASTER_ADDR in the environment; start the "
                "command on each node, or see examples/slurm; --dry-run prints the line of a node"
            )

    def options(self) -> list[str]:
        """Options of torchrun. What is not known of the place stands for a variable of the shell."""
        number = ["--nproc-per-node", str(self.ranks)]
        if self.nodes == 1:
            return ["--standalone", *number]
        place = "$NODE_RANK" if self.node_rank is None else str(self.node_rank)
        meet = ["--master-addr", self.master_addr or "$MASTER_ADDR", "--master-port", str(self.master_port)]
        return ["--nnodes", str(self.nodes), "--node-rank", place, *meet, *number]

    def environment(self) -> dict[str, str]:
        """Variables for the ranks, unless they are set already."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = {
            "OMP_NUM_THREADS": max(1, cores // self.ranks),
            "CUDA_DEVICE_MAX_CONNECTIONS": HARDWARE_QUEUES,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_S,
        }
        return {name: os.environ.get(name, str(value)) for name, value in wanted.items()}

    def line(self, program: list[str]) -> str:
        """The command line that starts the same ranks of `program` with torchrun."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment().items()]
        options = [word if word.startswith("$") else shlex.quote(word) for word in self.options()]
        return " ".join([*settings, "torchrun", *options, shlex.join(program)])


def run_node(launch: NodeLaunch, program: list[str], run_dir: Path) -> int:
    """Start the ranks of `program`, wait for them, and return the exit code of the first one that failed.

    Args:
        program: a script and its arguments, or `-m`, a module and its arguments.

    After a signal, which the ranks get as well, the code is the one that they recorded in `run_dir`.

    Raises:
        TriaxisError: a rank could not report its end itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.update(launch.environment())
    logging.getLogger(_AGENT).addFilter(lambda line: not line.getMessage().startswith(_REPEATED))
    started = time.time()
    try:
        run(parse_args([*launch.options(), *program]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        noted = failure.error_file_data
        if failure.exitcode < 0 and not noted.get("code"):
            killed = _killed(run_dir / "events.jsonl", started, rank)
            name = killed.get("place") or f"rank {rank}"
            raise TriaxisError(f"{ended_by(name, -failure.exitcode)}{killed.get('along', '')}") from None
        reports = [one.error_file_data for one in error.failures.values() if "printed" in one.error_file_data]
        if reports and not any(report["printed"] for report in reports):
            print(reports[0]["text"], file=sys.stderr, flush=True)
        return int(noted.get("code") or failure.exitcode)
    except SignalException as stopped:
        _kill_ranks()
        return _recorded_code(run_dir / "events.jsonl", started) or 128 + stopped.sigval
    return 0


def _kill_ranks() -> None:
    """End the ranks that are left when a second signal has ended torchrun's wait for them."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")  # Linux
    for pid in children.read_text(encoding="ascii").split() if children.exists() else ():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(int(pid), signal.SIGKILL)  # each rank leads a session, with its data workers


def _killed(events: Path, since: float, rank: int) -> dict[str, Any]:
    """What the guard of a rank that a signal has ended wrote of it; empty if nothing comes within a second."""
    until = time.monotonic() + _GUARD_S
    while time.monotonic() < until:
        with suppress(OSError, ValueError):
            for event in map(json.loads, reversed(events.read_text(encoding="utf-8").splitlines())):
                if event.get("event") == "killed" and event["rank"] == rank and event["time"] >= since:
                    return dict(event)
        time.sleep(0.05)
    return {}


def _recorded_code(events: Path, since: float) -> int | None:
    """Return the exit code in the last line of `events`, unless it is older."""
    try:
        last = json.loads(events.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
    return last["code"] if last.get("event") == "exit" and last["time"] >= since else None
