"""`triaxis checkpoints`: list the checkpoints of a run, verify every byte of them, or remove old ones."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

from engine.checkpoint.manifest import MANIFEST
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.retention import retain
from engine.checkpoint.run_directory import checkpoints_dir, valid_checkpoints
from engine.checkpoint.storage import Storage
from engine.cli.arguments import program_parser, require_at_least
from engine.cli.progress import ProgressDisplay
from engine.errors import CheckpointError
from engine.formatting import counted
from engine.train.log import RunLog

EXAMPLES = """
examples:
  %(prog)s runs/llama2-7b                   # complete checkpoints, oldest first, and what is damaged
  %(prog)s runs/llama2-7b --verify          # reads every file and compares it with its checksum
  %(prog)s runs/llama2-7b --keep-last 2     # removes all but the two newest and the best

Exit code 66: a checkpoint is damaged, or there is none.
"""


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = program_parser("checkpoints", __doc__.partition(": ")[2].capitalize(), EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="directory of the run")
    add("--verify", action="store_true", help="read every file and compare it with its checksum")
    add("--keep-last", type=int, metavar="N",
        help="remove complete checkpoints except the N newest and the best; not while the run is training")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`."""
    options = parser().parse_args(arguments)
    require_at_least(1, keep_last=options.keep_last)
    root, problems = checkpoints_dir(options.run), list[str]()
    found = sorted(valid_checkpoints(root, problems.append), key=lambda one: one.manifest.save_number)
    if not found and not problems:
        raise CheckpointError(f"{options.run} has no checkpoints; expected a run directory with checkpoints/step_*")
    if options.verify:
        problems += _verify(found)
    _print(found)
    if problems:
        raise CheckpointError("\n  ".join([f"{counted(len(problems), 'problem')} in {root}:", *problems]))
    if options.keep_last is not None:
        _prune(options.run, found, options.keep_last)


def _print(found: list[Checkpoint]) -> None:
    """A line for each checkpoint, oldest first."""
    best = found[-1].state.best if found else None
    for checkpoint in found:
        size = sum(file.size for file in checkpoint.manifest.files.values())
        saved = datetime.fromtimestamp((checkpoint.path / MANIFEST).stat().st_mtime)
        notes = ["newest"] if checkpoint is found[-1] else []
        if best is not None and best.step == checkpoint.state.step:
            notes.append(f"best, evaluation loss {best.loss:.4f}")
        text = f"{checkpoint.path.name}  {size / 1e9:10.3f} GB  {saved:%Y-%m-%d %H:%M}"
        print(f"{text}  {checkpoint.state.consumed_tokens:>19,} tokens  {', '.join(notes)}".rstrip())


def _verify(found: list[Checkpoint]) -> list[str]:
    """Hash every file of every checkpoint; return the problems."""
    problems, done = [], 0
    with closing(ProgressDisplay(sum(f.size for one in found for f in one.manifest.files.values()))) as progress:

        def show(name: str, size: int) -> None:
            nonlocal done
            done += size
            progress.update(done, f"verified  {done / progress.seconds / 1e6:,.0f} MB/s")

        for checkpoint in found:
            try:
                checkpoint.verify(show)
            except CheckpointError as error:
                problems.append(str(error))
    if not problems:
        print(f"verified: {counted(len(found), 'checkpoint')}, {done / 1e9:.3f} GB, every file matches its checksum")
    return problems


def _prune(run: Path, found: list[Checkpoint], keep_last: int) -> None:
    """Remove old checkpoints as a save does, while no run writes to the directory."""
    with closing(RunLog(run, active=True)):
        retain(Storage(), checkpoints_dir(run), keep_last, found[-1].state)
    removed = [checkpoint.path.name for checkpoint in found if not checkpoint.path.exists()]
    print(f"removed: {', '.join(removed) or 'nothing'}")
