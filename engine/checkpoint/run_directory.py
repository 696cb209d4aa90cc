"""Finds the checkpoints of a run directory: the valid ones, the newest and the best.

Checkpoints are ordered by the save number in their manifests. Alternative considered: trusting the file `latest`, which
may be out of date after a crash; it is informational.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from engine.checkpoint.manifest import MANIFEST
from engine.checkpoint.reader import Checkpoint
from engine.errors import CheckpointError

BEST = "best"
PARTIAL = ".partial"
PREVIOUS = ".previous"
_STEP_NAME = re.compile(rf"step_\d{{8,}}({re.escape(PREVIOUS)})?")

Report = Callable[[str], None]


def warn(message: str) -> None:
    """Print a report to stderr, the default of functions that take `report`."""
    print(f"checkpoint: {message}", file=sys.stderr, flush=True)


def checkpoints_dir(run_dir: Path | str) -> Path:
    """Return the directory of a run's checkpoints, which may not exist yet."""
    return Path(run_dir) / "checkpoints"


def step_name(step: int) -> str:
    """Return the name of the checkpoint directory of a step; names sort by step up to 10⁸ steps."""
    return f"step_{step:08d}"


def candidates(run_dir: Path | str, report: Report = warn) -> list[Checkpoint]:
    """Return all valid checkpoints of a run, newest first. Damaged ones are reported and skipped.

    If a tensor turns out to be damaged, the caller falls back to the next checkpoint.

    Raises:
        CheckpointError: there are entries, but no valid checkpoint.
    """
    root = checkpoints_dir(run_dir)
    problems: list[str] = []
    found = valid_checkpoints(root, problems.append)
    if not found and _latest(root) is not None:
        problems.append(f"{root / 'latest'} says {_latest(root)!r}, which is not there")
    newest_first = sorted(found, key=lambda checkpoint: -checkpoint.manifest.save_number)
    if problems and not found:
        raise CheckpointError("\n  ".join([f"no valid checkpoint in {root}:", *problems]))
    for problem in problems:
        report(f"skipped: {problem}")
    if newest_first and _latest(root) != newest_first[0].path.name:
        report(f"{root / 'latest'} says {_latest(root)!r}; the newest valid checkpoint is {newest_first[0].path.name}")
    return newest_first


def find(run_dir: Path | str, report: Report = warn) -> Checkpoint | None:
    """Return the newest valid checkpoint of a run; None if the run has not committed one.

    Raises:
        CheckpointError: there are entries, but no valid checkpoint.
    """
    return next(iter(candidates(run_dir, report)), None)


def open_checkpoint(path: Path | str, report: Report = warn) -> Checkpoint:
    """Open the checkpoint at `path`, or the newest one of the run directory `path` or of its `checkpoints`. The
    name `best` in either of these means the checkpoint of the best evaluation.

    Raises:
        CheckpointError: there is no valid checkpoint.
    """
    path = Path(path)
    if path.name == BEST and not path.exists():
        return _best(path.parent, report)
    if not path.is_dir():
        raise CheckpointError(f"no such checkpoint directory: {path}")
    if (path / MANIFEST).exists() or _STEP_NAME.fullmatch(path.name):
        return Checkpoint(path)
    inside = path.name == "checkpoints" and not checkpoints_dir(path).is_dir()
    found = find(path.parent if inside else path, report)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint: neither {MANIFEST} nor a committed checkpoints/step_*")
    return found


def _best(root: Path, report: Report) -> Checkpoint:
    """Open the checkpoint of the best evaluation, as recorded in the newest checkpoint."""
    newest = open_checkpoint(root, report)
    best = newest.state.best
    if best is None or not (newest.path.parent / step_name(best.step)).is_dir():
        why = "evaluations were not compared" if best is None else f"that of step {best.step} was not kept"
        raise CheckpointError(f"{root / BEST}: {why}; see checkpoint.keep_best, or name another checkpoint in {root}")
    return Checkpoint(newest.path.parent / step_name(best.step))


def valid_checkpoints(root: Path, problem: Report = lambda _: None) -> list[Checkpoint]:
    """Return the valid checkpoints in `root`, by name; `problem` is called with a message about each other entry."""
    valid = []
    for name in sorted(os.listdir(root)) if root.is_dir() else []:
        if name == "latest" or name.endswith(PARTIAL):
            continue
        if not _STEP_NAME.fullmatch(name):
            problem(f"{root / name} is not a checkpoint")
            continue
        try:
            valid.append(Checkpoint(root / name))
        except CheckpointError as error:
            problem(str(error))
    return valid


def _latest(root: Path) -> str | None:
    try:
        return (root / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
