"""Hooks that save checkpoints of a run."""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from engine.checkpoint.manifest import State
from engine.checkpoint.save import save
from engine.data.samples.contents import contents
from engine.data.tokenizers.files import CHAT_TEMPLATE
from engine.errors import StorageError
from engine.parallel.agreement import first_problem, on_all_ranks
from engine.train.hooks import Hook
from engine.train.inputs import Inputs, chat_template
from engine.train.log import RunLog
from engine.train.state import state_slices
from engine.train.step import StepResult
from engine.train.trainer import Trainer


class Saving(Hook):
    """Save a checkpoint, at most once per step, and at the end of training if the last step has none yet."""

    phase = "saving a checkpoint"

    def __init__(self, trainer: Trainer, inputs: Inputs, log: RunLog) -> None:
        self.inputs, self.log = inputs, log
        self.saved_step = trainer.progress.step

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.save(trainer)

    def after_training(self, trainer: Trainer) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save the current step, unless it is already saved.

        Raises:
            StorageError: on all ranks, if any rank could not write; older checkpoints are intact.
        """
        step = trainer.progress.step
        if step == self.saved_step:
            return
        with trainer.clock.paused():
            started = time.perf_counter()
            try:
                path = self._write(trainer)
            except StorageError as error:
                self.log.event("save_failed", step=step, reason=str(error))
                raise on_all_ranks(trainer.world, error) from None
            self.saved_step = step
            seconds = time.perf_counter() - started
            self.log.say(f"saved {path} in {seconds:.1f} s")
            self.log.event("save", step=step, path=str(path), seconds=seconds)

    def _write(self, trainer: Trainer) -> Path:
        config, world = trainer.config, trainer.world
        trainer.optimizer.parameters.finish_gathering()
        return save(
            config.run.dir,
            state_slices(trainer.optimizer, trainer.model.fp8),
            self._state(trainer),
            config_yaml=config.to_yaml(),
            tokenizer_files=self._tokenizer_files(config.run.dir),
            keep_last=config.checkpoint.keep_last,
            rank=world.rank,
            world_size=world.layout.world_size,
            first_problem=partial(first_problem, world),
        )

    def _state(self, trainer: Trainer) -> State:
        progress = trainer.progress
        return State(
            step=progress.step,
            consumed_samples=progress.samples,
            consumed_tokens=progress.tokens,
            data_fingerprint=self.inputs.train_data.fingerprint(),
            data_contents=contents(self.inputs.train_data.datasets),
            layout=asdict(trainer.world.layout),
            best=trainer.best,
        )

    def _tokenizer_files(self, run_dir: Path) -> list[Path]:
        """The tokenizer's files, with its chat template replaced by that of the data, if they have one."""
        files = list(self.inputs.tokenizer.files)
        if chat_template(self.inputs.train_data) is None:
            return files
        return [*(file for file in files if file.name != CHAT_TEMPLATE), run_dir / CHAT_TEMPLATE]


class SaveBest(Hook):
    """Save after an evaluation that is the best so far, if `checkpoint.keep_best` is set."""

    phase = "saving a checkpoint"

    def __init__(self, saving: Saving) -> None:
        self.saving = saving

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        is_best = trainer.best is not None and trainer.best.step == result.step
        if is_best and trainer.config.checkpoint.keep_best:
            self.saving.save(trainer)
