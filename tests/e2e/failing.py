"""A training run in which one rank fails alone: `failing.py KIND RANK CONFIG [--section.key VALUE ...]`.

The rank fails in the third forward pass of step 2, and writes the time to `failed_at` in the run's directory. With
`+stuck` after the kind, the shutdown of its process groups never returns, like that of NCCL while a kernel waits for a
peer.
"""

import atexit
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from engine.cli.main import main
from engine.errors import run_program
from engine.train import run
from engine.train.trainer import Trainer

MICROBATCHES = 4
LIMIT_S = 90  # after which a rank that hangs shows its stacks and ends


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def bug() -> None:
    raise ValueError("broken on purpose")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


KINDS: dict[str, Callable[[], None]] = {
    "out_of_memory": out_of_memory,
    "bug": bug,
    "killed": killed,
    "stopped": stopped,
}


def get_stuck_at_shutdown() -> None:
    """Block where process groups are shut down, and at the end of the interpreter, which destroys those left."""

    def block(*arguments: Any, **options: Any) -> None:
        threading.Event().wait()

    dist.destroy_process_group = block
    atexit.register(block)


def fail_in_step_2(trainer: Trainer, fail: Callable[[], None]) -> None:
    """Make this stage's part of the model fail in F2 of step 2."""
    pipeline, calls = trainer.model.pipeline, 0
    (part,) = pipeline.parts

    def failing(x: torch.Tensor | None, batch: Any, factor: float) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == MICROBATCHES + 3:
            (trainer.config.run.dir / "failed_at").write_text(str(time.time()))
            fail()
        return part(x, batch, factor)

    pipeline.parts = [failing]


def failing_run() -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    kind, rank, *arguments = sys.argv[1:]
    kind, _, stuck = kind.partition("+")
    build_trainer = run.build_trainer

    def build(*given: Any) -> Trainer:
        trainer = build_trainer(*given)
        fail_in_step_2(trainer, KINDS[kind])
        return trainer

    if os.environ["RANK"] == rank:
        run.build_trainer = build
        if stuck:
            get_stuck_at_shutdown()
    main(["train", *arguments])


if __name__ == "__main__":
    run_program(failing_run)
