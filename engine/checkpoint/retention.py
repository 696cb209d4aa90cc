"""Removes old checkpoints of a run directory after a new one is committed.

At any time, the newest valid checkpoint or the one before it has a name that `run_directory.find` recognizes.
"""

from pathlib import Path

from engine.checkpoint.manifest import State
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.run_directory import PARTIAL, PREVIOUS, valid_checkpoints, warn
from engine.checkpoint.storage import Storage
from engine.errors import CheckpointError


def set_aside(files: Storage, target: Path) -> Path | None:
    """Free the name `target`; rename a valid checkpoint of that name to `target.previous`, under which it stays valid.

    Returns:
        the checkpoint to discard after the new one is committed, or None.
    """
    previous = target.with_name(target.name + PREVIOUS)
    if not target.exists():
        return previous if previous.exists() else None
    if not _is_valid(target):
        discard(files, target)
        return previous if previous.exists() else None
    if previous.exists():
        discard(files, previous)
    files.rename(target, previous)
    return previous


def retain(files: Storage, root: Path, keep_last: int, state: State) -> None:
    """Remove all valid checkpoints except the best and the `keep_last` newest. Damaged ones are kept for inspection."""
    valid = sorted(valid_checkpoints(root), key=lambda checkpoint: checkpoint.manifest.save_number)
    best = None if state.best is None else state.best.step
    for checkpoint in valid[: -max(1, keep_last)]:
        if checkpoint.state.step != best:
            discard(files, checkpoint.path)


def discard(files: Storage, path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a partially removed one is not taken for a damaged one."""
    removed = path.with_name(path.name + ".removed" + PARTIAL)
    files.rename(path, removed)
    files.remove(removed)


def remove_quietly(files: Storage, path: Path) -> None:
    """Remove a directory; report a failure instead of raising, because the caller is handling another error."""
    try:
        files.remove(path)
    except OSError as error:
        warn(f"could not remove {path}: {error}; the next save will")


def next_save_number(root: Path) -> int:
    """Return the highest save number of the valid checkpoints in `root`, plus one."""
    return 1 + max((checkpoint.manifest.save_number for checkpoint in valid_checkpoints(root)), default=0)


def _is_valid(path: Path) -> bool:
    try:
        Checkpoint(path)
    except CheckpointError:
        return False
    return True
